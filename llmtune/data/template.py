"""A model's chat template: what it writes, where an answer ends, and what it would drop without a word."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[dict[str, Any]]
OURS = {"weight", "cut_off"}
"""Keys of a turn that are for us and not for the template."""
SAID, NAME, KEY, VALUE = "an answer 7f3a", "name_b8f3e2", "key_c9d4f5", "value_d6e7a9"
"""Words that no template writes of itself: where one is missing, the template dropped it."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one tokenizer, and what a few chats written with it have shown.

    stops: the tokens at which generation ends, the template's own end-of-turn token among them.
    control: tokens that no turn's text may hold: the tokenizer's special ones, the stops, and what the template opens turns with.
    unlisted: that token, where neither the tokenizer nor the model's generation config stops at it; else None.
    drops: what the template leaves out silently, of "system prompts", "tools", "tool calls", "tool results", "reasoning".
    text_arguments: whether it takes the arguments of a tool call as JSON text only.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[str, ...]
    control: frozenset[str]
    unlisted: str | None
    drops: frozenset[str]
    text_arguments: bool

    def write(self, turns: Turns, tools: Turns | None, *, prompt: bool = False, template: str | None = None) -> str:
        """The chat as text; prompt: with the opening of the assistant's next turn, as the model is served.

        template: another one than the tokenizer's. Raises ValueError in its words where the template refuses the chat.
        """
        as_text = self.text_arguments and template is None
        return _write(self.tokenizer, turns, tools, prompt=prompt, template=template, text_arguments=as_text)

    @cached_property
    def training(self) -> str | None:
        """TRL's training form of this template, which may keep what the served one leaves out of an answer."""
        from trl.chat_template_utils import get_training_chat_template

        try:
            found: str | None = get_training_chat_template(self.tokenizer)
        except (ValueError, TypeError, TemplateError):  # not one that TRL knows
            return None
        return found

    def marked(self, turns: Turns, tools: Turns | None) -> Any:
        """`input_ids` of the chat and `assistant_masks`: 1 where the template's own generation marks say so."""
        return self.tokenizer.apply_chat_template(
            _shown(turns, self.text_arguments), tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )

    @property
    def has_marks(self) -> bool:
        """Whether the template marks with {% generation %} what the assistant says."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", str(self.tokenizer.chat_template)) is not None


def of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The tokenizer's chat template, probed once."""
    return _probed(tokenizer, str(tokenizer.chat_template), listed_stops(tokenizer))


def listed_stops(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens at which the tokenizer, or its model's generation config where `load_tokenizer` read it, ends an answer."""
    ids = {tokenizer.eos_token_id, *getattr(tokenizer, "generation_stops", ())} - {None}
    return tuple(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ids)) if token is not None)


def strings(value: Any) -> Iterator[str]:
    """Every text inside a turn or a tool, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from (str(key), *strings(entry))
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)


@lru_cache(maxsize=16)
def _probed(tokenizer: PreTrainedTokenizerBase, _text: str, listed: tuple[str, ...]) -> ChatTemplate:
    end, marks = _turn_marks(tokenizer, listed)
    stops = (*listed, end) if end else listed
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control = frozenset({*tokenizer.all_special_tokens, *special, *stops, *marks})
    text_arguments = _wants_text(tokenizer)
    drops = frozenset(what for what, probe in _probes().items() if _dropped(tokenizer, probe, text_arguments))
    return ChatTemplate(tokenizer, stops, control, end, drops, text_arguments)


def _write(
    tokenizer: PreTrainedTokenizerBase,
    turns: Turns,
    tools: Turns | None = None,
    *,
    prompt: bool = False,
    template: str | None = None,
    text_arguments: bool = False,
) -> str:
    shown = _shown(turns, text_arguments)
    try:
        return str(
            tokenizer.apply_chat_template(
                shown, tools=tools, tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        )
    except (
        TemplateError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def _shown(turns: Turns, text_arguments: bool) -> Turns:
    """The turns as a template is given them."""
    shown = [{key: value for key, value in turn.items() if key not in OURS} for turn in turns]
    for turn in shown if text_arguments else []:
        if "tool_calls" in turn:
            calls = [call["function"] for call in turn["tool_calls"]]
            texts = [{**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls]
            turn["tool_calls"] = [
                {**call, "function": text} for call, text in zip(turn["tool_calls"], texts, strict=True)
            ]
    return shown


def _turn_marks(tokenizer: PreTrainedTokenizerBase, listed: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The token by which the template ends an answer, where it is none of `listed`; and all the tokens of a plain chat.

    The end is read off what follows an answer both when it is the last turn and when it is not: a template may close the
    whole chat with a token of its own, and the next turn opens with one.
    """
    asked, said = {"role": "user", "content": "a question"}, {"role": "assistant", "content": SAID}
    known = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
    try:
        alone, followed = (_write(tokenizer, turns) for turns in ([asked, said], [asked, said, asked]))
    except ValueError:
        return None, []  # every row will say why
    tokens = re.compile("|".join(map(re.escape, known)) or "(?!)")
    tails = zip(alone.partition(SAID)[2], followed.partition(SAID)[2], strict=False)
    ends = tokens.findall("".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], tails)))
    end = ends[-1] if ends and not set(ends) & set(listed) else None
    return end, [token for token in tokens.findall(followed) if not re.fullmatch("</?think>", token)]


def _wants_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template joins a call's arguments to a text, and so fails on an object, as DeepSeek's do."""
    turns, _, _ = _probes()["tool calls"]
    try:
        _write(tokenizer, turns)
    except ValueError as error:
        return isinstance(error.__cause__, TypeError)
    return False


def _probes() -> dict[str, tuple[Turns, Turns | None, list[str]]]:
    """What a template may drop -> a chat with it, its tools, and the words that must come through."""
    asked: dict[str, Any] = {"role": "user", "content": "a question"}
    said = {"role": "assistant", "content": "an answer", "reasoning_content": VALUE}

    def called(value: str) -> dict[str, Any]:
        call = {"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": {KEY: value}}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    result = {"role": "tool", "tool_call_id": "call00001", "name": NAME, "content": VALUE}
    schema = {"type": "object", "properties": {KEY: {"type": "string", "description": "a key"}}, "required": [KEY]}
    tool = {"type": "function", "function": {"name": NAME, "description": "a tool", "parameters": schema}}
    return {
        "system prompts": ([{"role": "system", "content": VALUE}, asked], None, [VALUE]),
        "tools": ([asked], [tool], [NAME, KEY]),
        "tool calls": ([asked, called(VALUE)], None, [NAME, KEY, VALUE]),
        "tool results": ([asked, called("another"), result], None, [VALUE]),
        "reasoning": ([asked, said], None, [VALUE]),
    }


def _dropped(
    tokenizer: PreTrainedTokenizerBase, probe: tuple[Turns, Turns | None, list[str]], text_arguments: bool
) -> bool:
    turns, tools, words = probe
    try:
        text = _write(tokenizer, turns, tools, prompt=turns[-1]["role"] != "assistant", text_arguments=text_arguments)
    except ValueError:
        return False  # it says so itself, row by row
    return not all(word in text for word in words)
