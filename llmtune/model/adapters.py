"""Building an adapter by PEFT's names, and attaching a finished one to its own base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtune.artifact import Artifact
from llmtune.config.sft import AdapterConfig
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
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(adapter.method.upper())]
    keep = dtype == "bfloat16" or (dtype == "auto" and learning_rate >= BF16_LEARNING_RATE)
    try:
        config = config_class(task_type="CAUSAL_LM", **adapter.options)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=not keep)
    except (TypeError, ValueError) as error:
        reason = str(error)
        if "arget modules" in reason:
            leaves = {
                name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
            }
            reason += f". Linear layers of this model: {', '.join(sorted(leaves))}, or 'all-linear'"
        raise ConfigError("adapter", reason) from None


def attach(model: PreTrainedModel, base: Source, adapter: Artifact) -> PeftModel:
    """`model` with the finished adapter on it. Raises ArtifactError when the adapter was trained on another base."""
    from peft import PeftModel

    require_base(adapter, base)
    refuse_pickles(adapter.path)
    # bfloat16 adapters stay bfloat16: what is evaluated and merged is what was trained
    return PeftModel.from_pretrained(model, adapter.path, autocast_adapter_dtype=False).eval()


def require_base(tuned: Artifact, base: Source) -> None:
    """Raises ArtifactError when `tuned` was trained on other weights than `base` has."""
    trained_on = tuned.manifest["base"]
    if trained_on["sha256"] != base.sha256:
        raise ArtifactError(
            f"{tuned.path}: was trained on {trained_on['id']} (weights {trained_on['sha256'][:12]}), "
            f"and this base is {base.name} (weights {base.sha256[:12]}); use the base it was trained on"
        )


def refuse_pickles(folder: Path) -> None:
    pickled = [file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    if pickled:
        raise ArtifactError(f"{folder / pickled[0]}: pickled weights can run code when read; safetensors are needed")
