"""Which evaluation items stand in the training rows? Those measure memory, and may not count.

Words are compared without case, white space and punctuation. An item stands in a row when all of it does, or when 13 words in a
row of it do: the length that GPT-3 (Brown et al. 2020, appendix C) and lm-eval's decontamination use.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

GRAM = 13
SHORTEST = (
    8  # words; a shorter item is in a row only as a whole turn of it, since "say hello" is in many texts by chance
)
COMMON = (
    10  # what is in more rows, or in more items, than this is a form of words and no item's own, as in GPT-3's rule
)
WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W぀-ヿ㐀-鿿豈-﫿]+")  # written without spaces: each sign is a word

Words = tuple[str, ...]


def words(text: str) -> Words:
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def find(items: Mapping[str, str], rows: Iterable[tuple[str, Iterable[str]]]) -> dict[str, str]:
    """item id -> why it may not count, such as "stands in train.jsonl:14"; only the items that stand in a row.

    items: id -> its text. rows: the training rows, each its place and its texts (turns), read once and not kept: memory is bounded
    by the items. A rewording is not found. An item without a word is never found.
    """
    index = _Index(items)
    for place, texts in rows:
        index.see(place, texts)
    return index.reasons()


class _Index:
    """The items' word sequences, and what was seen of them so far."""

    def __init__(self, items: Mapping[str, str]) -> None:
        self.items = {identity: found for identity, text in items.items() if (found := words(text))}
        self.vocabulary = {word for found in self.items.values() for word in found}
        self.turns: dict[Words, list[str]] = {}
        self.starts: dict[Words, list[str]] = {}
        self.owners: dict[Words, set[str]] = {}
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
        self.whole: dict[str, str] = {}
        self.rows: dict[Words, tuple[int, str]] = {}
        """gram -> in how many rows it was seen, and where first."""

    def _form(self) -> set[Words]:
        """What more than COMMON items have in common, such as the instruction that all of them begin with."""
        among = Counter(gram for found in self.items.values() for gram in set(_windows(found, SHORTEST)))
        return {gram for gram, items in among.items() if items > COMMON}

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

    def reasons(self) -> dict[str, str]:
        found = {identity: f"stands in {place}" for identity, place in self.whole.items()}
        for gram, (times, place) in self.rows.items():
            if times <= COMMON and len(owners := self.owners[gram]) <= COMMON:
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
