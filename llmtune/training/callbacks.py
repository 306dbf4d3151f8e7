"""What happens around the steps: the metrics file, the progress display, sealed checkpoints, a clean stop on a signal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from llmtune.artifact import write_atomically
from llmtune.interruption import Interruption
from llmtune.progress import Progress, say
from llmtune.training import checkpoints, group

NAMES = {"eval_loss": "validation_loss", "eval_training_loss": "training_loss", "eval_gap": "gap"}
WATCHED = ("refusal_margin", "refusal_drop", "refusal_drop_least")
KEPT = ("epoch", "loss", "learning_rate", "grad_norm", *NAMES.values(), "mean_token_accuracy", *WATCHED)


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """One JSON line a log, kept beside the checkpoints so that a resumed run goes on writing where it left off."""

    def __init__(self, file: Path, trainer: Any, phase: int | None = None, before: int = 0) -> None:
        self.file, self.trainer, self.phase, self.before = file, trainer, phase, before
        self.last: dict[str, Any] = {}
        """The newest line with a training loss."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            done, lines = state.global_step, read_metrics(self.file)
            kept = [line for line in lines if self._stands(line, done)]
            if control.should_evaluate:  # this step's validation was cut short, and comes again
                at = self.before + done
                kept = [line for line in kept if not (line["step"] == at and "validation_loss" in line)]
            write_atomically(self.file, "".join(f"{json.dumps(line)}\n" for line in kept))
        self.seconds, self.tokens = 0.0, self.trainer.seen_tokens

    def _stands(self, line: dict[str, Any], done: int) -> bool:
        """Whether a line of before holds now that `done` steps of this phase are."""
        return bool(line["step"] <= self.before + done and (done or line.get("phase") != self.phase))

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        found = {NAMES.get(key, key): value for key, value in logs.items()}
        measured = {key: found[key] for key in KEPT if key in found}
        line = {"step": self.before + state.global_step} | ({"phase": self.phase} if self.phase else {}) | measured
        if "loss" in line:
            tokens = int(group.total([self.trainer.seen_tokens - self.tokens])[0])
            memory = group.largest(peak_memory_gb())
            line |= {"tokens": tokens, "seconds": round(self.seconds, 4), "memory_gb": round(memory, 3)}
            line["tokens_per_s"] = round(tokens / self.seconds, 1)
            self.seconds, self.tokens, self.last = 0.0, self.trainer.seen_tokens, line
        if measured.keys() - {"epoch"} and state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that a killed process left unfinished."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class ValidateFirst(TrainerCallback):  # type: ignore[misc]
    """Validation before the first step, so that a phase is measured against what it began with."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.trainer.evaluate()


class ProgressDisplay(TrainerCallback):  # type: ignore[misc]
    """The live bar, or lines in a log: what `metrics` last measured, and validation and refusal margin when there are any."""

    def __init__(self, metrics: MetricsFile) -> None:
        self.bar: Progress | None = None
        self.metrics, self.watched = metrics, ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = Progress("train", state.max_steps, state.global_step).__enter__()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar and not control.should_log:  # else on_log follows, with the figures of this very step
            self.bar.advance(state.global_step - self.bar.done, self.bar.note)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        if self.bar and "loss" in logs:
            self.bar.advance(state.global_step - self.bar.done, note(self.metrics.last) + self.watched)
        elif self.bar and "refusal_drop" in logs:
            margin, drop, least = (logs[key] for key in WATCHED)
            self.watched = f"  refusal margin {margin:.2f}"
            since = f", {-drop:+.2f} since before training (95 % bound {-least:+.2f})" if state.global_step else ""
            say(f"  step {self.metrics.before + state.global_step}: refusal margin {margin:.2f}{since}")
        elif self.bar and "eval_loss" in logs:
            since = f", training loss {logs['eval_training_loss']:.4f}" if "eval_gap" in logs else ""
            say(f"  step {self.metrics.before + state.global_step}: validation loss {logs['eval_loss']:.4f}{since}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar:
            self.bar.__exit__(None, None, None)
            self.bar = None


def note(line: dict[str, Any]) -> str:
    """A line of the metrics file in words, useful tokens a second and peak memory among them."""
    forms = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.1e}",
        "grad_norm": "grad norm {:.2f}",
        "tokens_per_s": "{:,.0f} tokens/s",
        "memory_gb": "{:.1f} GB",
    }
    return "  ".join(form.format(line[key]) for key, form in forms.items() if key in line)


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]
    """A checkpoint counts once it is sealed; only then are the ones that it replaces deleted."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.saved_step = state.global_step
        if state.best_global_step:  # transformers looks for the folder before FSDP has made it, and keeps an older one
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")
        group.wait()  # each process writes the state of its own random numbers
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoints.seal(folder / f"checkpoint-{state.global_step}")
            checkpoints.rotate(folder, best_step=state.best_global_step)
        group.wait()


class AllocateRanks(TrainerCallback):  # type: ignore[misc]
    """AdaLoRA's step of its own: the budget of ranks is dealt out anew, by the gradients at hand. Without it no rank is pruned."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)  # the step in hand: the last one is total_step


class GoOn(TrainerCallback):  # type: ignore[misc]
    """What transformers forgets on resume: where the best checkpoint lies, a new log_steps, a validation cut short, and an end.

    A checkpoint's `TrainerControl` says what was still to be done at its step. Comes after every other callback.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        then = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if state.global_step == 0 or not then:
            return
        state.logging_steps = args.logging_steps
        if control.should_evaluate:
            self.trainer.validate()
        if state.best_global_step:  # the path is that of the folder before it was moved
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")
        control.should_training_stop |= then["should_training_stop"]  # at its last step, or by early stopping


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """After a signal leaves training before the next micro batch, of training or of validation, by raising Stopped.

    What was begun is dropped: the weights are those of the last whole step until the optimizer has stepped, and
    `SupervisedTrainer.save_last_step` writes that step's checkpoint. Every process comes to `check` in the same order.
    """

    def __init__(self, stop: Interruption) -> None:
        self.stop = stop

    def check(self) -> None:
        """Raise Stopped where any process was signalled. A signal that comes during this exchange is for the next one."""
        if agreed := int(group.largest(self.stop.received or 0)):
            self.stop.received = agreed
            self.stop.check()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.check()

    on_substep_end = on_prediction_step = on_step_begin


def peak_memory_gb() -> float:
    """Peak of this process so far: on the GPU where one is used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
