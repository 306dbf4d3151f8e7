"""Optimizer and schedule by transformers' names, tried before weights load; and each trained weight at its own rate."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from llmtune.config import Recorded
from llmtune.config.train import TrainConfig
from llmtune.errors import ConfigError, did_you_mean
from llmtune.model import freeze

ELSEWHERE = {  # arguments of optimizers and schedules that other settings decide
    **dict.fromkeys(["params", "model", "optimizer", "last_epoch", "num_training_steps"], "the run"),
    **dict.fromkeys(["fused", "optim_bits", "is_paged", "foreach"], "the name in train.optimizer"),
    "lr": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "warmup_steps": "train.warmup_steps",
    "num_warmup_steps": "train.warmup_steps",
}
UPSTREAM = (ImportError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, AssertionError)
"""What optimizers and schedules raise for words that they do not take."""


@dataclass(frozen=True)
class Rates:
    """The optimizer's own options, and what a weight's place in the model makes of the learning rate."""

    options: dict[str, Any] = field(default_factory=dict)
    layer_decay: float | None = None
    lora_plus_ratio: float | None = None


def check(train: TrainConfig, device: str, place: object) -> float:
    """Take one step of the run's optimizer and schedule on one small matrix: milliseconds, before any weight is loaded.

    Returns the bytes that the optimizer keeps for a trained float32 weight (8 for AdamW).
    Raises ConfigError, with what to install or to write, for what is missing here and for settings without effect.
    """
    name, options = train.optimizer, dict(train.optimizer_options)
    if name.startswith("paged_") and device == "cpu":
        plain = {"adamw_32bit": "adamw_torch_fused", "ademamix_32bit": "ademamix"}
        other = plain.get(name.removeprefix("paged_"), name.removeprefix("paged_"))
        raise ConfigError(
            place,
            f"train.optimizer: {name} moves pages between a GPU and the computer, and there is no GPU; use {other}",
        )
    forgets = ConfigError(
        place,
        f"train.optimizer: {name} does not save all of its state, so a run that is interrupted would not go on as it was; "
        "use another",
    )
    if name.startswith(("galore", "apollo")):
        raise forgets  # their projections: tried with galore-torch 1.0 and apollo-torch 1.0.3
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, device=device))
    defaults = {one.name: one.default for one in dataclasses.fields(TrainingArguments)}
    words = {"optim": name, "learning_rate": train.learning_rate, "weight_decay": train.weight_decay}
    args = SimpleNamespace(**defaults | words | {"warmup_steps": train.warmup_steps, "parallel_mode": None})
    _check_options(args, model, options, place)
    given = chosen(args, model, options, place)[1]
    try:
        made = _stepped(args, model, options, place)
        same = _same_after_reading(made, args, model, options, place)
    except UPSTREAM as error:
        raise _explained("train.optimizer", name, error, place) from None
    if not same:
        raise forgets
    _check_schedule(train, made, "warmup_steps" in given, place)
    kept = [value for state in made.state.values() for value in state.values() if torch.is_tensor(value)]
    weights = sum(weight.numel() for weight in model.parameters())
    return float(sum(value.numel() * value.element_size() for value in kept if value.numel() > 1) / weights)


def _stepped(args: Any, model: torch.nn.Module, options: dict[str, Any], place: object, state: Any = None) -> Any:
    """An optimizer of `model` after one step, from `state` where it is given."""
    kind, given = chosen(args, model, options, place)
    made = kind(model.parameters(), **given)
    if callable(getattr(made, "train", None)):
        made.train()  # schedule-free optimizers have two states
    if state is not None:
        made.load_state_dict(state)
    _step(made, model)
    return made


def _step(made: Any, model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.linspace(-1, 1, parameter.numel(), device=parameter.device).reshape(parameter.shape)
    made.step()


def _same_after_reading(made: Any, args: Any, model: torch.nn.Module, options: dict[str, Any], place: object) -> bool:
    """Whether the optimizer's next step is the same after its state was written and read as a checkpoint's is."""
    other, file = copy.deepcopy(model), io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    try:
        _stepped(args, other, options, place, torch.load(file, weights_only=True))
    except pickle.UnpicklingError:
        return False  # an object that no checkpoint may hold, since reading one can run code
    _step(made, model)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(
        torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True) for one, two in pairs
    )  # a rate may be absurd


def rates(train: Recorded, model: Any, place: object) -> Rates:
    """The run's rates. Raises ConfigError where one of them, or the noise on the embeddings, has no effect on `model`."""
    made = Rates(dict(train.optimizer_options), train.layer_decay, train.lora_plus_ratio)
    groups(model, set(), 1.0, 0.0, made)
    if train.neftune_alpha is not None:
        try:
            deactivate_neftune(model, activate_neftune(model, train.neftune_alpha))
        except AttributeError:
            reason = "transformers finds no embeddings to add noise to in this model under this adapter; remove it"
            raise ConfigError(place, f"train.neftune_alpha: {reason}") from None
    return made


