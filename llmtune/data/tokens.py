"""Chats -> token ids and labels: only what the assistant says carries loss, its end-of-turn token included."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from llmtune.data.chats import Chat
from llmtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class TokenRow:
    """input_ids and labels, each of shape (tokens,); a label is IGNORED where no loss is taken."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)


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


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> TokenRow:
    """Token ids of the whole chat, labelled on every assistant turn from its first token to its end-of-turn token.

    An answer's place is what the chat template adds to the prompt that is sent when the model is served, and its tokens are
    those that follow that prompt's. Raises ValueError with the reason when that cannot be proven for this template and row.
    """
    refuse_control_tokens(tokenizer, turns)
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = list(encoded["input_ids"]), [IGNORED] * len(encoded["input_ids"])
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            end = _end_of_answer(tokenizer, turns, index, text)
            prompt = encode_prompt(tokenizer, turns[:index])
            if ids[: len(prompt)] != prompt:
                raise ValueError(
                    "its answer begins with characters that merge with the chat template; strip white space from it"
                )
            for n in range(len(prompt), len(ids)):
                if encoded["offset_mapping"][n][0] < end:
                    labels[n] = ids[n]
    return TokenRow(ids, labels)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> list[int]:
    """Token ids of the prompt exactly as served: the turns and the opening of the assistant's."""
    refuse_control_tokens(tokenizer, turns)
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> None:
    """Raise ValueError where a turn's text holds a control token: it would become the token, not its letters."""
    known = {*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)}
    for turn in turns:
        if control := next((token for token in sorted(known) if token in turn["content"]), None):
            raise ValueError(f"its text holds the control token {control!r}, which the model would obey; remove it")


def _end_of_answer(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], index: int, text: str) -> int:
    """Where answer `index` ends in `text`, in characters, its end-of-turn token included."""
    before = str(tokenizer.apply_chat_template(turns[:index], tokenize=False, add_generation_prompt=True))
    through = str(tokenizer.apply_chat_template(turns[: index + 1], tokenize=False))
    if not (text.startswith(before) and text.startswith(through)):
        raise ValueError(
            "this chat template writes a turn differently once others follow, so its loss mask cannot be proven"
        )
    said, stop = through[len(before) :].rstrip(), str(tokenizer.eos_token)
    if not said.endswith(stop) or turns[index]["content"].strip() not in said:
        raise ValueError(
            f"this chat template does not end the assistant's turn with {stop!r}, so the model would not learn to stop"
        )
    return len(before) + len(said) - (len(stop) if turns[index].get("cut_off") else 0)


def encode_chats(
    chats: Iterator[Chat],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: Literal["error", "truncate", "drop"],
    counts: Counts,
) -> Iterator[TokenRow]:
    """Encode every chat and count it. Raises one DataError that names every row that cannot be trained on."""
    problems = []
    for chat in chats:
        try:
            row = encode_chat(tokenizer, chat.turns)
        except (ValueError, TypeError, TemplateError) as error:
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
            row = TokenRow(row.input_ids[:max_length], row.labels[:max_length])
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
        yield row
    if problems:
        raise DataError("data", problems)
    if not counts.rows:
        raise DataError(
            "data", f"no row is left to train on ({counts.dropped} dropped as longer than {max_length} tokens)"
        )


def write_dataset(rows: Iterator[TokenRow], file: Path) -> Dataset:
    """Stream token rows into an Arrow file and map it: memory stays bounded whatever the number of rows.

    Our own file and not `Dataset.from_generator`, whose cache is keyed by the generator's arguments and so serves old rows
    when a file changes under the same name.
    """
    import datasets
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("length", pa.int32())])
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append({"input_ids": row.input_ids, "labels": row.labels, "length": len(row.input_ids)})
            if len(batch) == 1000:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return datasets.Dataset.from_file(str(file))
