"""What was just written is what was trained: every tensor there, whole, finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtune.errors import LlmtuneError
from llmtune.model import adapters, initialisations


def require_whole(folder: Path, model: Any) -> None:
    """Raise LlmtuneError unless the safetensors files in `folder` hold the weights of `model`: its adapter, or all of it.

    No tensor may be empty, as those of a model that is spread over processes are (but where AdaLoRA pruned all of it), each
    number is finite, and there are as many as there should be. An adapter has each tensor by its name, with its shape, so that
    PEFT loads it; a whole model may be stored under other names than it has in memory, and what shares its memory with another
    tensor, as a tied head does, once.
    """
    adapter = hasattr(model, "peft_config")
    expected, found, wrong = _expected(model), dict[str, tuple[int, ...]](), []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                    tensor = tensors.get_tensor(name)
                    found[name] = tuple(tensor.shape)
                    if not tensor.numel() and (name not in expected or expected[name].numel()):
                        wrong.append(f"{name} is empty")
                    elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        wrong.append(f"{name} holds numbers that are not finite")
        except SafetensorError as error:
            wrong.append(f"{file.name} cannot be read: {error}")
    if adapter:
        wrong += [f"{name} is missing" for name in expected.keys() - found.keys()]
        wrong += [f"{name} is none of the adapter's" for name in found.keys() - expected.keys()]
        shapes = {name: tuple(weight.shape) for name, weight in expected.items()}
        wrong += [
            f"{name} has shape {found[name]} instead of {shapes[name]}"
            for name in found.keys() & shapes.keys()
            if found[name] != shapes[name]
        ]
    else:
        once = {weight.data_ptr(): weight.numel() for weight in expected.values()}
        numbers = sum(torch.Size(shape).numel() for shape in found.values())
        if numbers != sum(once.values()):
            wrong.append(f"{numbers:,} numbers instead of {sum(once.values()):,}")
    if wrong:
        raise LlmtuneError(f"the weights that were written are not those that were trained: {'; '.join(wrong[:5])}")


def _expected(model: Any) -> dict[str, torch.Tensor]:
    if not hasattr(model, "peft_config"):
        return dict(model.state_dict())
    with adapters.peft_warnings():
        return initialisations.stored(model)
