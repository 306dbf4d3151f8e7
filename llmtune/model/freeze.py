"""Training a part of a base: which of its weights are meant, the others frozen, and the whole model written at the end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from llmtune.config.train import TrainableConfig
from llmtune.errors import ConfigError
from llmtune.model import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks(model: Any) -> tuple[str, int]:
    """Name and length of the list that holds the model's blocks, such as ("model.layers", 30).

    It is the longest list of modules that lies in no other one: the experts of a block are a list, too.
    Raises ConfigError for a model that has none.
    """
    lists = {name: len(part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    outer = {name: size for name, size in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise ConfigError(
            "model", "it holds no list of blocks, so trainable.top_blocks and train.layer_decay mean nothing in it"
        )
    return max(outer.items(), key=lambda item: item[1])


def freeze(model: PreTrainedModel, chosen: TrainableConfig, dtype: str) -> None:
    """Leave only what `chosen` names trainable, in float32; the other matrices become `dtype`.

    Frozen vectors (norms, biases) stay float32: they weigh nothing, and torch's LayerNorm wants its weights as wide as its
    input. Raises ConfigError, naming what there is, for what the model does not have.
    """
    names = select(model, chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names and parameter.ndim > 1:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def select(model: PreTrainedModel, chosen: TrainableConfig) -> set[str]:
    """Names of the parameters that `chosen` names, each by its first name where it is tied. Raises ConfigError."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, set[str]] = {}
    if chosen.top_blocks is not None:
        where, number = blocks(model)
        if chosen.top_blocks > number:
            raise ConfigError(
                "trainable", f"top_blocks: {chosen.top_blocks} is more than the {number} blocks of {where}"
            )
        top = tuple(f"{where}.{number - 1 - depth}." for depth in range(chosen.top_blocks))
        found["top_blocks"] = {first_name for name, first_name in names.items() if name.startswith(top)}
    parts = dict(model.named_modules())
    if chosen.head:
        found["head"] = _of([model.get_output_embeddings()], first)
    if chosen.embeddings:
        found["embeddings"] = _of([part for part in parts.values() if isinstance(part, torch.nn.Embedding)], first)
    if chosen.norms:
        found["norms"] = _of([part for part in parts.values() if "norm" in type(part).__name__.lower()], first)
    for key, its in found.items():
        if not its:
            raise ConfigError("trainable", f"{key}: the model has none with weights; remove it")
    tied(model, chosen)
    if chosen.pattern is not None:
        found["pattern"] = _matching(chosen.pattern, names, set().union(*found.values()))
    return set().union(*found.values())


def _of(parts: list[Any], first: dict[int, str]) -> set[str]:
    return {first[id(parameter)] for part in parts if part is not None for parameter in part.parameters()}


def tied(model: PreTrainedModel, chosen: TrainableConfig) -> str | None:
    """What is trained besides what `chosen` says, in a sentence: in a tied model the head's matrix is the embeddings'.

    Raises ConfigError where one is chosen and the other ruled out.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight or chosen.head == chosen.embeddings:
        return None
    one, other = ("head", "embeddings") if chosen.head else ("embeddings", "head")
    if other in chosen.model_fields_set:
        raise ConfigError(
            "trainable",
            f"{one}: true with {other}: false contradict each other: in this model both are one matrix "
            "(tie_word_embeddings); set both or neither",
        )
    return f"trainable.{one}: in this model head and embeddings are one matrix, so the {other} are trained with it"


def _matching(pattern: str, names: dict[str, str], already: set[str]) -> set[str]:
    matched = {first for name, first in names.items() if re.search(pattern, name)}
    if not matched:
        candidates = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})
        raise ConfigError(
            "trainable", f"pattern: {pattern!r} is found in no parameter's name; there are: {', '.join(candidates)}"
        )
    if matched <= already:
        raise ConfigError(
            "trainable", f"pattern: {pattern!r} adds nothing to what the other keys of the section name; remove it"
        )
    return matched


def trained(model: Any) -> list[str]:
    """Names of the parameters that are trained, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def whole(model: PreTrainedModel, base: load.Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """`model` in one dtype, float32: what was trained of it, and the rest as `base` has it, not as it was rounded to train."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    fresh = load.load_model(base, "float32", "cpu", trust_remote_code=trust_remote_code)
    for name in trained(model):
        fresh.get_parameter(name).data.copy_(model.get_parameter(name).data)
    fresh.config, fresh.generation_config = model.config, model.generation_config
    return fresh
