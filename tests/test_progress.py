"""What a log shows of a long command: done, time, time left, and the note."""

import pytest

from llmtune import progress
from llmtune.training.callbacks import note


@pytest.fixture
def clock(monkeypatch):
    """`clock(12.5)`: so many seconds pass."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_log_has_a_line_now_and_then_with_the_time_left(clock, capsys):
    with progress.Progress("train", 10) as bar:
        for step in range(1, 11):
            clock(6)
            bar.advance(1, f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "  train: 2/10, 12 s, 48 s left  loss 2",
        "  train: 4/10, 24 s, 36 s left  loss 4",
        "  train: 6/10, 36 s, 24 s left  loss 6",
        "  train: 8/10, 48 s, 12 s left  loss 8",
        "  train: 10/10, 60 s  loss 10",
    ]


def test_steps_of_an_earlier_process_do_not_speed_up_the_estimate(clock, capsys):
    with progress.Progress("train", 100, done=90) as bar:
        clock(100)
        bar.advance()
    assert capsys.readouterr().err.splitlines()[0] == "  train: 91/100, 100 s, 15:00 min left"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (119, "119 s"), (185, "3:05 min"), (7630, "2:07 h")])
def test_times_are_short(seconds, said):
    assert progress._clock(seconds) == said


def test_the_note_of_a_step_is_what_was_measured():
    line = {
        "step": 3,
        "loss": 2.34567,
        "learning_rate": 1e-4,
        "grad_norm": 0.512,
        "tokens_per_s": 1234.5,
        "memory_gb": 1.25,
    }
    assert note(line) == "loss 2.346  lr 1.0e-04  grad norm 0.51  1,234 tokens/s  1.2 GB"
    assert note({"loss": 2.0}) == "loss 2.000"
    assert note({}) == ""
