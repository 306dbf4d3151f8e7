"""TRL's SFTTrainer with three corrections, each for a measured reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from llmtune.errors import LlmtuneError
from llmtune.model.infer import supervised_logits


class SupervisedTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """Takes the loss on supervised positions only, and restores adapters in the dtype they were saved in.

    Without Triton (any CPU) TRL 1.16 runs the language-model head on every position; here it runs where a label stands. On a
    GPU TRL's fused kernel does that already and is used. And `PeftModel.load_adapter`, by which transformers resumes and takes
    the best checkpoint back, turns bfloat16 adapters into float32 ones: another trajectory, another speed. TRL's telemetry is off.
    """

    seen_tokens = 0
    """Tokens trained on so far in this process, padding not counted."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        assert not return_outputs, "validation asks for the loss only"
        if self.model.training:
            self.seen_tokens += int(inputs["attention_mask"].sum())
        if self.accelerator.device.type == "cuda":
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)  # type: ignore[no-any-return]
        labels = inputs["labels"]
        logits, targets = supervised_logits(model, {k: v for k, v in inputs.items() if k != "labels"}, labels)
        total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        loss = total / (targets.numel() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is of every rank, and DDP averages
        return loss

    def _send_telemetry(self) -> None:
        """No run of ours reports anything to anyone."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _restore_adapter(model or self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not _restore_adapter(self.model, Path(self.state.best_model_checkpoint)):
            super()._load_best_model()


def _restore_adapter(model: Any, checkpoint: Path) -> bool:
    """Copy a checkpoint's adapter weights into `model` in place; False when `model` carries no adapter."""
    if not hasattr(model, "peft_config"):
        return False
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    if result.unexpected_keys:
        raise LlmtuneError(f"{checkpoint}: holds weights this adapter does not have: {result.unexpected_keys[:3]}")
    return True
