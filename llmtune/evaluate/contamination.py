"""Which evaluation items stand in the training rows? Those measure memory, and may not count.

Words are compared without case, white space and punctuation. An item stands in a row when all of it does, or when 13 words in a
row of it do: the length that GPT-3 (Brown et al. 2020, appendix C) and lm-eval's decontamination use.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from llmtune import artifact, config
from llmtune.artifact import Artifact
from llmtune.config.data import ColumnMap
from llmtune.data.chats import Chat, load_chats
from llmtune.data.rows import fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluate.suites import Item
from llmtune.progress import say

GRAM = 13
SHORTEST = (
    8  # words; a shorter item is in a row only as a whole turn of it, since "say hello" is in many texts by chance
)
COMMON = 10
"""What stands in more rows, or in items of more clusters, than this is a form of words and no item's own, as in GPT-3's rule."""
WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W぀-ヿ㐀-鿿豈-﫿]+")  # written without spaces: each sign is a word

Words = tuple[str, ...]
Key = TypeVar("Key")


def words(text: str) -> Words:
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


@dataclass(frozen=True)
class Trained:
    """The rows a run was trained on, read anew each time they are asked for. missing: why they cannot be had."""

    sources: tuple[str, ...] = ()
    format: str = "auto"
    columns: ColumnMap | None = None
    missing: str | None = None

    def chats(self) -> Iterator[Chat]:
        return load_chats(list(self.sources), self.format, self.columns, training=True)


def trained_on(made: Artifact | None) -> Trained:
    """What the manifest of a tuned artifact, or of the one it was made from, names, if it lies there as it was then."""
    manifest: Any = made.manifest if made else {}
    while manifest and "data" not in manifest.get("config", {}):
        manifest = _parent(manifest)
    if not manifest:
        return Trained(missing="what it was trained on is not recorded")
    data = manifest["config"]["data"]
    sources = manifest["data"]["train"]["sources"]
    for source in sources:
        try:
            now = fingerprint(source["path"])
        except LlmtuneError as error:
            return Trained(missing=str(error))
        if now != source["sha256"]:
            return Trained(missing=f"{source['path']} was changed since")
    columns = data.get("columns") and config.validate(ColumnMap, data["columns"], "columns")
    return Trained(tuple(source["path"] for source in sources), data.get("format", "auto"), columns)


def _parent(manifest: dict[str, Any]) -> dict[str, Any]:
    for parent in manifest["parents"]:
        file = Path(parent["path"], artifact.MANIFEST)
        if file.is_file() and artifact.sha256_file(file) == parent["sha256"]:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
    return {}


def leave_out(items: Mapping[Key, Item], trained: Trained) -> tuple[dict[Key, Item], dict[str, Any]]:
    """The items, those that stand in the training rows with `excluded` set, and what the manifest says of it; told to the user."""
    if trained.missing:
        say(f"  note: the items were not looked for in the training rows: {trained.missing}")
        return dict(items), {"checked": False, "why": trained.missing}
    rows = 0

    def texts() -> Iterator[tuple[str, list[str]]]:
        nonlocal rows
        for chat in trained.chats():
            rows += 1
            yield chat.row.place, [str(turn["content"] or "") for turn in chat.turns if turn["role"] != "system"]

    asked = {key: item.question for key, item in items.items()}
    clusters = {key: f"{item.suite} {item.cluster_id}" for key, item in items.items()}
    found = find(asked, texts(), clusters)
    if found:
        key, why = next(iter(found.items()))
        say(
            f"  {len(found)} of {len(items)} items do not count: {items[key].item_id} {why}{', ...' if len(found) > 1 else ''}"
        )
    marked = {key: replace(item, excluded=item.excluded or found.get(key)) for key, item in items.items()}
    counted = Counter(items[key].suite for key in found)
    return marked, {"checked": True, "rows": rows, "excluded": dict(counted)}


def find(
    items: Mapping[Key, str], rows: Iterable[tuple[str, Iterable[str]]], clusters: Mapping[Key, str] | None = None
) -> dict[Key, str]:
    """item -> why it may not count, such as "stands in train.jsonl:14"; only the items that stand in a row.

    items: their texts. rows: the training rows, each its place and its texts (turns), read once and not kept: memory is bounded
    by the items. clusters: which items go together; without it each is its own. A rewording is not found, nor is an item without
    a word.
    """
    index = _Index(items, clusters or {key: key for key in items})
    for place, texts in rows:
        index.see(place, texts)
    return index.reasons()


class _Index:
    """The items' word sequences, and what was seen of them so far."""

    def __init__(self, items: Mapping[Any, str], clusters: Mapping[Any, Any]) -> None:
        self.clusters = clusters
        self.items: dict[Any, Words] = {identity: found for identity, text in items.items() if (found := words(text))}
        self.vocabulary = {word for found in self.items.values() for word in found}
        self.turns: dict[Words, list[Any]] = {}
        self.starts: dict[Words, list[Any]] = {}
        self.owners: dict[Words, set[Any]] = {}
        form = self._form()
        for identity, found in self.items.items():
            if len(found) < SHORTEST:
                self.turns.setdefault(found, []).append(identity)
                continue
            self.starts.setdefault(found[: min(GRAM, len(found))], []).append(identity)
            for own in _outside(found, form):
                for gram in _windows(own, min(GRAM, len(own))):
                    self.owners.setdefault(gram, set()).add(identity)
        self.sizes = sorted({len(gram) for gram in [*self.owners, *self.starts]})
        self.whole: dict[Any, str] = {}
        self.rows: dict[Words, tuple[int, str]] = {}
        """gram -> in how many rows it was seen, and where first."""

    def _form(self) -> set[Words]:
        """What items of more than COMMON clusters have in common, such as the instruction that all of them begin with."""
        among: dict[Words, set[Any]] = {}
        for identity, found in self.items.items():
            for gram in _windows(found, SHORTEST):
                among.setdefault(gram, set()).add(self.clusters[identity])
        return {gram for gram, clusters in among.items() if len(clusters) > COMMON}

    def see(self, place: str, texts: Iterable[str]) -> None:
        seen: set[Words] = set()
        for text in texts:
            turn = words(text)
            for identity in self.turns.get(turn, ()):
                self.whole.setdefault(identity, place)
            for first, last in self._known(turn):
                for size in self.sizes:
                    for start in range(first, last - size + 1):
                        gram = turn[start : start + size]
                        if gram in self.owners:
                            seen.add(gram)
                        if gram in self.starts:
                            self._begins(gram, turn, start, place)
        for gram in seen:
            times, where = self.rows.get(gram, (0, place))
            self.rows[gram] = times + 1, where

    def _known(self, turn: Words) -> Iterator[tuple[int, int]]:
        """Stretches of at least SHORTEST words that all stand in some item: only in them can a gram lie."""
        first = 0
        for position, word in enumerate(turn):
            if word not in self.vocabulary:
                if position - first >= SHORTEST:
                    yield first, position
                first = position + 1
        if len(turn) - first >= SHORTEST:
            yield first, len(turn)

    def _begins(self, gram: Words, turn: Words, start: int, place: str) -> None:
        for identity in self.starts[gram]:
            whole = self.items[identity]
            if identity not in self.whole and turn[start : start + len(whole)] == whole:
                self.whole[identity] = place

    def reasons(self) -> dict[Any, str]:
        found = {identity: f"stands in {place}" for identity, place in self.whole.items()}
        for gram, (times, place) in self.rows.items():
            owners = self.owners[gram]
            if times <= COMMON and len({self.clusters[identity] for identity in owners}) <= COMMON:
                for identity in owners:
                    found.setdefault(identity, f"{len(gram)} words in a row of it stand in {place}")
        return {identity: found[identity] for identity in self.items if identity in found}


def _windows(found: Words, size: int) -> Iterator[Words]:
    return (found[start : start + size] for start in range(len(found) - size + 1))


def _outside(found: Words, form: set[Words]) -> Iterator[Words]:
    """The stretches of at least SHORTEST words that no form of words covers."""
    covered = {
        start + offset
        for start, gram in enumerate(_windows(found, SHORTEST))
        if gram in form
        for offset in range(SHORTEST)
    }
    first = 0
    for position in [*sorted(covered), len(found)]:
        if position - first >= SHORTEST:
            yield found[first:position]
        first = position + 1
