"""The run's rows as token ids on disk, every one of them accounted for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from llmtune.config import Recorded
from llmtune.data.chats import load_chats
from llmtune.data.rows import fingerprint
from llmtune.data.tokens import IGNORED, Counts, encode_chats, write_dataset
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.progress import say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """Token rows of one split (`input_ids`, `labels`, `length`), and the account of every row of its sources."""

    rows: Dataset
    counts: Counts


def fingerprints(data: Recorded) -> dict[str, str]:
    """ "split source" -> hash of what that source holds."""
    named = (("train", data.train), ("validation", data.validation))
    found = [(name, [given] if isinstance(given, str) else given or []) for name, given in named]
    return {f"{name} {source}": fingerprint(source) for name, sources in found for source in sources}


def encode_splits(
    data: Recorded, tokenizer: PreTrainedTokenizerBase, folder: Path, place: object
) -> tuple[Split, Split | None]:
    """Train and validation rows, as Arrow files in `folder`. Raises DataError for bad rows, ConfigError for shared ones."""
    train = _encode(data, "train", tokenizer, folder)
    if data.validation is None:
        return train, None
    validation = _encode(data, "validation", tokenizer, folder)
    if shared := train.counts.keys & validation.counts.keys:
        raise ConfigError(
            place, f"data.validation: {len(shared)} of its rows are training rows too; remove them from one"
        )
    return train, validation


def _encode(data: Recorded, name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Split:
    counts = Counts()
    columns = data.columns.whole() if data.columns is not None else None
    chats = load_chats(getattr(data, name), data.format, columns, training=True)
    rows = encode_chats(chats, tokenizer, data.max_length, data.overlong, counts, data.train_on)
    dataset = write_dataset(rows, folder / f"{name}.arrow")
    lost = "".join(f", {number} {what}" for what in ("dropped", "truncated") if (number := getattr(counts, what)))
    say(
        f"  {name}: {counts.rows} rows, {counts.tokens:,} tokens, {counts.supervised_tokens:,} of them supervised{lost}"
    )
    return Split(dataset, counts)


def assert_nothing_lost(dataset: Dataset, counts: Counts) -> None:
    """What TRL is about to train on is what we gave it: as many rows, as many supervised tokens."""
    labels = pc.list_flatten(dataset.data.column("labels"))
    supervised = pc.sum(pc.not_equal(labels, IGNORED)).as_py()
    if (len(dataset), supervised) != (counts.rows, counts.supervised_tokens):
        raise LlmtuneError(
            f"TRL holds {len(dataset)} rows with {supervised} supervised tokens, and was given {counts.rows} rows with "
            f"{counts.supervised_tokens}: this version of TRL changes rows; install the one in constraints.txt"
        )


def facts(prints: dict[str, str], train: Split, validation: Split | None) -> dict[str, Any]:
    """The `data` entry of a manifest: sources with their hashes, and the counts."""
    found: dict[str, Any] = {"train": None, "validation": None}
    for name, split in (("train", train), ("validation", validation)):
        if split is not None:
            sources = [
                {"path": key.partition(" ")[2], "sha256": sha} for key, sha in prints.items() if key.startswith(name)
            ]
            found[name] = {"sources": sources, **dataclasses.asdict(split.counts), **split.counts.facts()}
            del found[name]["lengths"], found[name]["keys"]
    return found
