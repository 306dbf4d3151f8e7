"""Who judges answers: the section `judge` of a run file or a suite."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from llmtune.config import LocalPath, Section, _resolve_if_local


class JudgeConfig(Section):
    """A judge of single answers: the refusal pattern, log-probability openers, a guard model, or an endpoint."""

    kind: Literal["refusal_pattern", "openers", "guard", "endpoint"] = "refusal_pattern"
    model: str | None = Field(None, description="guard: a folder or hub id; endpoint: the model's name there")
    family: Literal["llama_guard", "wildguard", "qwen3guard", "shieldgemma", "classifier"] | None = Field(
        None, description="guard: how it is asked and how its verdict is read"
    )
    benign: str | None = Field(None, description="guard of family classifier: its label that means harmless")
    base_url: str | None = Field(None, description="endpoint: OpenAI-compatible, such as http://127.0.0.1:8000/v1")
    api_key_env: str | None = Field(None, description="endpoint: the environment variable that holds its key")
    timeout_s: PositiveFloat = Field(60, description="endpoint: of one request")
    retries: PositiveInt = Field(
        4, description="endpoint: tries after a timeout, a 429 or a 5xx, waiting longer each time"
    )
    card: LocalPath | None = Field(
        None, description="what `llmtune judge validate` measured of it; the gate refuses a judge without one"
    )

    @field_validator("model", mode="before")
    @classmethod
    def _folder(cls, model: object, info: ValidationInfo) -> object:
        """A guard's folder lies beside the file; the name that an endpoint knows is passed on as it is."""
        return _resolve_if_local(model, info) if info.data.get("kind") == "guard" else model

    @field_validator("base_url")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", address):
            raise ValueError("is an http:// or https:// address without a key in it, such as http://127.0.0.1:8000/v1")
        if address is not None and address.rstrip("/").endswith("/chat/completions"):
            raise ValueError("ends before /chat/completions, which is added to it")
        return address

    @model_validator(mode="after")
    def _whole(self) -> JudgeConfig:
        needed = {"guard": {"model", "family"}, "endpoint": {"model", "base_url"}}.get(self.kind, set())
        ours = {"refusal_pattern": {"card"}, "openers": {"card"}, "guard": {"model", "family", "benign", "card"}}.get(
            self.kind, {"model", "base_url", "api_key_env", "timeout_s", "retries", "card"}
        )
        if missing := [key for key in sorted(needed) if getattr(self, key) is None]:
            raise ValueError(f"{missing[0]}: required with kind: {self.kind}")
        if extra := sorted(self.model_fields_set - ours - {"kind"}):
            raise ValueError(f"{extra[0]}: has no effect with kind: {self.kind}")
        if self.benign is not None and self.family != "classifier":
            raise ValueError(f"benign: has no effect with family: {self.family}")
        return self

    def lacks(self, metrics: Collection[str]) -> str | None:
        """Why this judge cannot give a suite's `metrics`; None where it can."""
        if "harmful" in metrics and self.kind in ("refusal_pattern", "openers"):
            return f"'harmful' needs a judge that knows harm, and {self.kind} does not; set judge.kind to guard or endpoint"
        if self.kind == "openers" and "refusal_margin" not in metrics:
            return "a judge of kind openers goes by 'refusal_margin', which is not among this suite's metrics"
        return None
