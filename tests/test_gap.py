"""Overfitting is told when it holds, with its figures, and not otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtune import artifact, config
from llmtune.data.chats import load_chats
from llmtune.data.tokens import encode_chat
from llmtune.model import infer, load
from llmtune.stages import sft
from llmtune.training import gap


def lines(*pairs: tuple[float, float]) -> list[dict]:
    """Validation and training loss, one pair a validation, every ten steps; a step's own line before each."""
    found: list[dict] = []
    for n, (validation, training) in enumerate(pairs, 1):
        found.append({"step": 10 * n, "loss": training})
        found.append(
            {"step": 10 * n, "validation_loss": validation, "training_loss": training, "gap": validation - training}
        )
    return found


def test_overfitting_is_told_with_its_figures() -> None:
    found = gap.overfitting(lines((2.2, 2.1), (1.92, 1.8), (1.95, 1.6), (2.05, 1.31)))
    assert gap.told(found) == (
        "validation loss rose from 1.92 at step 20 to 2.05 at step 40 while training loss fell from 1.8 to 1.31: "
        "overfitting; step 20 is kept"
    )
    assert found["best"]["gap"] == pytest.approx(0.12) and found["last"]["gap"] == pytest.approx(0.74)


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(2.0, 1.0)],
        [(2.2, 2.1), (2.0, 1.6), (1.9, 0.2)],  # a wide gap alone is none: validation still improves
        [(2.0, 1.8), (2.01, 1.6)],  # within the noise
        [(2.0, 1.8), (2.6, 2.4)],  # both rise: the run diverges
        [(2.0, 1.8), (2.6, 1.79)],
        [(24.0, 2.1), (1.8, 8.0), (6.9, 3.1)],  # a training loss that jumps about
        [(2.2, 2.1), (2.5, 1.9), (2.0, 1.7)],  # a rise that passed
    ],
)
def test_what_is_no_overfitting_is_not_told(pairs) -> None:
    assert gap.overfitting(lines(*pairs)) is None


def test_a_run_without_validation_has_no_gap() -> None:
    assert gap.overfitting([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]) is None


@pytest.fixture
def tune(tmp_path: Path, tiny_folder: Path):
    """`tune(train_answers, validation_answers, **train)` fine-tunes the whole tiny model on them."""

    def run(
        train_answers: list[str], validation_answers: list[str], adapter: dict | None = None, **train: object
    ) -> artifact.Artifact:
        for name, answers in (("train", train_answers), ("validation", validation_answers)):
            turns = [
                [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": answer}]
                for n, answer in enumerate(answers)
            ]
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
        raw = {
            "stage": "sft",
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
            "train": {"batch_size": 4, "micro_batch_size": 2, "scheduler": "constant", **train},
            "adapter": adapter,
            "output_dir": "./run",
        }
        return sft.run(config.build(raw, tmp_path / "sft.yaml"))

    return run


@pytest.mark.parametrize("adapter", [None, {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1}])
def test_a_gap_is_that_of_means_over_tokens_of_the_same_steps(
    tune, tmp_path: Path, tiny_folder: Path, adapter: dict | None
) -> None:
    """Nothing is learned at such a rate, so the training loss of an epoch is that of the base over its tokens.

    What AdaLoRA adds to the loss it trains by, which validation has not, is no part of it.
    """
    made = tune(["a", "bb", "ccc", "dddddddd", "e", "ffffff", "g", "hh"], ["x" * 9], adapter, learning_rate=1e-12, epochs=2, eval_steps=2)  # fmt: skip
    source = load.find(str(tiny_folder))
    tokenizer, model = load.load_tokenizer(source), load.load_model(source, "float32")
    rows = [encode_chat(tokenizer, chat.turns) for chat in load_chats(str(tmp_path / "train.jsonl"), training=True)]
    losses = infer.token_losses(model, rows, tokenizer.pad_token_id)
    mean = sum(loss * row.supervised for loss, row in zip(losses, rows, strict=True)) / sum(r.supervised for r in rows)
    seen = [
        line for text in (made.path / "metrics.jsonl").read_text().splitlines() if "gap" in (line := json.loads(text))
    ]
    assert [line["step"] for line in seen] == [2, 4]
    assert [line["training_loss"] for line in seen] == pytest.approx([mean, mean], abs=1e-4)
    assert [line["gap"] for line in seen] == pytest.approx([line["validation_loss"] - mean for line in seen], abs=1e-4)


def test_a_run_that_overfits_says_so_and_keeps_its_best_step(tune, capsys) -> None:
    made = tune(["yes it is"] * 4, ["no, never!"] * 2, learning_rate=5e-3, max_steps=24, eval_steps=2)
    metrics = made.manifest["metrics"]
    found = metrics["overfitting"]
    assert found["best"]["step"] == metrics["best_step"] < found["last"]["step"] == 24
    assert found["best"]["gap"] == metrics["gap"]
    assert gap.told(found) in capsys.readouterr().err


def test_a_run_that_does_not_overfit_says_nothing(tune, capsys) -> None:
    same = [f"it is {n}" for n in range(8)]
    made = tune(same, [f"it is {n}" for n in range(2)], learning_rate=1e-3, max_steps=12, eval_steps=2)
    assert made.manifest["metrics"]["overfitting"] is None and "overfitting" not in capsys.readouterr().err
