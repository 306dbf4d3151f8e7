"""The section `model`: which base, in which number format, where."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmtune.config import PathOrHub, Section


class ModelConfig(Section):
    """The base model: `org/name@revision`, `./folder`, `./file.gguf` or `package:PKG/file.gguf`."""

    name: PathOrHub
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the hardware has it"
    )
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="weights in 4 bits (QLoRA's NF4) or 8, by bitsandbytes, under an adapter; dtype is that of the arithmetic",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="how attention is computed; auto: transformers' choice for the model"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _rules(self) -> ModelConfig:
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("model.attention: flash_attention_2 does not compute in float32; use 'sdpa'")
        return self


def _short(value: Any) -> Any:
    """`model: NAME` is short for `model: {name: NAME}`."""
    return {"name": value} if isinstance(value, str) else value


ModelSection = Annotated[ModelConfig, BeforeValidator(_short, json_schema_input_type=ModelConfig | str)]
