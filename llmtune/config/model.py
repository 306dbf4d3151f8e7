"""The section `model`: which base, in which number format, where."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

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
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


def _short(value: Any) -> Any:
    """`model: NAME` is short for `model: {name: NAME}`."""
    return {"name": value} if isinstance(value, str) else value


ModelSection = Annotated[ModelConfig, BeforeValidator(_short, json_schema_input_type=ModelConfig | str)]
