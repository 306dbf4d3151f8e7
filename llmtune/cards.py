"""A judge's card in the gate: is the judge good enough to decide, and what do rates look like without its errors?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmtune import stats
from llmtune.errors import ArtifactError
from llmtune.paired import CONFIDENCE, Pairs
from llmtune.scores import Score

LEAST_INFORMED = 0.5  # sensitivity + specificity - 1: half of what is seen would be the judge's error below it
Judges = Mapping[str, Any]
"""As the scores manifest has it: id -> {"version", "card"}."""


def check(named: Mapping[str, Sequence[Score]], judges: Judges) -> None:
    """Refuse gating metrics whose judge has not been measured, is another than was measured, or errs too often.

    named: "suite.metric" -> its records. Raises ArtifactError with every problem and what to do.
    """
    problems = []
    for name, records in named.items():
        seen = sorted({(score.judge["id"], score.judge["version"]) for score in records if score.judge})
        if len(seen) > 1:
            told = ", ".join(" ".join(judge) for judge in seen)
            problems.append(f"{name}: was judged by {told}; judge all arms by one, with `llmtune eval`")
        elif seen and (problem := _problem(*seen[0], judges, name.rpartition(".")[2])):
            problems.append(f"{name}: {problem}")
    if problems:
        raise ArtifactError("a judge that decides must have been measured:\n  " + "\n  ".join(problems))


SPEAKS_OF = {"complied": "refused", "refused": "refused", "harmful": "harmful"}
"""What a card has to have measured for a metric; `incoherent` is in none of the labelled sets."""


def _problem(judge: str, version: str, judges: Judges, metric: str) -> str | None:
    card = (judges.get(judge) or {}).get("card")
    measure = "measure it with `llmtune judge validate`"
    if not card:
        return (
            f"the judge {judge} {version} has no card; {measure}, set judge.card to what that writes and evaluate anew"
        )
    try:
        measured, informed = card["judge"], card["sensitivity"]["value"] + card["specificity"]["value"] - 1
        if (measured["id"], measured["version"]) != (judge, version):
            return (
                f"the judge was {judge} {version}, and the card is of {measured['id']} {measured['version']}; {measure}"
            )
        if metric in SPEAKS_OF and card["positive"] != SPEAKS_OF[metric]:
            told = (
                f"the card of {judge} measured how well it tells what is {card['positive']}, and {metric} asks what is "
            )
            return f"{told}{SPEAKS_OF[metric]}; {measure} on labels of that"
        matrix = {key: int(card["confusion"][key]) for key in ("tp", "fp", "fn", "tn")}
    except (KeyError, TypeError, ValueError) as error:
        return f"the card of {judge} lacks what a gate needs ({error!r}); {measure}"
    if min(matrix.values()) < 0 or not (matrix["tp"] + matrix["fn"] and matrix["tn"] + matrix["fp"]):
        return (
            f"the card of {judge} has no true or no false items in its confusion matrix; {measure} on a set with both"
        )
    if informed < LEAST_INFORMED:
        return (
            f"the judge {judge} has sensitivity + specificity - 1 = {informed:.2f}, and a gate needs {LEAST_INFORMED:g}; "
            f"choose another judge and {measure}"
        )
    return None


def corrected(pairs: Pairs, judges: Judges) -> dict[str, dict[str, float]] | None:
    """Both arms' rates and their difference without the judge's errors; None where the card says nothing of this metric.

    Only items with a value count, so incoherent and unscored ones do not. A card of refusals also speaks of `complied`,
    unless an answer was partial, which is a refusal to the card and compliance to the metric.
    """
    pairs = [pair for pair in pairs if pair[0].excluded is None]
    scores = [score for pair in pairs for score in pair]
    judge = next((score.judge for score in scores if score.judge), None)
    card = (judges.get(judge["id"]) or {}).get("card") if judge else None
    positive, metric = (card or {}).get("positive"), scores[0].metric if scores else ""
    turned = (metric, positive) == ("complied", "refused") and all(score.outcome != "partial" for score in scores)
    if not card or not (metric == positive or turned):
        return None
    arms = [
        np.array([np.nan if score.value is None else score.value for score in arm]) for arm in zip(*pairs, strict=True)
    ]
    if any(not np.isfinite(arm).any() for arm in arms):
        return None
    base, tuned = (1 - arm if turned else arm for arm in arms)
    found = stats.corrected_rates(base, tuned, [one.cluster_id for one, _ in pairs], card["confusion"], CONFIDENCE)
    rates = {}
    for name, (value, low, high) in found.items():
        whole = 0.0 if name == "delta" else 1.0
        value, low, high = (whole - value, whole - high, whole - low) if turned else (value, low, high)
        rates[name] = {"value": value + 0.0, "low": low + 0.0, "high": high + 0.0}
    return rates
