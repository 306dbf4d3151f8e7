"""What happens around the steps: the metrics file, the progress display, sealed checkpoints, a clean stop on a signal."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from llmtune.errors import LlmtuneError
from llmtune.progress import Progress, say
from llmtune.training import checkpoints, group

NAMES = {"eval_loss": "validation_loss", "eval_training_loss": "training_loss", "eval_gap": "gap"}
KEPT = ("epoch", "loss", "learning_rate", "grad_norm", *NAMES.values(), "mean_token_accuracy")


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """One JSON line a log, kept beside the checkpoints so that a resumed run goes on writing where it left off."""

    def __init__(self, file: Path, trainer: Any) -> None:
        self.file, self.trainer = file, trainer
        self.last: dict[str, Any] = {}
        """The newest line with a training loss."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.seconds, self.tokens = 0.0, self.trainer.seen_tokens

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self.began

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        found = {NAMES.get(key, key): value for key, value in logs.items()}
        line = {"step": state.global_step, **{key: found[key] for key in KEPT if key in found}}
        if "loss" in line:
            tokens = int(group.total([self.trainer.seen_tokens - self.tokens])[0])
            memory = group.largest(peak_memory_gb())
            line |= {"tokens": tokens, "seconds": round(self.seconds, 4), "memory_gb": round(memory, 3)}
            line["tokens_per_s"] = round(tokens / self.seconds, 1)
            self.seconds, self.tokens, self.last = 0.0, self.trainer.seen_tokens, line
            if line["loss"] != line["loss"]:
                raise LlmtuneError(
                    f"the loss is not a number at step {state.global_step}; lower train.learning_rate, or set model.dtype to float32"
                )
        if len(line) > 2 and state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


class ProgressDisplay(TrainerCallback):  # type: ignore[misc]
    """The live bar, or lines in a log: what `metrics` last measured, and validation when there is one."""

    def __init__(self, metrics: MetricsFile) -> None:
        self.bar: Progress | None = None
        self.metrics = metrics

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = Progress("train", state.max_steps, state.global_step).__enter__()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar and not control.should_log:  # else on_log follows, with the figures of this very step
            self.bar.advance(state.global_step - self.bar.done, self.bar.note)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        if self.bar and "loss" in logs:
            self.bar.advance(state.global_step - self.bar.done, note(self.metrics.last))
        elif self.bar and "eval_loss" in logs:
            gap = f", {logs['eval_gap']:+.4f} from training" if "eval_gap" in logs else ""
            say(f"  step {state.global_step}: validation loss {logs['eval_loss']:.4f}{gap}")

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
    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        group.wait()  # each process writes the state of its own random numbers
        if state.is_world_process_zero:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        group.wait()


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if received := group.largest(self.received or 0):  # whichever process was signalled, all stop at this step
            self.received = int(received)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.restore()
        say("  stopping after this step, with a checkpoint (once more to stop at once)")


def peak_memory_gb() -> float:
    """Peak of this process so far: on the GPU where one is used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
