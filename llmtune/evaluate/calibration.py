"""Can a model's confidence in the choices of an item be believed? Brier, NLL and ECE of each arm, and one temperature.

An ECE is never zero: with 50 items and 10 bins a perfectly calibrated model shows about .13. So each stands beside what perfect
calibration would show on the very same confidences, and what is compared between arms is Brier and NLL, item by item.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune import stats
from llmtune.evaluate.observations import Observation
from llmtune.evaluate.suites import Item
from llmtune.stats import Floats

BINS = 10
DRAWS = 2_000  # of correctness under perfect calibration
FOLDS = 5
LEAST_CLUSTERS = 20  # below it a bootstrap over clusters is too narrow, and no temperature is fitted
HOTTEST = 20.0  # temperatures are sought between 1 / HOTTEST and HOTTEST
CONFIDENCE = 0.90  # two-sided: its low end is a one-sided 95 % bound


@dataclass(frozen=True)
class Answers:
    """What one arm gave the choices of n items.

    logprobs: shape (n, k), nats, -inf where an item has fewer than k choices. right: shape (n,), the index of the right choice.
    clusters: n labels; items of one cluster are resampled together and never split over two folds.
    """

    logprobs: Floats
    right: npt.NDArray[np.int64]
    clusters: list[str]

    def __post_init__(self) -> None:
        n, k = self.logprobs.shape
        if not (n and len(self.right) == len(self.clusters) == n and ((self.right >= 0) & (self.right < k)).all()):
            raise ValueError(f"needs one right choice and one cluster an item, got {n} x {k} log-probabilities")
        if not np.isfinite(self.logprobs[np.arange(n), self.right]).all() or np.isnan(self.logprobs).any():
            raise ValueError("the log-probability of a right choice is not finite")

    def take(self, chosen: npt.NDArray[Any]) -> Answers:
        return Answers(
            self.logprobs[chosen], self.right[chosen], [self.clusters[i] for i in np.arange(len(self.right))[chosen]]
        )


def answers(choices: Sequence[Sequence[float]], right: Sequence[int], clusters: Sequence[str]) -> Answers:
    """`Answers` from lists of unequal length, padded with -inf."""
    padded = np.full((len(choices), max(map(len, choices))), -np.inf)
    for row, given in zip(padded, choices, strict=True):
        row[: len(given)] = given
    return Answers(padded, np.asarray(right, dtype=np.int64), list(clusters))


def probabilities(given: Answers, temperature: float = 1.0) -> Floats:
    """Shape (n, k): the softmax of the choices' log-probabilities over the temperature; rows sum to 1."""
    shifted = (given.logprobs - given.logprobs.max(axis=1, keepdims=True)) / temperature
    weights = np.exp(shifted)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def brier(given: Answers, temperature: float = 1.0) -> Floats:
    """Per item, in [0, 2]: the squared distance of the probabilities from 1 on the right choice. Source: Brier 1950."""
    wrong = probabilities(given, temperature)
    wrong[np.arange(len(wrong)), given.right] -= 1
    return np.asarray((wrong**2).sum(axis=1))


def nll(given: Answers, temperature: float = 1.0) -> Floats:
    """Per item, in nats: minus the log of the right choice's probability among the choices."""
    shifted = (given.logprobs - given.logprobs.max(axis=1, keepdims=True)) / temperature
    return np.asarray(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(given.right)), given.right])


def reliability(confidence: Floats, correct: npt.NDArray[Any], bins: int = BINS) -> list[dict[str, float]]:
    """Equal-mass bins from the least to the most confident: mean confidence, accuracy and number of items of each.

    confidence: shape (n,), probability of the likeliest choice. correct: shape (n,), 0 or 1. With fewer items than bins, one
    item a bin.
    """
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence)))
    return [
        {"confidence": float(confidence[part].mean()), "accuracy": float(correct[part].mean()), "n": len(part)}
        for part in parts
    ]


