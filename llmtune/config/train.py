"""The sections `train`, `adapter` and `trainable`, which every trained stage has: how it is trained, and what of the model."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from llmtune.config import PathOrHub, Section, transformers_names
from llmtune.config import peft_methods as peft
from llmtune.errors import ConfigError


class EarlyStoppingConfig(Section):
    patience: PositiveInt = Field(3, description="evaluations without improvement")
    min_delta: float = Field(0.0, ge=0, description="nats per token that count as an improvement")


class RefusalWatchConfig(Section):
    """Measure while training whether the model still leans to refuse, and stop when it does so too much less."""

    suite: PathOrHub = Field(
        "harmful", description="a shipped suite by name or ./yours.yaml, that measures refusal_margin"
    )
    items: int = Field(24, ge=20, description="prompts of it, drawn by a fixed seed; fewer than 20 bound too little")
    every_steps: PositiveInt = Field(20, description="how often, beside before the first step and each checkpoint")
    max_drop: PositiveFloat = Field(2.0, description="nats; a mean drop beyond chance above this ends the run")


class TrainConfig(Section):
    epochs: PositiveFloat | None = None
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = Field(8, description="rows per optimizer step, over all processes")
    micro_batch_size: PositiveInt = Field(8, description="rows per forward pass of one process")
    learning_rate: PositiveFloat = 2e-4
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="each block learns at so many times the rate of the block above it"
    )
    lora_plus_ratio: float | None = Field(None, gt=1, description="LoRA+: B matrices learn so many times as fast as A")
    scheduler: str = Field("linear", description="a name of transformers' schedulers")
    scheduler_options: dict[str, Any] = Field(default_factory=dict, description="the schedule's own, such as min_lr")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    optimizer: str = Field("adamw_torch_fused", description="a name of transformers' optimizers")
    optimizer_options: dict[str, Any] = Field(default_factory=dict, description="the optimizer's own, such as betas")
    neftune_alpha: PositiveFloat | None = Field(None, description="NEFTune: noise on the embeddings while training")
    adapter_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="auto: the base's dtype, but float32 below a learning rate of 1e-4, which bfloat16 rounds away",
    )
    activation_checkpointing: bool = False
    group_by_length: bool = Field(True, description="batches of rows of like length: less padding")
    seed: int = Field(0, ge=0)
    log_steps: PositiveInt = 1
    eval_steps: PositiveInt | None = Field(None, description="validation every so many steps; None: ten times a run")
    early_stopping: EarlyStoppingConfig | None = None
    refusal_watch: RefusalWatchConfig | None = None

    @field_validator("optimizer", "scheduler")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        return transformers_names.known(str(info.field_name), name)

    @model_validator(mode="after")
    def _rules(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("train.epochs: set exactly one of 'epochs' and 'max_steps'")
        _require_divisible(self, 1)
        return self


def require_divisible(train: TrainConfig, processes: int, place: object) -> None:
    """Raise ConfigError where `processes` processes cannot share a batch evenly."""
    try:
        _require_divisible(train, processes)
    except ValueError as error:
        raise ConfigError(place, str(error)) from None


def _require_divisible(train: TrainConfig, processes: int) -> None:
    size, unit = train.batch_size, train.micro_batch_size * processes
    if size % unit:
        of = f"micro_batch_size ({train.micro_batch_size})" + (f" x {processes} processes" if processes > 1 else "")
        fits = [n for n in range(1, train.micro_batch_size) if size % (n * processes) == 0]
        smaller = f", or a micro_batch_size of {fits[-1]}" if fits else ""
        sizes = f"{size - size % unit} or {size - size % unit + unit}" if size > unit else str(unit)
        raise ValueError(f"train.batch_size: {size} is not a multiple of {of}; use {sizes}{smaller}")


class AdapterConfig(Section):
    """`method` is PEFT's name of the method; every other field is one of PEFT's own, verbatim."""

    model_config = ConfigDict(extra="allow")

    method: str

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        return peft.known_method(method)

    @model_validator(mode="after")
    def _fields(self) -> AdapterConfig:
        peft.check_fields(self.method, self.options)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """PEFT's own fields as the user wrote them."""
        return dict(self.model_extra or {})


class TrainableConfig(Section):
    """Which weights of the base are trained, all that is named together; every other one is frozen."""

    top_blocks: PositiveInt | None = Field(None, description="so many blocks, counted from the output")
    head: bool = Field(False, description="the language-model head; in a tied model that is the embeddings too")
    norms: bool = Field(False, description="every normalisation layer")
    embeddings: bool = Field(False, description="every embedding layer; in a tied model that is the head too")
    pattern: str | None = Field(None, description="a regular expression that is found in a parameter's name")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _something(self) -> TrainableConfig:
        if not any((self.top_blocks, self.head, self.norms, self.embeddings, self.pattern)):
            raise ValueError(
                "trainable: nothing is named in it, and nothing would be trained; set top_blocks, head, norms, embeddings "
                "or pattern, or remove the section to train every weight"
            )
        return self


class SecondPhaseConfig(Section):
    """After the run's own training: its weights, an adapter merged into them, of which these are trained on at a lower rate."""

    trainable: TrainableConfig
    learning_rate_factor: float = Field(
        0.1, gt=0, le=1, description="its learning rate, as a share of train.learning_rate"
    )
    epochs: PositiveFloat | None = Field(None, description="at most so many; exactly one of epochs and max_steps")
    max_steps: PositiveInt | None = Field(None, description="at most so many optimizer steps")
    patience: PositiveInt = Field(3, description="it ends after so many validations without improvement")

    @model_validator(mode="after")
    def _one_length(self) -> SecondPhaseConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("second_phase.epochs: set exactly one of 'epochs' and 'max_steps'")
        return self
