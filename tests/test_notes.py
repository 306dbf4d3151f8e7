"""What a library says reaches the user, but for the lines that are known to mean nothing here."""

import logging
import warnings

import pytest

from llmtune import notes


@pytest.fixture
def heard(monkeypatch, capsys):
    """`heard()`: the lines on stderr since `listen` was called."""
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name, _ in notes.KNOWN_LOGS]
    monkeypatch.setattr(notes, "_told", set())
    monkeypatch.setattr(root, "handlers", [])
    for logger in loggers:
        monkeypatch.setattr(logger, "filters", [])
    with warnings.catch_warnings():
        warnings.resetwarnings()
        notes.listen()
        yield lambda: str(capsys.readouterr().err).splitlines()


def test_an_unknown_warning_reaches_the_user_once(heard):
    for line in (3, 4):
        warnings.warn_explicit("weights are\n  odd", UserWarning, "/x/site-packages/peft/tuners/a.py", line)
    warnings.warn_explicit("shapes will change", FutureWarning, "/x/site-packages/transformers/trainer.py", 9)
    assert heard() == ["  note: peft: weights are odd", "  note: transformers: shapes will change"]


def test_a_known_one_does_not(heard):
    text = "`is_gradient_checkpointing` is deprecated and will be removed in v6."
    warnings.warn_explicit(text, FutureWarning, "/x/site-packages/transformers/modeling_utils.py", 3303)
    text = "Position ids are not supported for parameter efficient tuning. Ignoring position ids."
    warnings.warn_explicit(text, UserWarning, "/x/site-packages/peft/peft_model.py", 2251)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from %s", "x")
    assert heard() == []


def test_log_lines_of_a_library_are_notes(heard):
    logging.getLogger("trl.trainer").warning("rows were %s", "dropped")
    logging.getLogger("trl.trainer").warning("rows were dropped")
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("something else")
    logging.getLogger("accelerate").info("not a warning")
    assert heard() == ["  note: trl: rows were dropped", "  note: bitsandbytes: something else"]


def test_a_second_process_says_nothing(monkeypatch, heard):
    monkeypatch.setenv("RANK", "1")
    notes.listen()
    warnings.warn_explicit("odd", UserWarning, "/x/site-packages/peft/a.py", 1)
    logging.getLogger("trl").warning("odd")
    assert heard() == []
