"""The section `data`: rows to learn from, and how they become chats."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from llmtune.config import PathOrHub, Section


class ColumnMap(Section):
    """How rows of your own shape become chats; the shipped ones are in data_templates/."""

    conversation: str | None = Field(None, description="column that holds the list of turns")
    role: str = Field("role", description="key of a turn's speaker")
    content: str = Field("content", description="key of a turn's text")
    roles: dict[str, Literal["system", "user", "assistant", "tool", "tool_call"]] = Field(
        default_factory=dict, description="speaker -> role; tool_call: an assistant's turn whose text is a call in JSON"
    )
    system: str | None = Field(None, description="column of the system prompt")
    tools: str | None = Field(None, description="column of the tools, a list of JSON schemas or its JSON text")
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
    train_on: Literal["all", "last"] = Field("all", description="every answer of a chat, or its last one")
    max_length: PositiveInt = Field(1024, description="tokens")
    overlong: Literal["error", "truncate", "drop"] = Field("error", description="rows longer than max_length")
    packing: bool = Field(False, description="several rows in one sequence of at most max_length tokens, kept apart")