def expected_calibration_error(confidence: Floats, correct: npt.NDArray[Any], bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy over equal-mass bins, in [0, 1].

    Biased upwards where items are few: read it beside `error_if_calibrated`, and compare arms by Brier or NLL.
    Raises ValueError when a confidence is outside [0, 1]. Source: Naeini et al. 2015; equal-mass bins after Nguyen & O'Connor 2015.
    """
    if not ((confidence >= 0) & (confidence <= 1 + 1e-9)).all():
        raise ValueError("a confidence is outside [0, 1]")
    rows = reliability(confidence, correct, bins)
    return sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(confidence)


def error_if_calibrated(confidence: Floats, bins: int = BINS, seed: int = 0) -> tuple[float, float]:
    """The mean and the 95 % point of the ECE that these very confidences show when they are exactly right.

    Simulated: each item is correct with a probability equal to its confidence. An ECE above the second number is
    miscalibration beyond chance.
    """
    ordered, rng = np.sort(confidence), np.random.default_rng(seed)
    parts = np.array_split(np.arange(len(ordered)), min(bins, len(ordered)))
    starts = [part[0] for part in parts]
    errors = np.empty(DRAWS)
    chunk = max(1, stats.CHUNK // len(ordered))
    for start in range(0, DRAWS, chunk):
        drawn = rng.random((min(chunk, DRAWS - start), len(ordered))) < ordered
        errors[start : start + chunk] = np.abs(np.add.reduceat(ordered - drawn, starts, axis=1)).sum(axis=1) / len(
            ordered
        )
    return float(errors.mean()), float(np.quantile(errors, 0.95))


def fit_temperature(given: Answers) -> float:
    """The temperature with the lowest mean NLL, between 1 / HOTTEST and HOTTEST.

    The NLL is convex in 1 / temperature, so its slope is bisected. Source: Guo et al. 2017, temperature scaling.
    """
    shifted = given.logprobs - given.logprobs.max(axis=1, keepdims=True)
    known = np.where(np.isfinite(shifted), shifted, 0.0)
    on_right = known[np.arange(len(known)), given.right].mean()
    low, high = -np.log(HOTTEST), np.log(HOTTEST)
    for _ in range(50):
        middle = (low + high) / 2
        slope = (probabilities(given, float(np.exp(-middle))) * known).sum(axis=1).mean() - on_right
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def temperature(given: Answers, seed: int = 0) -> dict[str, Any] | None:
    """{"value", "kept", "nll_before", "nll_after"}, or None below LEAST_CLUSTERS clusters.

    Each item's NLL after is under the temperature of the other folds, and a cluster is never in two. `kept`: the one-sided 95 %
    bound of the mean improvement, by the bootstrap over clusters, is above zero. `value` is fitted on all items.
    """
    names = np.unique(np.asarray(given.clusters))
    if len(names) < LEAST_CLUSTERS:
        return None
    shuffled = np.random.default_rng(seed).permutation(len(names))
    fold = shuffled[np.searchsorted(names, np.asarray(given.clusters))] % FOLDS
    before, after = nll(given), np.empty(len(fold))
    for number in range(FOLDS):
        held_out = fold == number
        after[held_out] = nll(given.take(held_out), fit_temperature(given.take(~held_out)))
    low, _ = stats.cluster_bootstrap_interval(before - after, given.clusters, CONFIDENCE)
    return {
        "value": fit_temperature(given),
        "kept": low > 0,
        "nll_before": float(before.mean()),
        "nll_after": float(after.mean()),
    }


def summarise(
    arms: Mapping[str, Answers], slices: Mapping[str, Sequence[str]], against: str = "base"
) -> dict[str, Any]:
    """One suite's entry of `calibration.json`: every arm on the same items, and by slice.

    slices: field -> its value for each item. An arm other than `against` also has its `change` in Brier and NLL, item by item.
    """
    first = next(iter(arms.values()))
    entry: dict[str, Any] = {"n": len(first.right), "classes": first.logprobs.shape[1]}
    for arm, given in arms.items():
        entry[arm] = _figures(given, whole=True)
        if arm != against and against in arms:
            entry[arm]["change"] = {
                name: _change(score(given) - score(arms[against]), given.clusters)
                for name, score in (("brier", brier), ("nll", nll))
            }
    entry["slices"] = {
        field: {
            value: {arm: _figures(given.take(np.asarray(values) == value), whole=False) for arm, given in arms.items()}
            for value in sorted(set(values))
        }
        for field, values in slices.items()
    }
    return entry


def of_observations(seen: Iterable[Observation], items: Mapping[tuple[str, str], Item]) -> dict[str, dict[str, Any]]:
    """What `calibration.json` holds: an entry for every suite whose choices were given log-probabilities.

    Counted are the items that every arm of the suite answered and that are not excluded; `unscored` says how many others there are.
    """
    given: dict[str, dict[str, dict[str, list[float]]]] = {}
    for one in seen:
        if one.logprobs and items[one.suite, one.item_id].right is not None:
            given.setdefault(one.suite, {}).setdefault(one.arm, {})[one.item_id] = one.logprobs
    found = {}
    for suite, arms in given.items():
        asked = list(dict.fromkeys(identity for of_arm in arms.values() for identity in of_arm))
        usable = [items[suite, identity] for identity in asked if _usable(items[suite, identity], arms.values())]
        if usable:
            clusters, right = [item.cluster_id for item in usable], [int(item.right or 0) for item in usable]
            answered = {
                arm: answers([its[item.item_id] for item in usable], right, clusters) for arm, its in arms.items()
            }
            fields = {field for item in usable for field in item.slices}
            slices = {field: [item.slices.get(field, "") for item in usable] for field in sorted(fields)}
            found[suite] = summarise(answered, slices) | {"unscored": len(asked) - len(usable)}
    return found


def _usable(item: Item, arms: Iterable[Mapping[str, list[float]]]) -> bool:
    rows = [of_arm.get(item.item_id, []) for of_arm in arms]
    return item.excluded is None and all(row and np.isfinite(row).all() for row in rows)


def _figures(given: Answers, *, whole: bool) -> dict[str, Any]:
    chances = probabilities(given)
    confidence, correct = chances.max(axis=1), chances.argmax(axis=1) == given.right
    error, (expected, at_most) = expected_calibration_error(confidence, correct), error_if_calibrated(confidence)
    figures: dict[str, Any] = {
        "n": len(correct),
        "brier": float(brier(given).mean()),
        "nll": float(nll(given).mean()),
        "ece": error,
        "ece_null": expected,
    }
    if whole:
        trusted, right = float(confidence.mean()), float(correct.mean())
        figures |= {
            "ece_null_95": at_most,
            "confidence": trusted,
            "accuracy": right,
            "bins": reliability(confidence, correct),
            "temperature": temperature(given),
            "says": _says(error > at_most, trusted, right, len(correct)),
        }
    return figures


def _says(beyond_chance: bool, confidence: float, accuracy: float, n: int) -> str:
    if not beyond_chance:
        return f"no miscalibration that {n} items could show"
    how = "over-confident" if confidence > accuracy else "under-confident"
    return f"{how} beyond chance: right on {accuracy:.0%} of the items, at a mean confidence of {confidence:.0%}"


def _change(delta: Floats, clusters: list[str]) -> dict[str, float]:
    low, high = stats.cluster_bootstrap_interval(delta, clusters, CONFIDENCE)
    return {"value": float(delta.mean()), "low": low, "high": high}
