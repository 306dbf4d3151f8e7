"""The run's rows as token ids on disk, every one of them accounted for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow.compute as pc

from llmtune.artifact import sha256_file, write_atomically
from llmtune.config import Recorded
from llmtune.data.chats import load_chats
from llmtune.data.rows import fingerprint
from llmtune.data.tokens import IGNORED, Counts, encode_chats, write_dataset
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.progress import say
from llmtune.training import packing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ACCOUNT = "rows.json"


@dataclass(frozen=True)
class Split:
    """Token rows of one split, or packed sequences of them, and the account of every row of its sources."""

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
    """Train and validation rows, as Arrow files in `folder`, where `read_splits` finds them.

    Raises DataError for bad rows, ConfigError for shared ones, and for rows that are not those of an interrupted run.
    """
    account = folder / ACCOUNT
    before = json.loads(account.read_text(encoding="utf-8")) if account.is_file() else {}
    train, validation = _encode_splits(data, tokenizer, folder, place)
    now = {
        name: {
            "file": (file := split.rows.cache_files[0]["filename"]),
            "sha256": sha256_file(Path(file)),
            "columns": split.rows.column_names,
            **dataclasses.asdict(split.counts),
            "keys": [],
        }
        for name, split in (("train", train), ("validation", validation))
        if split is not None
    }
    if before and {name: entry["sha256"] for name, entry in before.items()} != {n: e["sha256"] for n, e in now.items()}:
        raise ConfigError(
            place,
            f"an interrupted run lies in {folder}, and the same rows are now other tokens, as where a chat template writes the "
            "date; remove that folder to start anew",
        )
    write_atomically(account, json.dumps(now))
    return train, validation


def read_splits(data: Recorded, folder: Path) -> tuple[Split, Split | None]:
    """What another process of this run encoded into `folder`, from the same settings."""
    data.whole()
    splits = {}
    for name, entry in json.loads((folder / ACCOUNT).read_text(encoding="utf-8")).items():
        rows = datasets.Dataset.from_file(entry.pop("file")).select_columns(entry.pop("columns"))
        keys = set(entry.pop("keys"))
        del entry["sha256"]
        splits[name] = Split(rows, Counts(**entry, keys=keys))
        _say(name, splits[name].counts)
    return splits["train"], splits.get("validation")


def _encode_splits(
    data: Recorded, tokenizer: PreTrainedTokenizerBase, folder: Path, place: object
) -> tuple[Split, Split | None]:
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
    _say(name, counts)
    if data.packing:
        dataset = packing.pack(dataset, data.max_length, folder / f"{name}-packed.arrow")
    return Split(dataset, counts)


def _say(name: str, counts: Counts) -> None:
    lost = "".join(f", {number} {what}" for what in ("dropped", "truncated") if (number := getattr(counts, what)))
    say(
        f"  {name}: {counts.rows} rows, {counts.tokens:,} tokens, {counts.supervised_tokens:,} of them supervised{lost}"
    )


def evened(rows: Dataset, multiple: int) -> Dataset:
    """`rows`, and after them as many blank ones, without loss, as make their number a multiple.

    Processes take turns at batches; where the last ones are missing, accelerate would train on the first rows again.
    """
    if not (missing := -len(rows) % multiple):
        return rows
    known: dict[str, Any] = {"labels": [IGNORED], "seq_lengths": [1], "length": 1}
    blank = {name: known.get(name, value[:1] if isinstance(value, list) else value) for name, value in rows[0].items()}
    blanks = datasets.Dataset.from_list([blank] * missing, features=rows.features)
    return datasets.concatenate_datasets([rows, blanks])


def assert_nothing_lost(dataset: Dataset, counts: Counts, blanks: int = 0) -> None:
    """What TRL is about to train on is what we gave it: as many rows (and blank ones), packed or not, as many supervised tokens."""
    labels = pc.list_flatten(dataset.data.column("labels"))
    supervised = pc.sum(pc.not_equal(labels, IGNORED)).as_py()
    packed = "seq_lengths" in dataset.column_names
    rows = (sum(map(len, dataset["seq_lengths"])) if packed else len(dataset)) - blanks
    if (rows, supervised) != (counts.rows, counts.supervised_tokens):
        raise LlmtuneError(
            f"TRL holds {rows} rows with {supervised} supervised tokens, and was given {counts.rows} rows with "
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
