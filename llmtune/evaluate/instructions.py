"""Whether an answer follows an instruction that needs no judgement: a length, a form, a word. Plain Python, used by lm-eval.

An item's `checks` are lines of a check's name and its argument, such as "words_at_most 20". An empty answer follows nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

END = re.compile(r"[.!?]+[\"')*]*(?=\s|$)")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """followed: 1 when every check holds. parts: which of them hold."""
    said = results[0].strip()
    held = [bool(said) and follows(check, said) for check in doc["checks"]]
    return {"followed": float(all(held)), "parts": held}


def share(items: list[list[bool]]) -> float:
    """lm-eval's aggregate of `parts`: the share of all checks that hold, over all items."""
    held = [part for parts in items for part in parts]
    return sum(held) / len(held)


def follows(check: str, said: str) -> bool:
    name, _, argument = check.partition(" ")
    return CHECKS[name](said, argument)


def words(said: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", said)


def sentences(said: str) -> list[str]:
    return [part.strip() for part in END.split(said) if words(part)]


def lines(said: str) -> list[str]:
    return [line.strip() for line in said.splitlines() if line.strip()]


def times(word: str, said: str) -> int:
    return sum(one.lower() == word.lower() for one in words(said))


def value(said: str) -> Any:
    """What the answer is as JSON, in a code fence or not; a lone object() when it is none."""
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", said, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else said)
    except ValueError:
        return object()


def has_keys(given: Any, keys: list[str]) -> bool:
    return isinstance(given, dict) and given.keys() == set(keys)


def number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def under(said: str, key: str) -> Any:
    given = value(said)
    return given.get(key) if isinstance(given, dict) else None


def is_list(given: Any, length: int, kind: type) -> bool:
    return isinstance(given, list) and len(given) == length and all(isinstance(one, kind) for one in given)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "words_exactly": lambda said, n: len(words(said)) == int(n),
    "words_at_most": lambda said, n: len(words(said)) <= int(n),
    "words_at_least": lambda said, n: len(words(said)) >= int(n),
    "sentences": lambda said, n: len(sentences(said)) == int(n),
    "sentences_start": lambda said, word: all(words(one)[0] == word for one in sentences(said)),
    "lines": lambda said, n: len(lines(said)) == int(n),
    "paragraphs": lambda said, n: len([part for part in re.split(r"\n\s*\n", said) if part.strip()]) == int(n),
    "bullets": lambda said, n: [line[:2] for line in lines(said)] == ["- "] * int(n),
    "numbered": lambda said, n: (
        [line.partition(".")[0] for line in lines(said)] == [str(i) for i in range(1, int(n) + 1)]
    ),
    "matches": lambda said, pattern: re.fullmatch(pattern, said) is not None,
    "starts_with": lambda said, text: said.startswith(text),
    "ends_with": lambda said, text: said.endswith(text),
    "contains": lambda said, word: times(word, said) > 0,
    "avoids": lambda said, word: times(word, said) == 0,
    "avoids_letter": lambda said, letter: letter not in said.lower(),
    "one_of": lambda said, choices: said.lower().rstrip(".") in choices.split(),
    "word_times": lambda said, given: times(given.split()[0], said) == int(given.split()[1]),
    "char_times": lambda said, given: said.count(given.split()[0]) == int(given.split()[1]),
    "numbers": lambda said, n: len(re.findall(r"\d+(?:[.,:]\d+)*", said)) == int(n),
    "uppercase": lambda said, _: said.isupper(),
    "lowercase": lambda said, _: said.islower(),
    "capital_words": lambda said, n: sum(len(w) > 1 and w.isupper() for w in words(said)) == int(n),
    "no_punctuation": lambda said, _: not re.search(r"[.,;:!?\"()-]", said),
    "json_equals": lambda said, given: value(said) == json.loads(given),
    "json_keys": lambda said, keys: has_keys(value(said), keys.split()),
    "json_keys_under": lambda said, given: has_keys(under(said, given.split()[0]), given.split()[1:]),
    "json_number": lambda said, key: number(under(said, key)),
    "json_true_or_false": lambda said, key: isinstance(under(said, key), bool),
    "json_texts": lambda said, n: is_list(value(said), int(n), str),
    "json_texts_under": lambda said, given: is_list(under(said, given.split()[0]), int(given.split()[1]), str),
    "json_objects": lambda said, given: (
        is_list(value(said), int(given.split()[0]), dict)
        and all(one.keys() == {given.split()[1]} for one in value(said))
    ),
}
