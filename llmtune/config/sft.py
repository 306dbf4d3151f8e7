"""What may stand in a run file of `llmtune sft`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtune.config import LocalPath, PathOrHub, Section
from llmtune.config import peft_methods as peft


class ModelConfig(Section):
    """The base model: `org/name@revision`, `./folder`, `./file.gguf` or `package:PKG/file.gguf`."""

    name: PathOrHub
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the hardware has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class ColumnMap(Section):
    """How rows of your own shape become chats; the shipped ones are in data_templates/."""

    conversation: str | None = Field(None, description="column that holds the list of turns")
    role: str = Field("role", description="key of a turn's speaker")
    content: str = Field("content", description="key of a turn's text")
    roles: dict[str, Literal["system", "user", "assistant"]] = Field(
        default_factory=dict, description="speaker -> role"
    )
    system: str | None = Field(None, description="column of the system prompt")
    user: list[str] = Field(default_factory=list, description="columns joined by a blank line into the user's turn")
    assistant: str | None = Field(None, description="column of the answer")

    @model_validator(mode="after")
    def _one_shape(self) -> ColumnMap:
        if (self.conversation is None) == (not self.user or self.assistant is None):
            raise ValueError("a column map has either 'conversation', or 'user' and 'assistant'")
        return self


class DataConfig(Section):
    """Rows to learn from: JSON, JSONL, CSV, Parquet, or a hub id `org/name@revision:split`."""

    train: PathOrHub | list[PathOrHub]
    validation: PathOrHub | list[PathOrHub] | None = None
    format: str = Field(
        "auto", description="auto, or a file of data_templates/: messages, sharegpt, alpaca, prompt_completion"
    )
    columns: ColumnMap | None = Field(None, description="instead of format, for rows of your own shape")
    max_length: PositiveInt = Field(1024, description="tokens")
    overlong: Literal["error", "truncate", "drop"] = Field("error", description="rows longer than max_length")


class EarlyStoppingConfig(Section):
    patience: PositiveInt = Field(3, description="evaluations without improvement")
    min_delta: float = Field(0.0, ge=0, description="nats per token that count as an improvement")


class TrainConfig(Section):
    epochs: PositiveFloat | None = None
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = Field(8, description="rows per optimizer step, over all processes")
    micro_batch_size: PositiveInt = Field(8, description="rows per forward pass of one process")
    learning_rate: PositiveFloat = 2e-4
    scheduler: str = Field("linear", description="a name of transformers' schedulers")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    optimizer: str = Field("adamw_torch_fused", description="a name of transformers' optimizers")
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

    @model_validator(mode="after")
    def _rules(self) -> TrainConfig:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("train.epochs: set exactly one of 'epochs' and 'max_steps'")
        if self.batch_size % self.micro_batch_size:
            size, micro = self.batch_size, self.micro_batch_size
            below, above = size - size % micro, size + micro - size % micro
            fix = f"{below} or {above}" if below else f"{above}, or a micro_batch_size that divides {size}"
            raise ValueError(f"train.batch_size: {size} is not a multiple of micro_batch_size ({micro}); use {fix}")
        return self


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


def _short(value: Any) -> Any:
    """`model: NAME` is short for `model: {name: NAME}`."""
    return {"name": value} if isinstance(value, str) else value


class SftConfig(Section):
    """One supervised fine-tuning run. With `adapter` its result is an adapter, without it a whole model."""

    stage: Literal["sft"]
    output_dir: LocalPath = Field(description="the run's folder")
    model: Annotated[ModelConfig, BeforeValidator(_short, json_schema_input_type=ModelConfig | str)]
    data: DataConfig
    train: TrainConfig
    adapter: AdapterConfig | None = None
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _rules(self) -> SftConfig:
        if self.data.validation is None:
            for key in ("early_stopping", "eval_steps"):
                if getattr(self.train, key) is not None:
                    raise ValueError(f"train.{key}: needs data.validation, which is not set")
        if self.adapter is None and "adapter_dtype" in self.train.model_fields_set:
            raise ValueError("train.adapter_dtype: has no effect without an adapter; remove it")
        if self.train.adapter_dtype == "bfloat16" and self.model.dtype == "float32":
            raise ValueError("train.adapter_dtype: bfloat16 has no effect on a float32 base; remove it")
        if self.data.columns is not None and "format" in self.data.model_fields_set:
            raise ValueError("data: set either 'format' or 'columns'")
        return self
