"""Does what is trained stop: the question after training, and the stop token that a template has and a model lacks."""

from __future__ import annotations

import json
import os
import signal
from datetime import datetime
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers.utils import chat_template_utils

from llmtune import config
from llmtune.errors import ConfigError
from llmtune.export import merge
from llmtune.model import infer, load
from llmtune.stages import sft
from llmtune.training import callbacks, smoke

OTHER_END = tiny.CHATML.replace(tiny.START, "").replace(tiny.END, tiny.START)
"""A template that ends turns with a token at which tokenizer and generation config do not stop."""


def run_file(folder: Path, base: Path, answer: str = "ok", *, adapter: bool = True, **train: object) -> config.Section:
    rows = [{"prompt": f"say {n}", "completion": answer} for n in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = {
        "stage": "sft",
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": "./train.jsonl"},
        "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "train": {"max_steps": 60, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 5e-3, **train},
        "output_dir": "./run",
    }
    if not adapter:
        del raw["adapter"]
    return config.build(raw, folder / "sft.yaml")


def test_a_model_that_learnt_to_stop_stops(tmp_path, tiny_folder, capsys):
    metrics = sft.run(run_file(tmp_path, tiny_folder, adapter=False)).manifest["metrics"]
    assert (metrics["smoke_prompts"], metrics["smoke_ended"]) == (2, 2)
    assert "note:" not in capsys.readouterr().err


def test_one_that_did_not_is_told(tmp_path, tiny_folder, capsys, monkeypatch):
    made = sft.run(run_file(tmp_path, tiny_folder, max_steps=1, learning_rate=1e-9))
    assert (made.manifest["metrics"]["smoke_prompts"], made.manifest["metrics"]["smoke_ended"]) == (2, 0)
    assert (
        "the tuned model ended 0 of its answers within 44 tokens (those of the rows have 3 and 3)"
        in capsys.readouterr().err
    )
    (tmp_path / "again").mkdir()
    monkeypatch.setattr(smoke, "run", lambda *_: {})
    unasked = sft.run(run_file(tmp_path / "again", tiny_folder, max_steps=1, learning_rate=1e-9))
    before, after = (load_file(run.path / "adapter_model.safetensors") for run in (made, unasked))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_is_asked_where_answers_are_long_and_nothing_fails_where_asking_does(
    tmp_path, tiny_folder, capsys, monkeypatch
):
    made = sft.run(run_file(tmp_path, tiny_folder, "long " * 40, max_steps=1))
    assert "smoke_prompts" not in made.manifest["metrics"]
    (tmp_path / "again").mkdir()

    def fails(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(smoke.infer, "generate", fails)
    assert sft.run(run_file(tmp_path / "again", tiny_folder, max_steps=1)).path.is_dir()
    assert "could not be asked whether it ends its answers (no such kernel)" in capsys.readouterr().err


def test_a_packed_row_is_asked_alone(tmp_path, tiny_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(smoke.infer, "generate", lambda _, __, prompts, *___: asked.append(prompts) or [])
    for packing in (False, True):
        folder = tmp_path / str(packing)
        folder.mkdir()
        settings = run_file(folder, tiny_folder, max_steps=1)
        rows = [{"prompt": f"say {n}", "completion": "o" * (5 - n)} for n in range(4)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = settings.data.model_copy(update={"packing": packing, "max_length": 256})
        sft.run(settings.model_copy(update={"data": data}))
    assert asked[0] == asked[1] and len(asked[0]) == 2


@pytest.fixture
def other_end(tmp_path) -> Path:
    return tiny.save(tmp_path / "base", chat_template=OTHER_END)


def test_an_unlisted_end_of_turn_is_a_stop_token_of_all_that_is_made(tmp_path, other_end, capsys):
    words = load.load_tokenizer(load.find(str(other_end)))
    both = sorted(words.convert_tokens_to_ids([tiny.START, tiny.END]))
    assert words.generation_stops == [words.eos_token_id]
    made = sft.run(run_file(tmp_path, other_end))
    assert (
        "ends a turn with '<|im_start|>', at which the model's generation config does not stop"
        in capsys.readouterr().err
    )
    assert made.manifest["metrics"]["smoke_ended"] == 2  # it learnt that very token
    merged = merge.run(made.path.parent)
    (tmp_path / "whole").mkdir()
    whole = sft.run(run_file(tmp_path / "whole", other_end, adapter=False, max_steps=1))
    for folder in (made.path, merged.path, whole.path):
        stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        assert sorted(stops) == both
    base = load.load_model(load.find(str(other_end)), "float32")
    assert infer.greedy_settings(base, words, 5).eos_token_id == both  # and it is one when the base is asked


def test_a_base_that_stops_where_its_template_does_keeps_its_generation_config(tmp_path, tiny_folder):
    made = sft.run(run_file(tmp_path, tiny_folder, max_steps=1))
    assert not (made.path / "generation_config.json").exists()


def test_the_stops_of_a_model_without_a_generation_config(tmp_path):
    folder = tiny.save(tmp_path / "base")
    (folder / "generation_config.json").unlink()
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**raw, "eos_token_id": [3, 4]}), encoding="utf-8")
    assert load.load_tokenizer(load.find(str(folder))).generation_stops == [3, 4]


def test_rows_that_a_template_writes_anew_are_not_resumed_into(tmp_path, monkeypatch):
    base = tiny.save(tmp_path / "base", chat_template="{{ strftime_now('%d %B') }}" + tiny.CHATML)

    class Day(datetime):
        day_of_month = 26

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, cls.day_of_month, tzinfo=tz)

    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sft.run(run_file(tmp_path, base))
    monkeypatch.setattr(Day, "day_of_month", 27)
    with pytest.raises(
        ConfigError, match="the same rows are now other tokens, as where a chat template writes the date"
    ):
        sft.run(run_file(tmp_path, base))
    monkeypatch.setattr(Day, "day_of_month", 26)
    assert sft.run(run_file(tmp_path, base)).path.is_dir()
