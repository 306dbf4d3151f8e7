"""What may stand in a run file of `llmtune sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmtune.config import LocalPath, Section, peft_methods
from llmtune.config.data import DataConfig
from llmtune.config.model import ModelSection
from llmtune.config.train import AdapterConfig, SecondPhaseConfig, TrainableConfig, TrainConfig


class SftConfig(Section):
    """One supervised fine-tuning run. With `adapter` its result is an adapter, without it a whole model.

    Without an adapter every weight is trained, or with `trainable` those that it names. With `second_phase` the result is a
    whole model.
    """

    stage: Literal["sft"]
    output_dir: LocalPath = Field(description="the run's folder")
    model: ModelSection
    data: DataConfig
    train: TrainConfig
    adapter: AdapterConfig | None = None
    trainable: TrainableConfig | None = Field(None, description="without an adapter: train these weights only")
    second_phase: SecondPhaseConfig | None = Field(
        None, description="then train these weights at a lower rate until validation stops improving"
    )
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _rules(self) -> SftConfig:
        if self.data.validation is None:
            for key in ("early_stopping", "eval_steps"):
                if getattr(self.train, key) is not None:
                    raise ValueError(f"train.{key}: needs data.validation, which is not set")
            if self.train.scheduler in ("reduce_lr_on_plateau", "greedy"):
                raise ValueError(f"train.scheduler: {self.train.scheduler} needs data.validation, which is not set")
        if self.adapter is None and self.train.lora_plus_ratio is not None:
            raise ValueError("train.lora_plus_ratio: has no effect without an adapter; remove it")
        if self.adapter is not None and self.trainable is not None:
            raise ValueError(
                "trainable: an adapter freezes every weight of the base, so the two exclude each other; remove one of them "
                "(adapter.modules_to_save trains whole modules beside an adapter)"
            )
        if self.adapter is None and "adapter_dtype" in self.train.model_fields_set:
            raise ValueError("train.adapter_dtype: has no effect without an adapter; remove it")
        if self.model.quantize is not None:
            if self.adapter is None:
                raise ValueError(
                    f"model.quantize: {self.model.quantize} weights cannot be trained, no gradient moves them; add an "
                    "'adapter' section, or remove model.quantize"
                )
            peft_methods.check_quantised(self.adapter.method, self.model.quantize)
        method = self.adapter.method if self.adapter is not None else ""
        if method in peft_methods.IN_THE_CACHE and self.train.activation_checkpointing:
            raise ValueError(
                f"train.activation_checkpointing: the tokens of {method} lie in the cache, which it does without; set it to false"
            )
        if self.train.adapter_dtype == "bfloat16" and self.model.dtype == "float32":
            raise ValueError("train.adapter_dtype: bfloat16 has no effect on a float32 base; remove it")
        if self.second_phase is not None:
            self._phases()
        if self.data.packing:
            self._packing()
        if self.data.columns is not None and "format" in self.data.model_fields_set:
            raise ValueError("data: set either 'format' or 'columns'")
        return self

    def _packing(self) -> None:
        if "group_by_length" in self.train.model_fields_set:
            raise ValueError("train.group_by_length: has no effect with data.packing; remove it")
        if self.adapter is not None and peft_methods.has_virtual_tokens(self.adapter.method):
            raise ValueError(
                f"data.packing: {self.adapter.method} puts tokens of its own before each row, and a packed row has no place for "
                "them; set packing to false, or choose another method"
            )
        if self.adapter is not None and self.adapter.options.get("alora_invocation_tokens"):
            raise ValueError(
                "data.packing: an activated LoRA begins at the last invocation of a sequence, so that only the last of its packed "
                "rows would be trained; set packing to false, or remove adapter.alora_invocation_tokens"
            )

    def _phases(self) -> None:
        if self.data.validation is None:
            raise ValueError("second_phase: needs data.validation, which is not set: it ends when that stops improving")
        if self.adapter is None and self.trainable is None:
            raise ValueError(
                "second_phase: the first phase trains every weight already; add an 'adapter' section, or 'trainable'"
            )
        if self.adapter is not None and peft_methods.has_virtual_tokens(self.adapter.method):
            raise ValueError(
                f"second_phase: a {self.adapter.method} adapter adds to the input and cannot be merged into the weights that "
                "the second phase trains; choose another method"
            )
        if self.model.quantize is not None:
            raise ValueError(
                "second_phase: the weights of a quantised base cannot be trained; merge the adapter ('llmtune merge'), and "
                "train what comes out in a run of its own"
            )

    @property
    def makes(self) -> Literal["adapter", "model"]:
        """What the run's result is, and the name of its folder."""
        return "adapter" if self.adapter is not None and self.second_phase is None else "model"

    def phases(self) -> list[SftConfig]:
        """The run's phases, each the config of a run of its own: one, or with `second_phase` two."""
        second = self.second_phase
        if second is None:
            return [self]
        raw = self.model_dump(exclude_unset=True, exclude={"second_phase"})
        after = {key: value for key, value in raw.items() if key not in {"adapter", "trainable"}}
        once = {"epochs", "max_steps", "early_stopping", "adapter_dtype", "lora_plus_ratio"}  # the first phase's own
        after["train"] = {key: value for key, value in raw["train"].items() if key not in once} | {
            "learning_rate": self.train.learning_rate * second.learning_rate_factor,
            "early_stopping": {"patience": second.patience},
            **second.model_dump(include={"epochs", "max_steps"}, exclude_unset=True),
        }
        after["trainable"] = second.trainable.model_dump(exclude_unset=True)
        return [SftConfig.model_validate(raw), SftConfig.model_validate(after)]
