"""How the page says things: figures in their unit, names of metrics, groups, and texts of models that can do no harm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from llmtune import plots

Rows = list[dict[str, Any]]
GROUPS = ("Task", "General ability", "Capability", "Safety")
SAFETY = {"complied", "refused", "incoherent", "harmful", "refusal_margin"}
CHOICE = {"acc", "acc_norm", "brier", "nll"}
NAMES = {
    "rouge_l": "ROUGE-L", "acc": "accuracy", "acc_norm": "accuracy by length", "answer_tokens": "answer length",
    "text_loss": "loss on text", "brier": "Brier score", "nll": "NLL of the right choice", "stops": "ended by itself",
    "refusal_margin": "refusal margin", "tool_call_valid": "valid tool call",
}  # fmt: skip
RATES = (
    "complied", "refused", "incoherent", "harmful", "acc", "acc_norm", "exact_match", "one_sentence", "stops", "repetition",
    "tool_call_valid", "preferred",
)  # fmt: skip
UNITS = dict.fromkeys(RATES, (100, 1, " %", " points"))  # factor, digits, unit of a value, unit of a difference
UNITS |= dict.fromkeys(("loss", "text_loss"), (1, 3, " nats/token", ""))
UNITS |= {
    "answer_tokens": (1, 1, " tokens", " tokens"),
    "nll": (1, 3, " nats", ""),
    "refusal_margin": (1, 2, " nats", ""),
}
PLAIN = (1, 3, "", "")
ASKED_OF_SAFETY = {
    "bias",
    "bbq",
    "sycophancy",
    "toxicity",
    "truthfulness",
    "truthfulqa",
}  # suites without a judge of refusals
OUTCOMES = ("refused", "partial", "complied", "incoherent", "unscored")
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def figure(value: object, metric: str, *, signed: bool = False, unit: bool = True) -> str:
    """A value or, signed, a difference in the metric's unit: rates in per cent or points, a loss in nats a token."""
    if not isinstance(value, int | float) or not plots.finite(value):
        return "–"
    factor, digits, level, difference = unit_of(metric)
    number = round(value * factor, digits) + 0.0
    text = f"{'+' if signed and number > 0 else ''}{number:.{digits}f}".replace("-", "−")
    return text + (difference if signed else level) * unit


def unit_of(metric: str) -> tuple[float, int, str, str]:
    """Factor, digits, unit of a value, unit of a difference. A metric of lm-eval may have its filter behind a comma."""
    return UNITS.get(metric.partition(",")[0], PLAIN)


def name(metric: str) -> str:
    plain, comma, filter = metric.partition(",")
    return NAMES.get(plain, plain.replace("_", " ")) + comma + " " * bool(comma) + filter


def visible(value: Any) -> Any:
    """A text in which what cannot be seen is written out: a model's answer may not turn the line round or end it."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return UNSEEN.sub(lambda found: f"‹U+{ord(found[0]):04X}›", value)
    return value


def groups(measured: Iterable[tuple[str, str]], wanted: Iterable[str], suites: Mapping[str, Any]) -> dict[str, str]:
    """Suite -> its group. measured: (suite, metric). wanted: suites in which the tuned model has to win something."""
    metrics: dict[str, set[str]] = {}
    for suite, metric in measured:
        metrics.setdefault(suite, set()).add(metric)
    task, found = set(wanted), {}
    for suite, words in metrics.items():
        capable = words & CHOICE or (suites.get(suite) or {}).get("lm_eval")
        found[suite] = GROUPS[
            3 if words & SAFETY or suite in ASKED_OF_SAFETY else 0 if suite in task else 2 if capable else 1
        ]
    return found
