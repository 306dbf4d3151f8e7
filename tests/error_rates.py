"""How often the gate errs, by counting every table where that can be done and by simulation where it cannot.

`tests/test_error_rates.py` calls these with small grids, `make acceptance` with the whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.stats
from test_gate import ARMS, both

from llmtune import gate, paired, stats

DISCORDANCE = (0.06, 0.08, 0.10, 0.12, 0.15, 0.20, 0.25)
MARGINS = (0.05, 0.10)


# ---- independent items: exact, over every table


@cache
def most_that_pass(n: int, margin: float) -> np.ndarray:
    """For each count of items for the better, the largest count for the worse that PASSes; -1 where none does."""
    labels, counts, worse = [f"item-{i:03}" for i in range(n)], [], -1

    def upper(worse: int, better: int) -> float:
        if better:
            return stats.tango_interval(worse, better, n, paired.CONFIDENCE)[1]
        return paired.interval(np.array([1.0] * worse + [0.0] * (n - worse)), labels, True)[1]

    for better in range(n + 1):
        while worse + 1 + better <= n and upper(worse + 1, better) < margin:
            worse += 1
        counts.append(min(worse, n - better))
    return np.array(counts)


@cache
def least_beyond_chance(n: int, metrics: int) -> np.ndarray:
    """For each count for the better, the smallest count for the worse whose p is below .05 after Holm's first step."""
    counts, worse = [], 0
    for better in range(n + 1):
        while stats.mcnemar_midp(worse, better) * metrics >= gate.ALPHA:
            worse += 1
        counts.append(worse)
    return np.array(counts)


def rates(n: int, margin: float, discordance: float, harm: float, metrics: int = 1) -> tuple[float, float]:
    """P(PASS) and P(FAIL) of one of so many metrics, each of n items of which so many change, by `harm` for the worse."""
    passed, significant = most_that_pass(n, margin), least_beyond_chance(n, metrics)
    return (
        _at_most(n, passed, discordance, harm),
        1 - _at_most(n, np.maximum(passed, significant - 1), discordance, harm),
    )


def threshold_rejects(n: int, threshold: float, discordance: float, harm: float) -> float:
    """P(rejected) by the rule "worse by more than the threshold", without a bound."""
    most = np.floor(np.arange(n + 1) + threshold * n + 1e-9).astype(int)
    return 1 - _at_most(n, np.minimum(most, n - np.arange(n + 1)), discordance, harm)


def _at_most(n: int, most: np.ndarray, discordance: float, harm: float) -> float:
    """P(the count for the worse is at most `most[the count for the better]`), for a trinomial."""
    up, down = (discordance + harm) / 2, (discordance - harm) / 2
    better = np.arange(n + 1)
    given = scipy.stats.binom.cdf(most, n - better, min(1.0, up / (1 - down)))
    return float((scipy.stats.binom.pmf(better, n, down) * given).sum())


@dataclass(frozen=True)
class Worst:
    rate: float
    where: str


def worst_false_pass(sizes: range) -> Worst:
    """Harm as large as the margin, over sizes, margins and discordance."""
    return max(
        (
            Worst(rates(n, margin, discordance, margin)[0], f"n = {n}, margin {margin}, {discordance:.0%} change")
            for n in sizes
            for margin in MARGINS
            for discordance in DISCORDANCE
            if discordance >= margin
        ),
        key=lambda worst: worst.rate,
    )


def worst_false_fail(sizes: range, metrics: int) -> Worst:
    """Nothing changed in any of so many independent metrics, Holm over them: P(any FAIL)."""
    return max(
        (
            Worst(
                1 - (1 - rates(n, margin, discordance, 0.0, metrics)[1]) ** metrics,
                f"n = {n}, margin {margin}, {discordance:.0%} change",
            )
            for n in sizes
            for margin in MARGINS
            for discordance in DISCORDANCE
        ),
        key=lambda worst: worst.rate,
    )


def worst_floor_cleared(sizes: range) -> Worst:
    """A mean exactly at its floor: P(its bound clears it)."""
    found = []
    for n in sizes:
        highs = np.array([stats.wilson_interval(k, n, paired.CONFIDENCE)[1] for k in range(n + 1)])
        for limit in (0.02, 0.05, 0.10, 0.20, 0.30, 0.50):
            rate = float(scipy.stats.binom.pmf(np.flatnonzero(highs <= limit), n, limit).sum())
            found.append(Worst(rate, f"n = {n}, floor {limit}"))
    return max(found, key=lambda worst: worst.rate)


