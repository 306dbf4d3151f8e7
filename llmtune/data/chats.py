"""Rows -> chats: one column map a format, every bad row named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune import config
from llmtune.config.data import ColumnMap
from llmtune.data import turns as shapes
from llmtune.data.rows import Row, read_rows
from llmtune.errors import ConfigError, DataError, did_you_mean

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion")
MOST_PROBLEMS = 1000


@dataclass(frozen=True)
class Chat:
    """One conversation: its turns, as `data.turns` makes them, and the tools that the assistant may call."""

    turns: list[dict[str, Any]]
    row: Row
    tools: list[dict[str, Any]] | None = None

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The turns before the last answer."""
        return self.turns[:-1] if self.turns[-1]["role"] == "assistant" else self.turns

    @property
    def answer(self) -> str | None:
        last = self.turns[-1]
        return str(last["content"]) if last["role"] == "assistant" else None


def load_chats(
    sources: str | list[str],
    format: str = "auto",
    columns: ColumnMap | None = None,
    *,
    training: bool,
    answers: bool = True,
) -> Iterator[Chat]:
    """Chats of every row of `sources`, in order.

    A sealed row (`"sealed": true`, what a test split is made of) is refused when `training`; `answers` asks for an answer in
    every row. Raises one DataError that names every bad row, after the last good one was yielded.
    """
    problems: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        column_map = columns
        for row in read_rows(source):
            column_map = column_map or _column_map(format, row)
            if training and row.fields.get("sealed"):
                raise DataError(row.place, "is sealed: it belongs to a test split, which training must not see")
            turns, found = _turns(row.fields, column_map, answers)
            tools, wrong = shapes.read_tools(row.fields.get(column_map.tools)) if column_map.tools else (None, [])
            found = found + wrong or shapes.check(turns, answers)
            if Path(source).suffix.lower() not in (".json", ".jsonl"):
                found = found or shapes.check_no_null(turns, tools)
            if found:
                problems += [f"{row.place}: {problem}" for problem in found]
                if len(problems) >= MOST_PROBLEMS:
                    break
            elif not problems:
                yield Chat(turns, row, tools)
    if problems:
        raise DataError(sources if isinstance(sources, str) else ", ".join(sources), problems)


def _column_map(format: str, row: Row) -> ColumnMap:
    names = FORMATS if format == "auto" else (format,)
    for name in names:
        if name not in FORMATS:
            raise ConfigError("data.format", f"unknown format '{name}'{did_you_mean(name, FORMATS)}")
        file = config.shipped("data_templates", f"{name}.yaml")
        column_map = config.validate(ColumnMap, config.read_yaml(file), file)
        needed = [column_map.conversation] if column_map.conversation else [column_map.user[0]]
        if all(column in row.fields for column in needed):
            return column_map
    raise DataError(
        row.place,
        f"has the columns {', '.join(row.fields) or '(none)'}, which are not those of {' or '.join(names)}; "
        "say which is which with data.columns, such as {user: [question], assistant: reply}",
    )


def _turns(fields: dict[str, Any], columns: ColumnMap, answers: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The row's turns, and what is wrong with its shape."""
    turns: list[dict[str, Any]] = []
    if columns.system and fields.get(columns.system):
        turns.append({"role": "system", "content": fields[columns.system]})
    if columns.conversation is None:
        missing = [name for name in (columns.user[0], columns.assistant) if name not in fields]
        if columns.assistant in missing and len(missing) == 1:
            missing = []  # a prompt without an answer: whether that is allowed is for the caller
        asked = [fields[name] for name in columns.user if fields.get(name)]
        wrong = [part for part in asked if not isinstance(part, str)]
        turns.append({"role": "user", "content": wrong[0] if wrong else "\n\n".join(asked)})
        if fields.get(str(columns.assistant)) is not None:
            turns.append({"role": "assistant", "content": fields[str(columns.assistant)]})
        elif answers and columns.assistant not in fields and not missing:
            has = f"no column '{columns.assistant}'; it has {', '.join(fields)}"
            missing_answer = f"has no answer ({has}; data.columns can say which is which)"
            return turns, [missing_answer]
        return turns, [f"has no '{name}'" for name in missing]
    conversation = fields.get(columns.conversation)
    if not isinstance(conversation, list):
        return turns, [f"'{columns.conversation}' is not a list of turns"]
    problems = []
    for number, raw in enumerate(conversation, 1):
        turn, wrong = shapes.read_turn(raw, columns)
        problems += [f"turn {number}{problem}" for problem in wrong]
        turns += [turn] if turn else []
    return turns, problems
