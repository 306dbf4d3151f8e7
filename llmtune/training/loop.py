"""From the last whole checkpoint to the end, or to a signal; and what the run measured."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError, Preempted
from llmtune.progress import say
from llmtune.training import checkpoints, gap, group
from llmtune.training.callbacks import MetricsFile, ProgressDisplay, SealCheckpoints, StopOnSignal
from llmtune.training.trainer import SupervisedTrainer


def train(trainer: SupervisedTrainer, folder: Path) -> dict[str, Any]:
    """Train, from the last whole checkpoint in `folder` where there is one. Returns the run's metrics.

    Raises Preempted after SIGTERM and KeyboardInterrupt after Ctrl-C, each with a checkpoint written.
    """
    metrics = MetricsFile(folder / "metrics.jsonl", trainer)
    stop, display = StopOnSignal(), ProgressDisplay(metrics)
    for callback in (gap.Window(trainer), SealCheckpoints(), metrics, display, stop):
        trainer.add_callback(callback)
    resume = _common(checkpoints.last_complete(folder))
    if resume:
        say(f"  resuming from {resume.name}")
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if not trainer.args.load_best_model_at_end:
            trainer.optimizer.eval()  # the weights of a schedule-free optimizer are its mean; no other has an eval
    finally:
        display.close()
        stop.restore()
    if stop.received is not None:
        done = f"stopped at step {trainer.state.global_step}; the same command goes on from there"
        if stop.received == signal.SIGTERM:
            raise Preempted(done)
        say(f"  {done}")
        raise KeyboardInterrupt
    measured: dict[str, Any] = group.from_first(lambda: _metrics(trainer, folder))
    if measured["overfitting"]:
        say(f"  {gap.told(measured['overfitting'])}")
    return measured


def _common(found: Path | None) -> Path | None:
    """The checkpoint that every process found whole. Raises LlmtuneError where they lie on different machines."""
    name = group.from_first(lambda: found.name if found else None)
    if group.largest(name != (found.name if found else None)):
        raise LlmtuneError(
            f"the first process resumes from {name}, and another machine has not that checkpoint: to resume on several "
            "machines, output_dir must be a folder that they share; or remove it on each to start anew"
        )
    return found


def _metrics(trainer: SupervisedTrainer, folder: Path) -> dict[str, Any]:
    # from the file, which an interruption does not cut short: the whole run's, not this process's
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "loss" in line]
    tokens, seconds = sum(line["tokens"] for line in logged), sum(line["seconds"] for line in logged)
    best = trainer.state.best_model_checkpoint
    best_step = int(Path(best).name.removeprefix("checkpoint-")) if best else trainer.state.global_step
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "train_loss": sum(line["loss"] for line in logged) / len(logged),
        "validation_loss": trainer.state.best_metric,
        "best_step": best_step,
        "gap": next((line["gap"] for line in lines if "gap" in line and line["step"] == best_step), None),
        "overfitting": gap.overfitting(lines),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_memory_gb": round(max(line["memory_gb"] for line in logged), 3),
        "total_parameters": trainer.model.num_parameters(),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