def chosen(args: Any, model: torch.nn.Module, options: dict[str, Any], place: object) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and keyword arguments: transformers' own for `args.optim`, with the run's options in them.

    Raises ConfigError where the optimizer cannot be had.
    """
    try:
        kind, words = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except UPSTREAM as error:
        raise _explained("train.optimizer", args.optim, error, place) from None
    if "model" in words or "optimizer_dict" in words:
        raise ConfigError(
            place,
            f"train.optimizer: {args.optim} steps inside the backward pass, before gradients are summed over micro batches "
            "and clipped to train.max_grad_norm; use one without 'lomo' and '_layerwise' in its name",
        )
    return kind, words | options


def _check_options(args: Any, model: torch.nn.Module, options: dict[str, Any], place: object) -> None:
    """Raise ConfigError for an option that the optimizer does not read."""
    kind = chosen(args, model, {}, place)[0]
    for key in options:
        if key in ELSEWHERE:
            raise ConfigError(place, f"train.optimizer_options.{key}: is decided by {ELSEWHERE[key]}; remove it")
        if key not in _arguments(kind):
            hint = did_you_mean(key, _arguments(kind))
            raise ConfigError(place, f"train.optimizer_options.{key}: is no option of {args.optim}{hint}")


def _check_schedule(train: TrainConfig, optimizer: Any, own_warmup: bool, place: object) -> None:
    """Raise ConfigError for schedule options that are missing, unknown or without effect, and for a warmup without one."""
    name, options = train.scheduler, train.scheduler_options
    if train.optimizer.startswith("schedule_free") and name != "constant":
        raise ConfigError(
            place, f"train.scheduler: {train.optimizer} has its own schedule, and {name} would bend it; set constant"
        )
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters
    open_ended = "kwargs" in parameters
    for key in options:
        if key in ELSEWHERE:
            raise ConfigError(place, f"train.scheduler_options.{key}: is decided by {ELSEWHERE[key]}; remove it")
        if not open_ended and key not in parameters:
            known = parameters.keys() - ELSEWHERE.keys()
            hint = did_you_mean(key, known) if known else ", which has none"
            raise ConfigError(place, f"train.scheduler_options.{key}: is no option of {name}{hint}")
    if train.warmup_steps and "num_warmup_steps" not in parameters and not own_warmup:
        instead = " (constant_with_warmup has one)" if name == "constant" else ""
        raise ConfigError(
            place, f"train.warmup_steps: has no effect with {name}, which has no warmup{instead}; remove it"
        )
    try:
        words = (train.warmup_steps, train.max_steps or 1000, dict(options))
        made = get_scheduler(name, optimizer, *words)
        optimizer.step()
        made.step(*([1.0] if open_ended else []))
    except UPSTREAM as error:
        raise _explained("train.scheduler", name, error, place) from None
    check_floor(made, optimizer, place)


def check_floor(schedule: Any, optimizer: Any, place: object) -> None:
    """Raise ConfigError for a schedule that would lift a rate to its own least one: it never goes below `min_lr`."""
    for group, least in zip(optimizer.param_groups, getattr(schedule, "min_lrs", []), strict=False):
        if least >= (rate := group.get("initial_lr", group["lr"])):
            raise ConfigError(
                place,
                f"train.scheduler_options: the schedule's min_lr ({least:g}) is not below the learning rate ({rate:g}), which "
                "it would raise; set min_lr in it to a lower one",
            )


def _arguments(kind: Any) -> set[str]:
    return inspect.signature(kind).parameters.keys() - ELSEWHERE.keys()


def _explained(key: str, name: str, error: BaseException, place: object) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(place, f"{key}: {name} cannot be used here: {reason}")


def groups(
    model: Any, decaying: set[str], learning_rate: float, weight_decay: float, rates: Rates
) -> list[dict[str, Any]]:
    """The trained weights as an optimizer's parameter groups, one a rate, that with `learning_rate` first.

    The top block and all that lies above the blocks learn at `learning_rate`, every block below at `layer_decay` times the
    rate of the one above it, and what lies below the blocks (the embeddings) once more below the lowest. LoRA's B matrices,
    and as in PEFT's own LoRA+ every vector, learn `lora_plus_ratio` times as fast. Weight decay applies to `decaying` names.
    Raises ConfigError where a rate would have no effect.
    """
    depths = _depths(model) if rates.layer_decay is not None else {}
    found: dict[tuple[float, bool], list[Any]] = {}
    widened = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = (rates.layer_decay or 1.0) ** depths.get(name, 0)
            if rates.lora_plus_ratio is not None and ("lora_B" in name or parameter.ndim == 1):
                widened, share = widened or "lora_B" in name, share * rates.lora_plus_ratio
            found.setdefault((share, name in decaying), []).append(parameter)
    if rates.lora_plus_ratio is not None and not widened:
        raise ConfigError("train", "lora_plus_ratio: what is trained has no lora_B, as LoRA has; remove it")
    if rates.layer_decay not in (None, 1.0) and len({depths[name] for name in freeze.trained(model)}) == 1:
        raise ConfigError("train", "layer_decay: has no effect, all that is trained lies in one block; remove it")
    return [
        {"params": found[key], "lr": learning_rate * key[0], "weight_decay": weight_decay if key[1] else 0.0}
        for key in sorted(found, key=lambda key: (key[0] != 1.0, -key[0], not key[1]))
    ]


def _depths(model: Any) -> dict[str, int]:
    """How many blocks lie above each parameter; what the model has before its blocks lies below all of them."""
    where, number = freeze.blocks(model)
    found, below = {}, True
    for name, _ in model.named_parameters():
        if name.startswith(f"{where}."):
            below = False
            found[name] = number - 1 - int(name.removeprefix(f"{where}.").partition(".")[0])
        else:
            found[name] = number if below else 0
    return found
