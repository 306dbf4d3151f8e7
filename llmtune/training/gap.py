"""The gap between training and validation, over the same steps; and overfitting, said in words where it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from llmtune import ranks
from llmtune.training import group

FILE = "window.json"
CLEAR = 0.01
"""By which share of it a loss has to rise, or to fall, to count: less is within the noise of a few rows."""


class Window(TrainerCallback):  # type: ignore[misc]
    """Keeps the training loss since the last validation in the checkpoint, so that a resumed run has the same gaps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        kept = Path(args.output_dir, f"checkpoint-{state.global_step}", FILE)
        if ranks.rank() == 0 and kept.is_file():  # the sums are those of all processes
            self.trainer.learned = json.loads(kept.read_text(encoding="utf-8"))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        sums = group.total(self.trainer.learned)
        if state.is_world_process_zero:
            file = Path(args.output_dir, f"checkpoint-{state.global_step}", FILE)
            file.write_text(json.dumps(sums), encoding="utf-8")


def overfitting(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The facts of it from the lines of `metrics.jsonl`, or None.

    It holds when from the best validation to the last one the validation loss rose by more than `CLEAR` of itself while the
    training loss (over the steps before each validation) fell by more than that below all it had been until the best. A
    validation loss that rises with the training loss, or while that jumps about, is another trouble: the run diverges.
    """
    seen = [line for line in lines if "gap" in line]
    if not seen:
        return None
    best, last = min(seen, key=lambda line: float(line["validation_loss"])), seen[-1]
    rose = last["validation_loss"] / best["validation_loss"] - 1
    fell = 1 - last["training_loss"] / min(line["training_loss"] for line in seen[: seen.index(best) + 1])
    if rose <= CLEAR or fell <= CLEAR:
        return None
    keys = ("step", "validation_loss", "training_loss", "gap")
    return {"best": {key: best[key] for key in keys}, "last": {key: last[key] for key in keys}}


def told(found: Mapping[str, Any]) -> str:
    """What `overfitting` found, as a sentence."""
    best, last = found["best"], found["last"]
    return (
        f"validation loss rose from {best['validation_loss']:.4g} at step {best['step']} to {last['validation_loss']:.4g} at "
        f"step {last['step']} while training loss fell from {best['training_loss']:.4g} to {last['training_loss']:.4g}: "
        f"overfitting; step {best['step']} is kept"
    )
