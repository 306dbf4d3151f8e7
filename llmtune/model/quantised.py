"""Quantised bases: weights that are quantised as they are loaded (`model.quantize`), or that lie quantised on disk.

They are never trained themselves: an adapter on top of them is. bitsandbytes does the arithmetic, on a CPU as on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config import peft_methods
from llmtune.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from llmtune.model.load import Source

EXTRA = "pip install 'llmtune[quantised]'"


def on_disk(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint whose weights are quantised already, as its config.json states it."""
    file = folder / "config.json"
    try:
        stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return None  # transformers names what is wrong with it
    found = stated.get("quantization_config") if isinstance(stated, dict) else None
    return found if isinstance(found, dict) else None


def kind_on_disk(folder: Path) -> str | None:
    """How those weights are quantised, in a word: nf4, fp4 or int8 for bitsandbytes, else transformers' name (gptq, awq, ...)."""
    stated = on_disk(folder)
    if stated is None:
        return None
    method = str(stated.get("quant_method", "unknown"))
    if method != "bitsandbytes":
        return method
    return "int8" if stated.get("load_in_8bit") else str(stated.get("bnb_4bit_quant_type", "fp4"))


def require_trainable(base: Source, device: str, method: str | None, place: object) -> None:
    """Raise ConfigError, before weights are loaded, where `method` (None: no adapter) cannot be trained on `base`."""
    require_loadable(base, device, place)
    if base.quantised and method is None:
        raise ConfigError(
            place,
            f"model: {base.name} is quantised ({base.quantised}), and a quantised weight cannot be trained: no gradient moves "
            "it; add an 'adapter' section, or take the model in full precision",
        )
    if base.quantised in {"nf4", "fp4", "int8"} and method is not None:
        try:
            peft_methods.check_quantised(method, base.quantised)
        except ValueError as error:
            raise ConfigError(place, str(error)) from None


def require_loadable(base: Source, device: str, place: object = "base") -> None:
    """Raise ConfigError naming the package that is missing, or MachineError for the hardware; cheap: no weight is read."""
    stated = on_disk(base.folder)
    if base.quantize and stated:
        raise ConfigError(
            place, f"model.quantize: {base.name} is quantised already ({base.quantised}); remove model.quantize"
        )
    if base.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(place, f"model.quantize: bitsandbytes is not installed; {EXTRA}")
    if stated:
        from transformers.quantizers.auto import AutoHfQuantizer

        try:
            quantiser = AutoHfQuantizer.from_config(dict(stated), pre_quantized=True)
            quantiser.validate_environment(device_map={"": device})
        except (ImportError, ValueError) as error:
            why = f"{base.name} is quantised ({base.quantised}): {' '.join(str(error).split())}"
            raise ConfigError(place, f"model: {why}") from None
        except RuntimeError as error:
            raise MachineError(f"model: {base.name} is quantised ({base.quantised}): {error}") from None


def works_here() -> str:
    """The values that `model.quantize` can take on this machine, in words."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"none; {EXTRA}"
    import torch
    from transformers.integrations import validate_bnb_backend_availability

    if not validate_bnb_backend_availability():
        return "none: bitsandbytes has no kernels for this machine"
    return f"nf4, int8 (bitsandbytes, on {'a GPU' if torch.cuda.is_available() else 'the CPU, slowly'})"


def settings(quantize: str, dtype: Any) -> BitsAndBytesConfig:
    """What transformers gives to bitsandbytes. nf4 is that of QLoRA: 4 bits with doubly quantised scales; dtype: of its arithmetic."""
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def settled(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with 4-bit layers that keep one layout and one arithmetic, whether it trains or answers.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 lays the 4-bit weights out anew, in place, on the first pass in eval mode, and
    from then on computes them by a kernel that has no backward: after one validation the gradient no longer passes the layer
    (its norm fell to a sixth on a tiny model), dequantising gives garbage, and float32 is computed in bfloat16. The layer asks
    this flag before it does so. Can go when that kernel has a backward and `dequantize_4bit` knows the layout.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def dequantised(model: PreTrainedModel, dtype: Any) -> PreTrainedModel:
    """`model` with each quantised weight written out in `dtype`: what the quantised base says, as plain layers. In place.

    Raises ConfigError for a kind of quantisation that transformers cannot write out.
    """
    came_so = model.hf_quantizer.pre_quantized
    try:
        plain: PreTrainedModel = model.dequantize(dtype=dtype)
    except NotImplementedError:
        kind = model.config.quantization_config.quant_method
        raise ConfigError(
            "model",
            f"transformers cannot dequantise {kind} weights, so nothing can be merged into them; serve the adapter on its base",
        ) from None
    if (
        came_so
    ):  # transformers 5.23 would undo on saving what it did on reading, and unpacking 4 bits has no inverse there
        plain._weight_conversions = None
    for weight in plain.parameters():  # and not buffers: rotary frequencies stay float32, as in every loaded model
        weight.data = weight.data.to(dtype)
    return plain
