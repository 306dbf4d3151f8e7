"""Chats -> token ids and labels: only what the assistant says carries loss, its end-of-turn token included."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmtune.data import masks, template
from llmtune.data.chats import Chat
from llmtune.data.masks import TrainOn
from llmtune.data.template import ChatTemplate, Turns
from llmtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class TokenRow:
    """input_ids and labels, each of shape (tokens,); a label is IGNORED where no loss is taken.

    weights: of shape (tokens,), what each token's loss is multiplied by; None where every supervised token weighs 1.
    place: the file and line that the row comes from.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None
    place: str = field(default="", compare=False)

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    def cut(self, length: int) -> TokenRow:
        """Its first `length` tokens."""
        return TokenRow(self.input_ids[:length], self.labels[:length], self.weights and self.weights[:length])


@dataclass
class Counts:
    """Every row of a source is in exactly one of rows and dropped."""

    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    duplicates: int = 0
    lengths: list[int] = field(default_factory=list)
    keys: set[int] = field(default_factory=set)

    def facts(self) -> dict[str, int]:
        """The counts for a manifest."""
        facts = {key: value for key, value in asdict(self).items() if key not in {"lengths", "keys"}}
        ordered = sorted(self.lengths) or [0]
        return {**facts, "median_tokens": int(statistics.median(ordered)), "longest_tokens": ordered[-1]}


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Turns | None = None, train_on: TrainOn = "all"
) -> TokenRow:
    """Token ids of the whole chat, labelled on each answer from its first token to its end-of-turn token.

    An answer's tokens are those that follow the prompt that is sent when the model is served. A turn's `weight` is that of
    its tokens; with 0 it is only read. Raises ValueError with the reason when the place of an answer cannot be proven for
    this template and row.
    """
    refuse_control_tokens(tokenizer, turns, tools)
    if not tokenizer.is_fast:
        raise ValueError(
            "this tokenizer does not say where its tokens stand in a text; use a model with a tokenizer.json"
        )
    chat_template = template.of(tokenizer)
    text, answers = masks.render(chat_template, turns, tools, train_on)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
    marked = _marked(chat_template, turns, tools, ids)
    labels, weights = [IGNORED] * len(ids), [0.0] * len(ids)
    for answer, turn in answers:
        prompt = tokenizer(answer.prompt, add_special_tokens=False)["input_ids"]
        if ids[: len(prompt)] != prompt:
            raise ValueError(
                "its answer begins with characters that merge with the chat template; strip white space from it"
            )
        end = len(answer.prompt + answer.said)
        said = [n for n in range(len(prompt), len(ids)) if starts[n] < end and marked[n]]
        stop = next((n for n in range(len(prompt), len(ids)) if starts[n] >= end), len(ids) - 1)
        if not said:
            raise ValueError("the generation marks of this chat template leave an answer out")
        if ids[stop] != tokenizer.convert_tokens_to_ids(answer.stop):
            raise ValueError(f"the tokenizer does not read the end of an answer, {answer.stop!r}, as that token")
        for n in said if turn.get("cut_off") else [*said, stop]:
            labels[n], weights[n] = ids[n], float(turn.get("weight", 1))
    return TokenRow(ids, labels, weights if set(weights) - {0.0, 1.0} else None)


def encode_answer(tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Turns | None = None) -> TokenRow:
    """Token ids of the whole chat, labelled on its last answer alone, whatever it weighs: what a model is scored on."""
    plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    return encode_chat(tokenizer, plain, tools, "last")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Turns | None = None) -> list[int]:
    """Token ids of the prompt exactly as served: the turns and the opening of the assistant's.

    Raises ValueError for a control token in a text, and where the template drops system prompts or tools without a word.
    """
    refuse_control_tokens(tokenizer, turns, tools)
    chat_template = template.of(tokenizer)
    masks.require_supported(chat_template, turns, tools)
    text = chat_template.write(turns, tools, prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Turns | None = None) -> None:
    """Raise ValueError where a text of the row holds a control token: it would become the token, not its letters."""
    known = sorted(template.of(tokenizer).control)
    for text in template.strings([turns, tools or []]):
        if control := next((token for token in known if token in text), None):
            raise ValueError(f"its text holds the control token {control!r}, which the model would obey; remove it")


