"""The processes of one run: how they find each other, agree and share. In one process each of these costs nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from llmtune import ranks
from llmtune.errors import ConfigError

Made = TypeVar("Made")


def join(device: str) -> None:
    """Connect this process with the others of its run.

    Before TrainingArguments, which would do it without a timeout on a CPU. On a GPU there is gloo beside NCCL, so that a few
    numbers can be exchanged without a wait for the GPU.
    """
    if ranks.world_size() == 1 or distributed.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank())
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=timedelta(seconds=ranks.timeout_s()))


def largest(value: float) -> float:
    """The largest of the processes' values."""
    return _reduced([value], distributed.ReduceOp.MAX)[0]


def total(values: list[float]) -> list[float]:
    """The sums over the processes, each in float64."""
    return _reduced(values, distributed.ReduceOp.SUM)


def wait() -> None:
    """Go on when every process is here."""
    _reduced([0.0], distributed.ReduceOp.MAX)


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` gives in the first process, in all of them."""
    box: list[Any] = [make() if ranks.rank() == 0 else None]
    if ranks.world_size() > 1:
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
    made: Made = box[0]
    return made


def every(values: list[Made]) -> list[Made]:
    """The values of all processes, in their order."""
    if ranks.world_size() == 1:
        return values
    found: list[list[Made]] = [[] for _ in range(ranks.world_size())]
    distributed.all_gather_object(found, values)
    return [value for part in found for value in part]


def check(config: Any, place: object) -> None:
    """Raise ConfigError for a launch that would not train what the run file says. No process is connected yet."""
    seen, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size()))
    if config.model.device == "cpu" or not seen:
        return
    if ranks.world_size() == 1 and seen > 1:
        raise ConfigError(
            place,
            f"torch sees {seen} GPUs, and one process trains on one; add '--processes {seen}', or set CUDA_VISIBLE_DEVICES=0",
        )
    if here > seen:
        raise ConfigError(
            place, f"{here} processes were launched on this machine, and torch sees {seen} GPUs; launch at most {seen}"
        )


def _reduced(values: list[float], operation: Any) -> list[float]:
    if ranks.world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(tensor, operation)
    return [float(value) for value in tensor]
