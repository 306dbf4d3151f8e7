"""A loss that is not a number: the run stops before the weights are touched, and the row is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmtune import config
from llmtune.errors import LlmtuneError
from llmtune.stages import sft
from llmtune.training import blame
from llmtune.training.trainer import SupervisedTrainer


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    """A base that gives no number wherever a text holds `~`: that token's embedding is infinite."""
    folder = tiny.save(tmp_path_factory.mktemp("poisoned") / "base")
    settings = LlamaConfig.from_pretrained(folder)
    settings.tie_word_embeddings = False
    torch.manual_seed(0)
    model = LlamaForCausalLM(settings)
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny.tokenizer().convert_tokens_to_ids("~")] = float("inf")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, poisoned: Path):
    """`run(bad, packing=..., ...)`: a run on 16 rows of which the lines `bad` hold a `~`; 4 micro batches a step."""

    def start(*bad: int, validation: int | None = None, packing: bool = False, **train: object) -> None:
        for split, number in (("train", 16), ("validation", 6)):
            marked = bad if split == "train" else (validation,)
            turns = [
                [
                    {"role": "user", "content": f"{split} {i}{'~' * (i in marked)}"},
                    {"role": "assistant", "content": "a" * i},
                ]
                for i in range(1, number + 1)
            ]
            text = "".join(json.dumps({"messages": turn}) + "\n" for turn in turns)
            (tmp_path / f"{split}.jsonl").write_text(text)
        settings = {"max_steps": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3, "eval_steps": 2}
        raw = {
            "stage": "sft",
            "model": {"name": str(poisoned), "dtype": "float32", "device": "cpu"},
            "data": {
                "train": "./train.jsonl",
                "validation": "./validation.jsonl",
                "max_length": 256,
                "packing": packing,
            },
            "adapter": {"method": "lora", "r": 2, "target_modules": "all-linear"},
            "train": {**settings, **train},
            "output_dir": "./run",
        }
        if packing:
            raw["train"] |= {"batch_size": 2, "micro_batch_size": 2}
        sft.run(config.build(raw, tmp_path / "sft.yaml"))

    return start


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_row_is_named(run, packing):
    with pytest.raises(
        LlmtuneError, match=r"not a number at step \d, already for train.jsonl:7 \(loss nan\) alone"
    ) as told:
        run(7, packing=packing)
    assert "Correct or remove that row, or lower train.learning_rate" in str(told.value)


def test_every_process_tries_as_many_rows_as_the_others(run, monkeypatch):
    """Packed, one process has more rows in a step than another; where a loss takes both, each has to wait for the other."""
    tried, alone = [], blame._alone
    monkeypatch.setattr(blame, "_alone", lambda trainer, row: tried.append(row) or alone(trainer, row))
    others = SimpleNamespace(largest=lambda value: 11.0 if value == 8 else float(value), every=list, total=list)
    monkeypatch.setattr(blame, "group", others)
    with pytest.raises(LlmtuneError, match=r"already for train.jsonl:7 \(loss nan\) alone"):
        run(7)
    assert len(tried) == 11


def test_several_rows_are_named(run):
    with pytest.raises(LlmtuneError, match="already for train") as told:
        run(*range(2, 8))
    assert str(told.value).count("(loss nan)") == 5
    assert "and 1 more alone. Correct or remove those rows" in str(told.value)


def test_a_validation_row_is_named(run):
    with pytest.raises(
        LlmtuneError, match=r"validation loss is not a number after step 2, already for validation.jsonl:4 "
    ):
        run(validation=4)


def test_a_rate_that_makes_the_weights_infinite_is_told_from_a_row(run):
    with pytest.raises(
        LlmtuneError, match=r"not a number after step 1, whose gradient was one: lower train\.learning_rate"
    ):
        run(learning_rate=1e40, scheduler="constant")


def test_a_rate_that_makes_every_loss_infinite_is_told_from_a_row(run):
    with pytest.raises(LlmtuneError, match="for each of its 8 rows alone, so it is not the rows"):
        run(learning_rate=1e38, scheduler="constant", optimizer="sgd")


def test_rows_that_are_fine_alone_are_listed(run, monkeypatch):
    monkeypatch.setattr(SupervisedTrainer, "_clip_grad_norm", lambda self, model: torch.tensor(float("inf")))
    with pytest.raises(
        LlmtuneError, match=r"at step 1, although it is for each of its rows alone: train.jsonl:\d+, "
    ) as told:
        run()
    assert "and 3 more. Lower train.learning_rate" in str(told.value)


def test_between_two_looks_the_range_of_steps_is_named(run, monkeypatch):
    """On a GPU a gradient is looked at where a loss is logged; here the looks before step 4 are taken away."""
    look = SupervisedTrainer._get_grad_norm

    def seldom(self, model, grad_norm=None):
        return look(self, model, grad_norm) if self.state.global_step == 3 else torch.tensor(1.0)

    monkeypatch.setattr(SupervisedTrainer, "_get_grad_norm", seldom)
    with pytest.raises(
        LlmtuneError, match=r"since one of the steps 1 to 3. With train\.log_steps=1 the same command goes on"
    ):
        run(*range(1, 17), eval_steps=4)