def _marked(chat_template: ChatTemplate, turns: Turns, tools: Turns | None, ids: list[int]) -> list[bool]:
    """Where the template's own generation marks allow loss: they narrow what is trained and never widen it."""
    if not chat_template.has_marks:
        return [True] * len(ids)
    found = chat_template.marked(turns, tools)
    if found["input_ids"] != ids:
        raise ValueError("this chat template marks another text than the one that is trained; take its marks out")
    return [bool(mark) for mark in found["assistant_masks"]]


def encode_chats(
    chats: Iterator[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: Literal["error", "truncate", "drop"],
    counts: Counts,
    train_on: TrainOn = "all",
) -> Iterator[TokenRow]:
    """Encode every chat and count it. Raises one DataError that names every row that cannot be trained on."""
    problems = []
    for chat in chats:
        try:
            row = encode_chat(tokenizer, chat.turns, chat.tools, train_on)
        except ValueError as error:
            problems.append(f"{chat.row.place}: {error}")
            continue
        if len(row.input_ids) > max_length:
            if overlong == "drop":
                counts.dropped += 1
                continue
            if overlong == "error":
                problems.append(
                    f"{chat.row.place}: has {len(row.input_ids)} tokens, more than data.max_length ({max_length}); "
                    "raise it, or set data.overlong to 'truncate' or 'drop'"
                )
                continue
            row = row.cut(max_length)
            counts.truncated += 1
        if row.supervised == 0:
            problems.append(f"{chat.row.place}: no token of its answer is left after truncation to {max_length} tokens")
            continue
        counts.rows += 1
        counts.tokens += len(row.input_ids)
        counts.supervised_tokens += row.supervised
        counts.lengths.append(len(row.input_ids))
        key = hash(tuple(row.input_ids))
        counts.duplicates += key in counts.keys
        counts.keys.add(key)
        yield replace(row, place=chat.row.place)
    if problems:
        raise DataError("data", problems)
    if not counts.rows:
        raise DataError(
            "data", f"no row is left to train on ({counts.dropped} dropped as longer than {max_length} tokens)"
        )


def write_dataset(rows: Iterator[TokenRow], file: Path) -> Dataset:
    """Stream token rows into an Arrow file and map it: memory stays bounded whatever the number of rows.

    The dataset has a column `weights` (float32, of the length of `labels`) only where some row has weights. Our own file and
    not `Dataset.from_generator`, whose cache is keyed by the generator's arguments and so serves old rows when a file changes
    under the same name. Where each row comes from stands beside it, a line a row, in `.places`.
    """
    import datasets
    import pyarrow as pa

    columns = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "weights": pa.list_(pa.float32())}
    schema = pa.schema([*columns.items(), ("length", pa.int32())])
    weighted = False
    file.parent.mkdir(parents=True, exist_ok=True)
    places = file.with_suffix(".places").open("w", encoding="utf-8")
    with places, pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(rows, 1000)):
            weighted = weighted or any(row.weights is not None for row in batch)
            found = [
                {
                    "input_ids": row.input_ids,
                    "labels": row.labels,
                    "weights": row.weights or [float(label != IGNORED) for label in row.labels],
                    "length": len(row.input_ids),
                }
                for row in batch
            ]
            writer.write_batch(pa.RecordBatch.from_pylist(found, schema))
            places.writelines(f"{' '.join(row.place.split())}\n" for row in batch)
    dataset = datasets.Dataset.from_file(str(file))
    return dataset if weighted else dataset.remove_columns("weights")
