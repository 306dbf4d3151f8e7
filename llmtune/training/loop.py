"""From the last whole checkpoint to the end, or to a signal; and what the run measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmtune.errors import LlmtuneError, Stopped
from llmtune.interruption import Interruption
from llmtune.progress import say
from llmtune.training import checkpoints, gap, group
from llmtune.training.callbacks import (
    GoOn,
    MetricsFile,
    ProgressDisplay,
    SealCheckpoints,
    StopOnSignal,
    ValidateFirst,
    read_metrics,
)
from llmtune.training.trainer import SupervisedTrainer


def train(
    trainer: SupervisedTrainer,
    folder: Path,
    stop: Interruption,
    log: Path,
    phase: int | None = None,
    before: int = 0,
    more: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train, from the last whole checkpoint in `folder` where there is one. Returns the metrics of this training.

    log: the file of the run's metrics, a line a step. phase: its number in a run of several; `before` steps were those of the
    earlier ones, and steps go on from there; a later phase also validates before its first step. more: the caller's callbacks.
    A signal ends training before its next micro batch, with a checkpoint of the last whole step: raises Stopped, which
    `stop` turns into Preempted or KeyboardInterrupt.
    """
    metrics = MetricsFile(log, trainer, phase, before)
    display, on_signal = ProgressDisplay(metrics), StopOnSignal(stop)
    first = [ValidateFirst(trainer)] if before else []
    window, seals = gap.Window(trainer), SealCheckpoints(trainer)
    for callback in (window, seals, metrics, display, *first, GoOn(trainer), on_signal, *more):
        trainer.add_callback(callback)
    resume = _newest(folder)
    if resume:
        say(f"  resuming from {resume.name}")
    try:
        with stop.gently():
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            on_signal.check()
    except Stopped as stopped:
        trainer.save_last_step()
        if step := trainer.state.global_step:
            stopped.args = (f"stopped at step {step}; the same command goes on from there",)
        raise
    finally:
        display.close()
    if not trainer.args.load_best_model_at_end:
        trainer.optimizer.eval()  # the weights of a schedule-free optimizer are its mean; no other has an eval
    measured: dict[str, Any] = group.from_first(lambda: _metrics(trainer, log, phase, before))
    if measured["overfitting"]:
        say(f"  {gap.told(measured['overfitting'])}")
    return measured


def _newest(folder: Path) -> Path | None:
    """The checkpoint to go on from. Raises LlmtuneError where the processes do not share the folder that it lies in."""
    name = group.from_first(lambda: found.name if (found := checkpoints.resumable(folder)) else None)
    if group.largest(name is not None and not (folder / name / checkpoints.SEAL).is_file()):
        raise LlmtuneError(
            f"the first process resumes from {name}, and another machine has not that checkpoint: to resume on several "
            "machines, output_dir must be a folder that they share; or remove it on each to start anew"
        )
    return folder / name if name else None


def _metrics(trainer: SupervisedTrainer, log: Path, phase: int | None, before: int) -> dict[str, Any]:
    # from the file, which an interruption does not cut short: the whole run's, not this process's
    lines = [line for line in read_metrics(log) if line.get("phase") == phase]
    logged = [line for line in lines if "loss" in line]
    tokens, seconds = sum(line["tokens"] for line in logged), sum(line["seconds"] for line in logged)
    best = trainer.state.best_model_checkpoint
    best_step = before + (int(Path(best).name.removeprefix("checkpoint-")) if best else trainer.state.global_step)
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "train_loss": sum(line["loss"] for line in logged) / len(logged),
        "validation_loss": trainer.state.best_metric,
        "best_step": best_step,
        "refusal_drop": next(
            (line["refusal_drop"] for line in lines if "refusal_drop" in line and line["step"] == best_step), None
        ),
        "gap": next((line["gap"] for line in lines if "gap" in line and line["step"] == best_step), None),
        "overfitting": gap.overfitting(lines),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_memory_gb": round(max(line["memory_gb"] for line in logged), 3),
        "total_parameters": trainer.model.num_parameters(),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
