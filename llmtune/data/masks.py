"""Which tokens of a chat carry loss: those that the served model has to write, and no others.

One rule for every template. As served, the model is given the prompt, writes, and ends at a stop token. So an answer is
what the chat template adds to the prompt that is served, up to and with the first stop token; a row is the prompt of its
last answer followed by that answer. Where an answer that is trained does not stand so in the row, it is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from llmtune.data.template import ChatTemplate, Turns, strings

TrainOn = Literal["all", "last"]
UNPROVEN = (
    "this chat template writes an answer differently once others follow, so its loss mask cannot be proven: "
    "what would be trained is not what is served; with data.train_on: last the last answer alone is trained"
)


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt as it is served: what the model has to write, its stop token, and what the template adds."""

    prompt: str
    said: str
    stop: str
    rest: str


def render(
    template: ChatTemplate, turns: Turns, tools: Turns | None, train_on: TrainOn
) -> tuple[str, list[tuple[Answer, dict[str, Any]]]]:
    """The text of a chat up to its last answer, and the answers that are trained, each with its turn.

    Raises ValueError with the reason where the place of an answer cannot be proven, and for what the template drops.
    """
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("has no answer")
    trained = [n for n in (answers if train_on == "all" else answers[-1:]) if turns[n].get("weight", 1) > 0]
    if not trained:
        raise ValueError("none of its answers is trained: they have weight 0")
    require_supported(template, turns, tools)
    last = written_answer(template, turns[: answers[-1] + 1], tools)
    text = last.prompt + last.said + last.stop + last.rest
    _require_whole(text, turns[: answers[-1]], tools)
    found = []
    for n in trained:
        answer = last if n == answers[-1] else written_answer(template, turns[: n + 1], tools)
        if not text.startswith(answer.prompt + answer.said + answer.stop):
            raise ValueError(UNPROVEN)
        found.append((answer, turns[n]))
    return text, found


def written_answer(template: ChatTemplate, turns: Turns, tools: Turns | None) -> Answer:
    """The last of `turns` as an answer to the others.

    The template itself is asked first, then TRL's training form of it, which keeps the reasoning of an answer and the stop
    token of a last turn where the served one leaves them out. Each is asked about the whole chat, then about a bare question
    and this answer: some write the prompt of a finished chat differently. Raises ValueError with the first reason.
    """
    prompt = template.write(turns[:-1], tools, prompt=True)
    bare: Turns = [{"role": "user", "content": "a question"}]
    reason: ValueError | None = None
    for own in (True, False):
        if not own and template.training is None:
            break
        for before, opening in ((turns[:-1], prompt), (bare, None)):
            try:
                _require_reasoning(template, turns[-1], own=own)
                opening = template.write(before, tools, prompt=True) if opening is None else opening
                whole = template.write([*before, turns[-1]], tools, template=None if own else template.training)
                said, stop, rest = _cut(template, opening, whole)
                _require_said(turns[-1], said)
            except ValueError as error:
                reason = reason or error
            else:
                return Answer(prompt, said, stop, rest)
    assert reason is not None
    raise reason


def _cut(template: ChatTemplate, opening: str, whole: str) -> tuple[str, str, str]:
    """What the whole adds to its opening: before its first stop token, that token, and what comes after."""
    if not whole.startswith(opening):
        same = next((n for n, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            "this chat template writes a finished chat differently from the prompt that is served, so its loss mask cannot "
            f"be proven: the prompt goes on with {_short(opening[same:])}, the finished chat with {_short(whole[same:])}"
        )
    parts = re.split(f"({'|'.join(map(re.escape, template.stops)) or '(?!)'})", whole[len(opening) :], maxsplit=1)
    if len(parts) < 3:
        stops = " or ".join(map(repr, template.stops)) or "a stop token"
        raise ValueError(
            f"this chat template does not end the assistant's turn with {stops}, so the model would not learn to stop"
        )
    return parts[0], parts[1], parts[2]


def _require_reasoning(template: ChatTemplate, turn: dict[str, Any], *, own: bool) -> None:
    if turn.get("reasoning_content") and own and "reasoning" in template.drops:
        raise ValueError(
            "this chat template drops reasoning_content; write it into the turn's text as the model does, or leave it out"
        )


def _require_said(turn: dict[str, Any], said: str) -> None:
    """Raise ValueError unless what is written holds all that the turn says, and no second block of reasoning."""
    parts = [*re.split(r"</?think>", turn["content"]), turn.get("reasoning_content") or "", *_called(turn)]
    if lost := [part for part in parts if not _holds(said, part)]:
        raise ValueError(f"this chat template drops or changes what the turn says ({_short(lost[0])})")
    if 0 < turn["content"].count("</think>") < said.count("</think>"):
        raise ValueError(
            "this chat template writes a block of reasoning beside the one in the turn's text; give it as reasoning_content"
        )


def require_supported(template: ChatTemplate, turns: Turns, tools: Turns | None) -> None:
    """Raise ValueError where the template leaves out a kind of thing that the chat has."""
    used = {
        "system prompts": turns[0]["role"] == "system",
        "tools": bool(tools),
        "tool calls": any("tool_calls" in turn for turn in turns),
        "tool results": any(turn["role"] == "tool" for turn in turns),
    }
    if lost := [what for what, there in used.items() if there and what in template.drops]:
        raise ValueError(
            f"this chat template drops {' and '.join(lost)} without a word; use a model whose template writes them"
        )


def _require_whole(text: str, turns: Turns, tools: Turns | None) -> None:
    """Raise ValueError where a prompt lacks a text of the row; what an earlier answer thought may be left out."""
    for turn in turns:
        parts = _called(turn) if turn["role"] == "assistant" else [turn["content"]]
        if lost := [part for part in parts if not _holds(text, part)]:
            raise ValueError(f"this chat template drops or changes what the {turn['role']} says ({_short(lost[0])})")
    if lost := [tool["function"]["name"] for tool in tools or [] if tool["function"]["name"] not in text]:
        raise ValueError(f"this chat template drops the tool {lost[0]!r}")


def _called(turn: dict[str, Any]) -> list[str]:
    calls = [call["function"] for call in turn.get("tool_calls", ())]
    return [part for call in calls for part in strings([call["name"], call["arguments"]])]


def _holds(text: str, part: str) -> bool:
    """Whether the text holds the part, as it stands or as JSON writes it; white space around it aside."""
    part = part.strip()
    return part in text or any(json.dumps(part, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
