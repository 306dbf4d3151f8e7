"""Building an adapter by PEFT's names, and attaching a finished one to its own base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from llmtune.artifact import Artifact
from llmtune.config.train import AdapterConfig
from llmtune.errors import ArtifactError, ConfigError
from llmtune.model.load import Source

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BF16_LEARNING_RATE = 1e-4
"""Below this, an update is often smaller than bfloat16's step (2^-8 of the weight) and is rounded away."""


def build_adapter(
    model: PreTrainedModel, adapter: AdapterConfig, dtype: str, learning_rate: float, seed: int
) -> PeftModel:
    """`model` with a new adapter, its weights drawn from `seed`.

    dtype: "auto" keeps the base's dtype, except float32 for learning rates below BF16_LEARNING_RATE. PEFT's own default,
    float32 adapters on a bfloat16 base, costs a third of the speed on a CPU.
    Raises ConfigError with PEFT's reason when the fields do not fit each other or the model.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    torch.manual_seed(seed)
    given = set(model.parameters())
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(adapter.method.upper())]
    keep = dtype == "bfloat16" or (dtype == "auto" and learning_rate >= BF16_LEARNING_RATE)
    keep = keep and model.dtype != torch.float16  # a checkpoint quantised on disk may be: no format to train in
    try:
        config = config_class(task_type="CAUSAL_LM", **adapter.options)
        before = _probe(model)
        made = peft.get_peft_model(model, config, autocast_adapter_dtype=not keep)
    except (TypeError, ValueError) as error:
        reason = str(error)
        if "arget modules" in reason:
            leaves = {
                name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
            }
            reason += f". Linear layers of this model: {', '.join(sorted(leaves))}, or 'all-linear'"
        raise ConfigError("adapter", reason) from None
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise ConfigError("adapter", "asks for a gradient of quantised weights (in modules_to_save, say)") from None
    if keep:
        _follow_base(made, given)
    with made.disable_adapter():
        if not torch.equal(before, _probe(made)):
            raise ConfigError(
                "adapter",
                "this initialisation changes the base's own weights, so that switching the adapter off no longer gives the base; set init_lora_weights to true",
            )
    return made


def attach(model: PreTrainedModel, base: Source, adapter: Artifact) -> PeftModel:
    """`model` with the finished adapter on it. Raises ArtifactError when the adapter was trained on another base."""
    from peft import PeftModel

    require_base(adapter, base)
    refuse_pickles(adapter.path)
    # what is evaluated and merged is what was trained: a bfloat16 adapter stays one, and so does a float32 one
    with safe_open(adapter.path / "adapter_model.safetensors", framework="pt") as tensors:
        wide = any(tensors.get_slice(name).get_dtype() == "F32" for name in tensors.keys())  # noqa: SIM118
    before = _probe(model)
    given = set(model.parameters())
    made = PeftModel.from_pretrained(model, adapter.path, autocast_adapter_dtype=wide).eval()
    if not wide:
        _follow_base(made, given)
    with made.disable_adapter():
        if not torch.equal(before, _probe(made)):
            raise ArtifactError(
                f"{adapter.path}: changes the base's own weights, so that it cannot be compared with its base"
            )
    return made


def _follow_base(made: PeftModel, given: set[torch.nn.Parameter]) -> None:
    """Give what PEFT added to the `given` weights the base's dtype where PEFT cannot: an 8-bit layer has none to tell."""
    if getattr(made.get_base_model(), "is_quantized", False):
        dtype = next(weight.dtype for weight in given if weight.is_floating_point())
        for weight in set(made.parameters()) - given:
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)


def _probe(model: Any) -> torch.Tensor:
    """Logits of a few fixed tokens, to tell whether two models are one."""
    ids = torch.arange(5, 13, device=model.device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
    model.train(training)
    return logits


def require_base(tuned: Artifact, base: Source) -> None:
    """Raises ArtifactError when `tuned` was trained on other weights or another tokenizer or chat template than `base` has."""
    trained_on = tuned.manifest["base"]
    if trained_on["words_sha256"] != base.words_sha256 and trained_on["sha256"] == base.sha256:
        raise ArtifactError(
            f"{base.folder}: its tokenizer or chat template was changed since {tuned.path} was trained on it"
        )
    if trained_on["sha256"] != base.sha256:
        raise ArtifactError(
            f"{tuned.path}: was trained on {trained_on['id']} (weights {trained_on['sha256'][:12]}), "
            f"and this base is {base.name} (weights {base.sha256[:12]}); use the base it was trained on"
        )


def refuse_pickles(folder: Path) -> None:
    pickled = [file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    if pickled:
        raise ArtifactError(f"{folder / pickled[0]}: pickled weights can run code when read; safetensors are needed")
