"""One turn of a conversation: who speaks, what is said, which tools are called and what they gave back.

A turn is {"role", "content"} and, where the row has them: "tool_calls" and "reasoning_content" of the assistant,
"tool_call_id" and "name" of a tool's result, "weight" (what the loss on it counts), "cut_off" (it was not taught to end).
"""

from __future__ import annotations

import json
import math
from typing import Any

from llmtune.config.data import ColumnMap

Turns = list[dict[str, Any]]
ALLOWED = {"assistant": ("tool_calls", "reasoning_content", "weight", "cut_off"), "tool": ("tool_call_id", "name")}
"""What a turn of a role may carry beside its text."""


def read_turn(raw: Any, columns: ColumnMap) -> tuple[dict[str, Any] | None, list[str]]:
    """A turn as it stands in a row, or None, and what is wrong with it."""
    if not isinstance(raw, dict) or columns.role not in raw or not {columns.content, "tool_calls"} & raw.keys():
        return None, [f" lacks '{columns.role}' or '{columns.content}'"]
    role = columns.roles.get(str(raw[columns.role]), str(raw[columns.role]))
    turn: dict[str, Any] = {"role": role, "content": raw.get(columns.content)}
    given = {
        key: value
        for key, value in raw.items()
        if key not in (columns.role, columns.content) and value not in (None, "", [], {})
    }
    wrong = []
    if role == "tool_call":  # a call that is written as the text of a turn
        turn = {"role": "assistant", "content": ""}
        given["tool_calls"] = raw.get(columns.content)
    for key in sorted(given):
        if key in ALLOWED.get(turn["role"], ()):
            turn[key] = given[key]
        else:
            wrong.append(f": '{key}' is not supported on a turn of the {role}, and would be lost")
    return turn, wrong + _normalise(turn)


def _normalise(turn: dict[str, Any]) -> list[str]:
    """Bring what a turn carries into one shape, and say what is wrong with it."""
    wrong = []
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight >= 0):
        wrong.append(f": its weight is {weight!r}, and a number from 0 up is needed")
    if not isinstance(turn.get("reasoning_content", ""), str):
        wrong.append(f": its reasoning_content is {type(turn['reasoning_content']).__name__}, not a string")
    if not turn.get("cut_off", True):
        del turn["cut_off"]
    if "tool_calls" in turn:
        turn["content"] = turn["content"] or ""
        calls = _parsed(turn["tool_calls"])
        calls = calls if isinstance(calls, list) else [calls]
        turn["tool_calls"] = [_call(call) for call in calls]
        if None in turn["tool_calls"]:
            wrong.append(": a tool call is an object with a name and arguments, such as {name: add, arguments: {a: 1}}")
            turn["tool_calls"] = []
    return wrong


def _call(raw: Any) -> dict[str, Any] | None:
    """{"type": "function", "function": {"name", "arguments": an object}}, with an "id" where there is one."""
    if not isinstance(raw, dict):
        return None
    bare = {key: value for key, value in raw.items() if key not in ("id", "type") and value is not None}
    function = bare.get("function", bare)
    if (function is not bare and len(bare) > 1) or not isinstance(function, dict):
        return None
    arguments = _parsed(function.get("arguments") or {})
    if function.keys() - {"name", "arguments"} or not isinstance(function.get("name"), str):
        return None
    if not isinstance(arguments, dict) or (raw.get("type") or "function") != "function":
        return None
    identity = {"id": raw["id"]} if raw.get("id") else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(raw: Any) -> tuple[Turns | None, list[str]]:
    """A row's tools as a list of {"type": "function", "function": a JSON schema}; given so, bare, or as JSON text."""
    found = _parsed(raw)
    if found in (None, "", [], {}):
        return None, []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        return None, ["its tools are not a list of JSON schemas"]
    whole = [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]
    for number, tool in enumerate(whole, 1):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            return None, [f"its tool {number} has no name"]
    return whole, []


def _parsed(value: Any) -> Any:
    """JSON text as what it says; anything else, and text that is no JSON, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except (json.JSONDecodeError, RecursionError):
        return value


def check(turns: Turns, answers: bool) -> list[str]:
    """What makes these turns no chat to learn from."""
    problems = []
    due = ["user"]
    calls: list[str] = []
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == "system" and number == 1:
            pass
        elif role not in ("user", "assistant", "tool"):
            problems.append(f"turn {number}: unknown role {role!r}")
        elif role not in due:
            owed = " or the ".join(f"{one}'s" for one in due)
            problems.append(f"turn {number} is the {role}'s, and the {owed} is due")
        else:
            after = "tool" if turn.get("tool_calls") else "user"
            due = {"user": ["assistant"], "tool": ["tool", "assistant"], "assistant": [after]}[role]
        calls = [call.get("id", "") for call in turn["tool_calls"]] if "tool_calls" in turn else calls
        if role == "tool" and any(calls) and turn.get("tool_call_id", calls[0]) not in calls:
            problems.append(f"turn {number}: its tool_call_id is none of the calls' ({', '.join(calls)})")
        if problem := _check_text(turn):
            problems.append("has no answer" if problem == "no answer" else f"turn {number}{problem}")
    if answers and not problems and (not turns or turns[-1]["role"] != "assistant"):
        problems.append("has no answer")
    return problems


def _check_text(turn: dict[str, Any]) -> str | None:
    content, role = turn["content"], turn["role"]
    if not isinstance(content, str):
        return f": its text is {type(content).__name__}, not a string"
    if content.strip() or turn.get("tool_calls") or role == "tool":  # a tool may give nothing back
        return None
    return "no answer" if role == "assistant" else " is empty"


def check_no_null(turns: Turns, tools: Turns | None) -> list[str]:
    """In Parquet an object has the keys of all rows' objects, most of them null: that is not what the row means."""
    calls = [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", ())]
    if any(_has_null(value) for value in [*calls, tools]):
        return [
            "its tools or arguments hold null, as objects in Parquet do for keys of other rows; store them as JSON text"
        ]
    return []


def _has_null(value: Any, top: bool = True) -> bool:
    if isinstance(value, dict):
        return any(_has_null(entry, top=False) for entry in value.values())
    if isinstance(value, list):
        return any(_has_null(entry, top=False) for entry in value)
    return value is None and not top
