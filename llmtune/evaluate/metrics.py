"""A metric's value of one observation, where no judge is needed."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from llmtune.data import openers
from llmtune.evaluate.observations import Observation
from llmtune.evaluate.suites import Item

SENTENCE = re.compile(r"""[A-Z`'"*(][^\n]*[.!?]['"`*)]?""")
INNER_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?]\s+[A-Z]")
CALL = re.compile(r"(?:<tool_call>|\[TOOL_CALLS\]\s*\[?|\A\s*(?:```(?:json)?)?)\s*(?=\{)")
GRAM = 4


def value(metric: str, item: Item, seen: Observation) -> float | None:
    """In the metric's own unit; None where the observation failed, or what the model computed is not a number."""
    return None if seen.error is not None or broken(seen) else VALUES[metric](item, seen)


def broken(seen: Observation) -> bool:
    """Whether a loss or a log-probability is not finite: of such, no choice is the likeliest."""
    return not all(map(math.isfinite, [*(seen.logprobs or []), *([] if seen.loss is None else [seen.loss])]))


def _one_sentence(_: Item, seen: Observation) -> float:
    text = str(seen.text)
    return float(bool(SENTENCE.fullmatch(text)) and not INNER_END.search(text))


def _exact_match(item: Item, seen: Observation) -> float:
    return float(" ".join(str(seen.text).split()) == " ".join(str(item.reference).split()))


def _rouge_l(item: Item, seen: Observation) -> float:
    return float(_rouge().score(item.reference, seen.text)["rougeL"].fmeasure)


@functools.cache
def _rouge() -> Any:
    """Google's implementation, with stemming: ROUGE-L F1 as published figures use it."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def _repetition(_: Item, seen: Observation) -> float:
    words = str(seen.text).lower().split()
    grams = [tuple(words[n : n + GRAM]) for n in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _tool_call_valid(item: Item, seen: Observation) -> float:
    """1 when the answer's first call, in the notations of Hermes and Qwen, Mistral or as bare JSON, names an offered tool, gives
    every required argument and none that the tool does not have, each of its type."""
    found = CALL.search(str(seen.text))
    try:
        call = json.JSONDecoder().raw_decode(str(seen.text), found.end())[0] if found else None
    except ValueError:
        return 0.0
    tools = {tool["function"]["name"]: tool["function"] for tool in item.tools or []}
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in tools:
        return 0.0
    given = call.get("arguments", call.get("parameters", {}))
    wanted = tools[call["name"]].get("parameters") or {}
    known = wanted.get("properties", {})
    if not isinstance(given, dict) or set(wanted.get("required", ())) - given.keys() or given.keys() - known.keys():
        return 0.0
    return float(all(_typed(known[name], argument) for name, argument in given.items()))


TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda given: isinstance(given, str),
    "integer": lambda given: isinstance(given, int) and not isinstance(given, bool),
    "number": lambda given: isinstance(given, int | float) and not isinstance(given, bool),
    "boolean": lambda given: isinstance(given, bool),
    "array": lambda given: isinstance(given, list),
    "object": lambda given: isinstance(given, dict),
    "null": lambda given: given is None,
}


def _typed(schema: dict[str, Any], given: Any) -> bool:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(TYPES.get(kind, lambda _: True)(given) for kind in kinds):
        return False
    return "enum" not in schema or given in schema["enum"]


def probabilities(logprobs: list[float]) -> list[float]:
    """Of the choices among themselves, from the log-probability of each."""
    highest = max(logprobs)
    weights = [math.exp(one - highest) for one in logprobs]
    return [weight / sum(weights) for weight in weights]


def _acc(item: Item, seen: Observation) -> float:
    assert seen.logprobs is not None
    return float(seen.logprobs.index(max(seen.logprobs)) == item.right)


def _brier(item: Item, seen: Observation) -> float:
    shares = probabilities(seen.logprobs or [])
    return sum((share - (n == item.right)) ** 2 for n, share in enumerate(shares))


def _nll(item: Item, seen: Observation) -> float:
    assert seen.logprobs is not None and item.right is not None
    return log_sum_exp(seen.logprobs) - seen.logprobs[item.right]


def _refusal_margin(_: Item, seen: Observation) -> float:
    return openers.refusal_margin(seen.logprobs or [])


def log_sum_exp(values: list[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(one - highest) for one in values))


VALUES: dict[str, Callable[[Item, Observation], float | None]] = {
    "loss": lambda _, seen: seen.loss,
    "text_loss": lambda _, seen: seen.loss,
    "rouge_l": _rouge_l,
    "exact_match": _exact_match,
    "one_sentence": _one_sentence,
    "answer_tokens": lambda _, seen: None if seen.tokens is None else float(seen.tokens),
    "stops": lambda _, seen: float(bool(seen.ended)),
    "repetition": _repetition,
    "tool_call_valid": _tool_call_valid,
    "acc": _acc,
    "brier": _brier,
    "nll": _nll,
    "refusal_margin": _refusal_margin,
}
