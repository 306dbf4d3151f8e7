"""The first steps of a run, to be compared with the same steps of one that was killed: to the bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_pt_utils import safe_globals


class Rehearsed(BaseException):
    """Ends a rehearsal whose last step is saved."""


class Rehearsal(TrainerCallback):  # type: ignore[misc]
    """Ends the run by Rehearsed at step `steps`, or at its end before that, with a checkpoint; its schedule stays the whole run's.

    kill: the step and the micro batch of it, each from 1, before which the process is killed, or at the next chance after it;
    then a checkpoint is written at every step.
    """

    def __init__(self, steps: int, kill: tuple[int, int] | None = None) -> None:
        self.steps, self.kill, self.micro = steps, kill, 0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.micro = 0
        self.on_substep_end(args, state, control)

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.micro += 1
        if self.kill and (state.global_step + 1, self.micro) >= self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= self.kill is not None or state.global_step >= self.steps

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= self.steps or control.should_training_stop:
            raise Rehearsed


def differences(first: Path, second: Path) -> tuple[int, list[str]]:
    """How many tensors two checkpoints have, and what of them differs in a single bit: `file: name`.

    Weights, the state of the optimizer and of the schedule, and of all random numbers.
    """
    found, other = dict(_tensors(first)), dict(_tensors(second))
    different = [name for name in found if name not in other or not _equal(found[name], other[name])]
    return len(found), different + [name for name in other if name not in found]


def _tensors(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            yield from ((f"{file.name}: {name}", tensor) for name, tensor in load_file(file).items())
        elif file.suffix in (".pt", ".pth"):
            with safe_globals():
                yield from _leaves(torch.load(file, map_location="cpu", weights_only=True), f"{file.name}: ")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(below, f"{name}{'' if name.endswith(' ') else '.'}{key}")
    else:
        yield name, value


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor | np.ndarray) and isinstance(second, torch.Tensor | np.ndarray):
        one, two = torch.as_tensor(first).contiguous(), torch.as_tensor(second).contiguous()
        same = one.dtype == two.dtype and one.shape == two.shape
        return same and bool(torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8)))
    return bool(first == second)
