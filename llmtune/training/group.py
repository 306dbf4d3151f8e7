"""The processes of one run: how they find each other, agree and share. In one process each of these costs nothing."""

from __future__ import annotations

import importlib.util
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


def sharded() -> str | None:
    """How accelerate was asked to spread one model over the processes: "FSDP", "DeepSpeed", or None for a copy in each."""
    asked = [name for name in ("FSDP", "DEEPSPEED") if _flag(f"ACCELERATE_USE_{name}")]
    return {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}[asked[0]] if asked else None


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """The trained weights of a model that is spread over the processes, whole and in memory. Every process calls it."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if sharded() == "DeepSpeed":
        from deepspeed import zero

        with zero.GatheredParameters(list(trained.values())):
            return {name: weight.detach().cpu().clone() for name, weight in trained.items()}
    whole = {name: getattr(weight, "full_tensor", lambda weight=weight: weight)() for name, weight in trained.items()}
    return {name: weight.detach().cpu() for name, weight in whole.items()}


def check(config: Any, place: object) -> None:
    """Raise ConfigError for a launch that would not train what the run file says. No process is connected yet."""
    for name, plain in (("MIXED_PRECISION", "no"), ("DYNAMO_BACKEND", "no")):
        if (given := os.environ.get(f"ACCELERATE_{name}", plain).lower()) != plain:
            key = {"MIXED_PRECISION": "mixed_precision", "DYNAMO_BACKEND": "dynamo_backend"}[name]
            raise ConfigError(
                place,
                f"accelerate's configuration sets {key} to {given}, which would change the run unseen; set it to '{plain}' there: "
                "model.dtype decides",
            )
    for name in (
        "PARALLELISM_CONFIG",
        "MEGATRON_LM",
    ):  # rows cut over processes would be other rows, other counts, other masks
        if _flag(f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                place,
                f"accelerate's configuration asks for {name.lower()}, by which this run would train wrongly; take it out there: "
                "FSDP2 or DeepSpeed ZeRO-3 spread a model that is too large for one GPU (configs/accelerate)",
            )
    seen, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size()))
    on_cpu = config.model.device == "cpu" or not seen
    if sharded():
        _check_sharding(on_cpu, place)
    if on_cpu:
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


def check_in_effect(accelerator: Any, place: object) -> None:
    """Raise ConfigError where accelerate does something else than what it was asked for."""
    kind, asked = accelerator.distributed_type.value, sharded()
    if asked and kind != asked.upper():
        raise ConfigError(
            place, f"{asked} is asked for, and accelerate would train with {kind}: every process a whole copy"
        )


def _check_sharding(on_cpu: bool, place: object) -> None:
    if sharded() == "DeepSpeed":
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(place, "DeepSpeed is asked for and not installed; pip install 'llmtune[deepspeed]'")
        return
    if on_cpu:
        raise ConfigError(
            place,
            "FSDP is asked for, and on a CPU accelerate trains with plain copies (DDP) instead, without a word; "
            "use configs/accelerate/cpu_two_processes.yaml, or GPUs",
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(place, "FSDP 1 is asked for; set fsdp_version to 2 in accelerate's configuration")
    if os.environ.get("FSDP_STATE_DICT_TYPE") != "SHARDED_STATE_DICT":
        raise ConfigError(
            place,
            "checkpoints under FSDP need fsdp_state_dict_type: SHARDED_STATE_DICT in accelerate's configuration; the result is "
            "whole either way",
        )


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _reduced(values: list[float], operation: Any) -> list[float]:
    if ranks.world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(tensor, operation)
    return [float(value) for value in tensor]
