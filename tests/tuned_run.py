"""A finished run on the tiny model, and evaluations of it, for the tests that look at what is measured."""

from __future__ import annotations

from pathlib import Path

from llmtune import artifact, config
from llmtune.evaluate import arms
from llmtune.stages import sft


def tune(folder: Path, base: Path, steps: int, **data: str) -> None:
    """`folder/run`: a LoRA of `base` on `folder/train.jsonl`."""
    raw = {
        "stage": "sft",
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": "./train.jsonl", **data},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"max_steps": steps, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 2e-2},
        "output_dir": "./run",
    }
    sft.run(config.build(raw, folder / "sft.yaml"))


def evaluate(folder: Path, **settings: object) -> artifact.Artifact:
    """The scores of `folder/run` under these settings of a run file."""
    raw = {"stage": "eval", "run": "./run", "dtype": "float32", **settings}
    made = arms.run(config.build(raw, folder / "eval.yaml"), folder / "eval.yaml")
    assert made is not None
    return made
