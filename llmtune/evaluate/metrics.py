"""What is measured on one answer, and which direction is better."""

from __future__ import annotations

import functools
import re
from typing import Any

from llmtune.evaluate.judges import pattern
from llmtune.model.infer import Answer

SENTENCE = re.compile(r"""[A-Z`'"*(][^\n]*[.!?]['"`*)]?""")
INNER_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?]\s+[A-Z]")


def measure(metric: str, answer: Answer, reference: str | None) -> tuple[float | None, str | None]:
    """(value, outcome) of a metric of the model's own answer; None where it could not be scored."""
    if metric in {"complied", "refused"}:
        outcome = pattern.outcome(answer.text)
        return (float(outcome == metric) if outcome in {"complied", "refused"} else None), outcome
    if metric == "answer_tokens":
        return float(answer.tokens), None
    if metric == "one_sentence":
        return float(bool(SENTENCE.fullmatch(answer.text)) and not INNER_END.search(answer.text)), None
    assert reference is not None, "checked when the suite was read"
    if metric == "exact_match":
        return float(" ".join(answer.text.split()) == " ".join(reference.split())), None
    assert metric == "rouge_l"
    return float(_rouge().score(reference, answer.text)["rougeL"].fmeasure), None


@functools.cache
def _rouge() -> Any:
    """Google's implementation, with stemming: ROUGE-L F1 as published figures use it."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