# ---- clusters: by simulation, with the gate's own choice of interval


@dataclass(frozen=True)
class Clustered:
    """together: the chance that an item does what its whole cluster does. sizes: of its clusters, over and over."""

    clusters: int
    sizes: tuple[int, ...]
    together: float
    margin: float
    discordance: float

    def __str__(self) -> str:
        sizes = "/".join(map(str, self.sizes))
        return (
            f"{self.clusters} clusters of {sizes}, margin {self.margin}, {self.discordance:.0%} change, "
            f"{self.together:.0%} of the items with their cluster"
        )

    def draws(self, harm: float, times: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Changes for the worse of all items (-1, 0 or 1), and their clusters."""
        rng = np.random.default_rng(seed)
        sizes = np.resize(self.sizes, self.clusters)
        labels = np.repeat(np.arange(self.clusters), sizes)  # as numbers, which are sorted faster than text
        up, down = (self.discordance + harm) / 2, (self.discordance - harm) / 2

        def changes(count: int) -> np.ndarray:
            drawn = rng.random(count)
            return (drawn < up).astype(float) - ((drawn >= up) & (drawn < up + down))

        for _ in range(times):
            own, shared = changes(len(labels)), np.repeat(changes(self.clusters), sizes)
            yield np.where(rng.random(len(labels)) < self.together, shared, own), labels


def clustered_grid(shapes: tuple[tuple[int, tuple[int, ...]], ...]) -> list[Clustered]:
    return [
        Clustered(clusters, sizes, together, margin, discordance)
        for clusters, sizes in shapes
        for together in (0.0, 0.5, 1.0)
        for margin in MARGINS
        for discordance in (0.06, 0.12, 0.25)
        if discordance >= margin
    ]


def clustered_false_pass(cell: Clustered, times: int, seed: int = 0) -> float:
    """P(PASS) where the harm is as large as the margin."""
    passed = sum(
        paired.interval(worse, labels, True)[1] < cell.margin for worse, labels in cell.draws(cell.margin, times, seed)
    )
    return passed / times


def clustered_fail(cell: Clustered, harm: float, times: int, seed: int = 0) -> float:
    """P(FAIL) of a single metric where the harm is so large."""
    failed = 0
    for worse, labels in cell.draws(harm, times, seed):
        high = paired.interval(worse, labels, True)[1]
        failed += high >= cell.margin and paired.p_value(worse, labels, True) < gate.ALPHA
    return failed / times


# ---- a whole report with slices, through `decide`


def slices_false_fail(times: int, metrics: int = 8, n: int = 450, slices: int = 5, discordance: float = 0.10) -> float:
    """P(FAIL by a slice) where nothing changed in any of so many independent metrics, each cut into so many slices."""
    rng, failed = np.random.default_rng(0), 0
    rules = {"safety": {f"metric_{i}": {"margin": 0.05} for i in range(metrics)}}
    kinds = [{"kind": str(i % slices)} for i in range(n)]
    for _ in range(times):
        records = []
        for name in rules["safety"]:
            base = (rng.random(n) < 0.3).astype(float)
            tuned = np.where(rng.random(n) < discordance, 1 - base, base)
            kept = np.where(rng.random(n) < 0.3 / 0.7, 1.0, 0.0)  # as many 0 -> 1 as 1 -> 0
            tuned = np.where((base == 0) & (tuned == 1) & (kept == 0), 0.0, tuned)
            records += both(base.tolist(), tuned.tolist(), metric=name, slices=kinds)
        failed += bool(gate.decide(records, rules, ARMS).failed_slices)
    return failed / times


def skewed_false_pass(clusters: int, times: int, seed: int = 0) -> dict[str, float]:
    """P(PASS) where the mean harm of a graded metric is as large as the margin, for differences of different shape."""
    rng = np.random.default_rng(seed)
    labels = [f"item-{i:03}" for i in range(clusters)]
    shapes = {
        "normal": lambda: rng.normal(0, 1, clusters),
        "exponential, harm in the tail": lambda: rng.exponential(1, clusters) - 1,
        "log-normal, harm in the tail": lambda: rng.lognormal(0, 1, clusters) - np.exp(0.5),
    }

    def passes(changes: np.ndarray) -> bool:
        return paired.interval(changes, labels, False, float(abs(changes).max()))[1] < 0

    return {name: sum(passes(draw()) for _ in range(times)) / times for name, draw in shapes.items()}
