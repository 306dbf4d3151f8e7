"""A chat as it is trained on, cut into pieces of one weight each: what a person looks at before anything is trained."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data import masks, template
from llmtune.data.chats import Chat
from llmtune.data.masks import TrainOn
from llmtune.data.tokens import IGNORED, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Preview:
    """pieces: the text, each part with what its tokens weigh in the loss, 0 where they carry none."""

    pieces: list[tuple[str, float]]
    tokens: int
    supervised: int


def preview(tokenizer: PreTrainedTokenizerBase, chat: Chat, train_on: TrainOn, max_length: int | None) -> Preview:
    """The first `max_length` tokens of a chat. Raises ValueError as `encode_chat` does."""
    row = encode_chat(tokenizer, chat.turns, chat.tools, train_on)
    row = row if max_length is None else row.cut(max_length)
    weights = row.weights or [float(label != IGNORED) for label in row.labels]
    text, _ = masks.render(template.of(tokenizer), chat.turns, chat.tools, train_on)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = [start for start, _ in offsets]
    end = starts[len(weights)] if len(starts) > len(weights) else len(text)
    pieces, at = [], 0
    for weight, run in itertools.groupby(range(len(weights)), key=lambda n: weights[n]):
        after = list(run)[-1] + 1
        stop = starts[after] if after < len(weights) else end
        pieces.append((text[at:stop], weight))
        at = stop
    return Preview(pieces, len(row.input_ids), row.supervised)
