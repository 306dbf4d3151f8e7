"""LoRA's initialisations that need more than PEFT's constructor: rows to look at, or a part of the base's own weights.

PiSSA, OLoRA and CorDA take the first A0 and B0 out of a weight W and train what is left: W - B0 A0 + B A. What is stored is
a plain LoRA of twice the rank for the base as it was, since that weight is also W + [B, -B0] [A; A0].
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmtune.errors import ConfigError

TAKES_FROM_THE_BASE = ("pissa", "olora", "corda")
LOOKED_AT = 256
"""Rows that a data-driven initialisation sees at most: the first ones of the run."""


def kind(config: Any) -> str:
    """The initialisation's name where it is one of words, else ""."""
    start = getattr(config, "init_lora_weights", None)
    return start.split("_niter_")[0] if isinstance(start, str) else ""


def before(model: Any, config: Any, rows: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What has to be done before there is an adapter. Raises ConfigError for what a run here cannot do.

    Where a part is to be taken out of the base's weights, returns what each of them gives now, for `after` to compare with.
    """
    start = kind(config)
    if start == "lora_ga":
        raise ConfigError(
            "adapter.init_lora_weights", "lora_ga needs gradients of the whole base before training; use pissa or eva"
        )
    if start in TAKES_FROM_THE_BASE and getattr(model, "is_quantized", False):
        raise ConfigError(
            "adapter.init_lora_weights",
            f"{start} rewrites the base's weights, and this base is quantised; set it to true",
        )
    if start == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        def look() -> None:
            with torch.no_grad():
                for row in _batches(model, rows):
                    model(**row)

        if config.target_modules == "all-linear":  # which PEFT spells out only later
            head, linear = model.get_output_embeddings(), torch.nn.Linear
            found = {name for name, part in model.named_modules() if isinstance(part, linear) and part is not head}
            config.target_modules = found
        preprocess_corda(model, config, run_model=look)
    if start not in TAKES_FROM_THE_BASE:
        return {}
    return {name: _image(part.weight) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}


def after(made: Any, rows: Iterable[dict[str, Any]], images: dict[str, torch.Tensor], *, loftq: bool) -> None:
    """What has to be done once the adapter is there: EVA's directions, what NF4 lost, a note of what was taken out of the base.

    Raises ConfigError where what was taken out and what is left do not add up to the weight, rounding aside.
    """
    from peft import get_peft_model_state_dict, initialize_lora_eva_weights, replace_lora_weights_loftq

    config = made.active_peft_config
    if loftq:
        if not getattr(made.get_base_model(), "is_loaded_in_4bit", False):
            raise ConfigError(
                "adapter.init_lora_weights", "loftq makes up for what NF4 loses of the base; set model.quantize to nf4"
            )
        if made.device.type != "cuda":
            raise ConfigError("adapter.init_lora_weights", "PEFT computes loftq on an NVIDIA GPU only; set it to true")
        replace_lora_weights_loftq(made, str(Path(made.get_base_model().name_or_path) / "model.safetensors"))
    if kind(config) == "eva":
        batches = list(_batches(made, rows))
        initialize_lora_eva_weights(made, batches, gather_distributed_inputs=False, show_progress_bar=False)
    if kind(config) in TAKES_FROM_THE_BASE:
        taken = get_peft_model_state_dict(made)
        made.taken_out = {name: t.detach().clone() for name, t in taken.items() if _factor(name)}
        _require_whole(made.get_base_model(), images)


def _require_whole(model: Any, images: dict[str, torch.Tensor]) -> None:
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            parts = _image(weight) + _image(layer.get_delta_weight("default"))
            error = float((parts - images[name]).norm() / images[name].norm())
            # a number rounded to bfloat16 is off by 2^-9 at most, and both factors and the rest are rounded
            if error > max(2 * torch.finfo(weight.dtype).eps, 1e-5):
                raise ConfigError(
                    "adapter", f"what this initialisation takes out of {name} and the rest do not add up to it"
                )


def _image(weight: torch.Tensor) -> torch.Tensor:
    """What a matrix makes of one fixed vector of signs, in float32: as long as its outputs, and another for another matrix."""
    signs = torch.randint(0, 2, (weight.shape[1],), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return weight.detach().float() @ signs.to(weight.device)


def takes_from_the_base(made: Any) -> bool:
    return bool(vars(made).get("taken_out"))


def save(made: Any, folder: Path) -> None:
    """Write the adapter as PEFT does; one that was taken out of the base as a plain LoRA for the base as it was."""
    if not takes_from_the_base(made):
        made.save_pretrained(str(folder), safe_serialization=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored(made), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _twice_the_rank(made.active_peft_config).save_pretrained(str(folder))


def stored(made: Any) -> dict[str, torch.Tensor]:
    """The tensors of the adapter as `save` writes them, by PEFT's names."""
    from peft import get_peft_model_state_dict

    tensors = {}
    for name, tensor in get_peft_model_state_dict(made).items():
        first = made.taken_out.get(name) if takes_from_the_base(made) else None
        if first is not None:
            rows = _factor(name) == "A"
            tensor = torch.cat([tensor, first if rows else -first], dim=0 if rows else 1)
        tensors[name] = tensor.detach().contiguous()
    return tensors


def _twice_the_rank(config: Any) -> Any:
    """The config of the same adapter as a plain LoRA: every rank twice, every scaling (alpha / r, or alpha / sqrt(r)) as it was."""
    made = copy.deepcopy(config)
    more = 2**0.5 if made.use_rslora else 2
    made.init_lora_weights, made.corda_config, made.inference_mode = True, None, True
    made.r, made.lora_alpha = 2 * made.r, more * made.lora_alpha
    made.rank_pattern = {key: 2 * rank for key, rank in made.rank_pattern.items()}
    made.alpha_pattern = {key: more * alpha for key, alpha in made.alpha_pattern.items()}
    return made


def _factor(name: str) -> str:
    """ "A" or "B" for LoRA's two factors, else ""."""
    return next((letter for letter in "AB" if f"lora_{letter}" in name or f"lora_embedding_{letter}" in name), "")


def _batches(model: Any, rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, torch.Tensor]]:
    """The first rows, one a forward pass, as CorDA wants them."""
    found = 0
    for _, row in zip(range(LOOKED_AT), rows, strict=False):
        ids = torch.tensor([list(row["input_ids"])], device=model.device)
        found += 1
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not found:
        raise ConfigError("adapter.init_lora_weights", "looks at training rows, and none were given")


def require_invocation(config: Any, rows: Iterable[dict[str, Any]]) -> None:
    """An activated LoRA acts from its invocation on: raises ConfigError for rows that do not hold it, which would train nothing."""
    tokens = getattr(config, "alora_invocation_tokens", None)
    if not tokens:
        return
    without = total = 0
    for row in rows:
        ids = list(row["input_ids"])
        total += 1
        without += not any(ids[n : n + len(tokens)] == tokens for n in range(len(ids) - len(tokens) + 1))
    if without:
        raise ConfigError(
            "adapter.alora_invocation_tokens",
            f"{without} of {total} training rows do not hold these tokens, so that nothing of them is trained; take the ids "
            "that begin an answer in your chat template",
        )
