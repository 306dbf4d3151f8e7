"""Bounds and tests for paired comparisons, two models on the same items, and for the level of one of them.

Score intervals are for 0/1 values and wherever few items changed, the cluster bootstrap for the rest: harm as large
as the margin passes a paired t up to 12 % of the time instead of 5 %, and a bootstrap of few changes up to 33 %.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Floats = npt.NDArray[np.float64]
NORMAL = NormalDist()
WHOLE = 5  # changed clusters' worth of belief that clusters change whole
CHUNK = 2_000_000  # resampled clusters in memory at once, in three arrays of 16 MB


def tango_interval(b: float, c: float, n: float, confidence: float) -> tuple[float, float]:
    """Score interval for the paired difference (b - c) / n, within [-1, 1].

    b: pairs with the event in the first arm only. c: in the second only. n: all pairs. They may be fractional (an
    effective number of pairs). Never of width zero: 20 pairs without a flip leave (-.119, .119) at 90 %.
    Raises ValueError when b or c is negative, b + c > n, n <= 0 or confidence is not in (0, 1).
    Source: Tango 1998, Statistics in Medicine 17:891-908; the score test inverted by bisection.
    """
    if not (b >= 0 and c >= 0 and n > 0 and b + c <= n * (1 + 1e-9)):
        raise ValueError(f"needs 0 <= b, 0 <= c, b + c <= n and n > 0, got b={b}, c={c}, n={n}")
    z = _two_sided_z(confidence)
    return -_tango_upper(c, b, n, z), _tango_upper(b, c, n, z)


def _tango_upper(b: float, c: float, n: float, z: float) -> float:
    low, high = (b - c) / n, 1.0
    for _ in range(60):
        delta = (low + high) / 2
        within = b - c - n * delta + z * math.sqrt(_score_variance(delta, b, c, n)) > 0
        low, high = (delta, high) if within else (low, delta)
    return high


def _score_variance(delta: float, b: float, c: float, n: float) -> float:
    """Of b - c where the true difference is delta, with P(event in the second arm only) at its likeliest."""
    linear = (2 * n - b + c) * delta - b - c
    second = (math.sqrt(max(0.0, linear**2 + 8 * n * c * delta * (1 - delta))) - linear) / (4 * n)
    return max(0.0, n * (2 * second + delta * (1 - delta)))


def tango_over_clusters(
    values: npt.ArrayLike, clusters: Sequence[str], confidence: float, spread: float = 1.0
) -> tuple[float, float]:
    """Score interval for the mean of `values`, for when few clusters changed and a bootstrap sees no tail.

    values: shape (n,), paired differences, each within [-spread, spread]. clusters: n labels. Each cluster counts as
    one pair that flips by its mean: as a bounded variable varies most when it takes its extremes only, this errs
    towards wide. Unequal clusters count as (sum of sizes)^2 / (sum of squares) pairs (Kish 1965). With n singleton
    clusters and values of -1, 0 and 1 it is `tango_interval`.
    Raises ValueError as `cluster_bootstrap_interval` does, or when a value exceeds the spread.
    """
    sums, sizes = sums_by_cluster(values, clusters)
    pairs = float(sizes.sum() ** 2 / (sizes**2).sum())
    worse = pairs * float(np.maximum(sums, 0).sum() / sizes.sum()) / spread
    better = pairs * float(np.maximum(-sums, 0).sum() / sizes.sum()) / spread
    low, high = tango_interval(worse, better, pairs, confidence)
    return spread * low, spread * high


def tango_by_design(values: npt.ArrayLike, clusters: Sequence[str], confidence: float) -> tuple[float, float]:
    """Score interval for the mean of paired differences of 0/1 values whose clusters vary together.

    values: shape (n,), each -1, 0 or 1. clusters: n labels. The items count as n / `design_effect` pairs. With n singleton
    clusters it is `tango_interval`. Raises ValueError as `design_effect` does.
    Source: Rao & Scott 1992, Biometrics 48:577-585, on Tango 1998.
    """
    array, effect = np.asarray(values, dtype=np.float64), design_effect(values, clusters, confidence)
    worse, better = (float(np.count_nonzero(side)) / effect for side in (array > 0, array < 0))
    return tango_interval(worse, better, len(array) / effect, confidence)


def design_effect(values: npt.ArrayLike, clusters: Sequence[str], confidence: float) -> float:
    """How many items of these clusters are as good as one independent one, 1 at least.

    The variance of the mean over clusters by that over items; as few changed clusters do not show how they vary, it is
    averaged with what it would be if clusters changed whole (Kish 1965), by the weight of `WHOLE` changed clusters, which are
    counted as they weigh. And as much larger as Student's quantile is, for the number of clusters.
    Raises ValueError as `cluster_bootstrap_interval` does, or with a single cluster.
    """
    array = np.asarray(values, dtype=np.float64)
    sums, sizes = sums_by_cluster(array, clusters)
    n, count = len(array), len(sums)
    if count < 2:
        raise ValueError("needs two clusters to see how they vary")
    if count == n:
        return 1.0
    whole = float((sizes**2).sum()) / n
    changed = float(np.abs(sums).sum() ** 2 / (sums**2).sum()) if sums.any() else 0.0
    apart = float((array**2).sum() - array.sum() ** 2 / n)
    together = float(((sums - sizes * array.mean()) ** 2).sum()) * count / (count - 1)
    seen = max(1.0, together / apart) if apart > 0 else 1.0
    few = student(confidence, n / whole - 1) / _two_sided_z(confidence)
    return max(1.0, few**2 * max(seen, (seen * changed + whole * WHOLE) / (changed + WHOLE)))


def student(confidence: float, degrees: float) -> float:
    """The quantile of Student's t that leaves this confidence between it and its negative; for 9 degrees of freedom or more.

    Off by at most 1e-3 there. Source: Cornish & Fisher's expansion, Abramowitz & Stegun 26.7.5.
    """
    z, v = _two_sided_z(confidence), max(degrees, 1e-9)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def widened(confidence: float, clusters: int) -> float:
    """The confidence to ask of a bootstrap over so few clusters, which is too narrow as a normal interval is beside Student's.

    Source: Hesterberg 2015, The American Statistician 69:371-386, the expanded percentile interval.
    """
    return 2 * NORMAL.cdf(student(confidence, clusters - 1) * math.sqrt(clusters / (clusters - 1))) - 1


def wilson_interval(events: float, n: float, confidence: float) -> tuple[float, float]:
    """Score interval for a proportion, within [0, 1].

    events: how many of n; they may be fractional (an effective number). 0 of 60 leave (0, .043) at 90 %.
    Raises ValueError unless 0 <= events <= n and n > 0. Source: Wilson 1927, JASA 22:209-212.
    """
    if not (0 <= events <= n * (1 + 1e-9) and n > 0):
        raise ValueError(f"needs 0 <= events <= n and n > 0, got events={events}, n={n}")
    z, share = _two_sided_z(confidence), min(1.0, events / n)
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + z**2 / n)), min(1.0, (centre + half) / (1 + z**2 / n))


def wilson_over_clusters(
    values: npt.ArrayLike, clusters: Sequence[str], confidence: float, lowest: float = 0.0, spread: float = 1.0
) -> tuple[float, float]:
    """Score interval for the mean of `values`, each within [lowest, lowest + spread], where few clusters differ.

    Each cluster counts as one item that has its mean's share of the event, unequal ones as in `tango_over_clusters`, and
    for the same reason: it errs towards wide. With singleton clusters and values of 0 and 1 it is `wilson_interval`.
    """
    sums, sizes = sums_by_cluster((np.asarray(values, dtype=np.float64) - lowest) / spread, clusters)
    items = float(sizes.sum() ** 2 / (sizes**2).sum())
    low, high = wilson_interval(min(items, max(0.0, items * sums.sum() / sizes.sum())), items, confidence)
    return lowest + spread * low, lowest + spread * high


def clopper_pearson(events: int, n: int, confidence: float) -> tuple[float, float]:
    """Exact interval for a proportion: each end has at least this confidence on its own side, whatever the proportion.

    Raises ValueError unless 0 <= events <= n and n > 0. Source: Clopper & Pearson 1934, Biometrika 26:404-413, by bisection.
    """
    if not 0 <= events <= n or n <= 0:
        raise ValueError(f"needs 0 <= events <= n and n > 0, got events={events}, n={n}")
    tail, count = NORMAL.cdf(-_two_sided_z(confidence)), np.arange(events + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in count])

    def at_most(share: float, most: int) -> float:
        logs = ways[: most + 1] + count[: most + 1] * math.log(share) + (n - count[: most + 1]) * math.log1p(-share)
        return float(np.exp(logs).sum())

    def crossing(chance: float, most: int) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            share = (low + high) / 2
            low, high = (share, high) if at_most(share, most) > chance else (low, share)
        return high

    return crossing(1 - tail, events - 1) if events else 0.0, crossing(tail, events) if events < n else 1.0


def mcnemar_midp(b: int, c: int) -> float:
    """One-sided mid-p value against "b is not the likelier direction": small when b outnumbers c.

    P(X > b) + P(X = b) / 2 for X ~ Binomial(b + c, 1/2), in (0, 1); 0.5 when b = c. The two-sided mid-p is twice the
    smaller of the two directions. Raises ValueError when a count is negative.
    Source: Fagerland, Lydersen & Laake 2013, BMC Medical Research Methodology 13:91.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts cannot be negative, got b={b}, c={c}")
    n, at_half = b + c, math.lgamma(b + c + 1) - (b + c) * math.log(2)
    mass = [math.exp(at_half - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(b, n + 1)]
    return min(1.0, math.fsum(mass) - mass[0] / 2)


def mcnemar_clustered(values: npt.ArrayLike, clusters: Sequence[str]) -> float:
    """One-sided p-value against "the mean is 0 or less" for paired differences of 0/1 values in clusters.

    McNemar's test with a cluster's net change as one of its terms: their sum over the root of their squares' sum, in normal
    quantiles; 0.5 when nothing changed. With singleton clusters it is McNemar's without a continuity correction.
    Source: Obuchowski 1998, Statistics in Medicine 17:1495-1507, with the variance that holds under no change.
    """
    net = sums_by_cluster(values, clusters)[0]
    squares = float((net**2).sum())
    return 1 - NORMAL.cdf(float(net.sum()) / math.sqrt(squares)) if squares else 0.5


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given: comparing them with alpha holds the family's error.

    Raises ValueError when one is outside [0, 1]. Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"a p-value is outside [0, 1]: {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def cluster_bootstrap_interval(
    values: npt.ArrayLike, clusters: Sequence[str], confidence: float, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Interval for the mean of `values`, resampling whole clusters, bias-corrected and accelerated (BCa).

    values: shape (n,), finite. clusters: n labels; a large cluster weighs by its size. When every cluster has the same
    mean there is nothing to resample and (mean, mean) comes back: no evidence of certainty, see `tango_over_clusters`.
    Below 20 clusters it is too narrow. The same seed gives the same interval.
    Raises ValueError when nothing is given, lengths differ, a value is not finite or confidence is not in (0, 1).
    Source: Efron 1987, JASA 82:171-185; clusters after Davison & Hinkley 1997, 3.8.
    """
    z = _two_sided_z(confidence)
    means, mean, bias, acceleration = _bca(values, clusters, resamples, seed)
    if means is None:
        return mean, mean
    ends = [bias + end / max(1e-9, 1 - acceleration * end) for end in (bias - z, bias + z)]
    low, high = np.quantile(means, [NORMAL.cdf(end) for end in ends])
    return float(low), float(high)


def cluster_bootstrap_p(
    values: npt.ArrayLike, clusters: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> float:
    """One-sided p-value against "the mean is 0 or less": the level at which the interval's low end is 0.

    At least 1 / (resamples + 1); when all clusters have one mean, that for a mean > 0, else 1. Errors as above.
    """
    smallest, (means, mean, bias, acceleration) = 1 / (resamples + 1), _bca(values, clusters, resamples, seed)
    if means is None:
        return 1.0 if mean <= 0 else smallest
    below = (np.count_nonzero(means < 0) + np.count_nonzero(means <= 0)) / (2 * resamples)
    end = _quantile(below, resamples) - bias
    return max(smallest, NORMAL.cdf(end / max(1e-9, 1 + acceleration * end) - bias))


def _bca(
    values: npt.ArrayLike, clusters: Sequence[str], resamples: int, seed: int
) -> tuple[Floats | None, float, float, float]:
    """The resampled means (None when all clusters have one mean), the mean, BCa's bias and its acceleration."""
    sums, sizes = sums_by_cluster(values, clusters)
    mean = float(sums.sum() / sizes.sum())
    if np.allclose(sums, mean * sizes, rtol=1e-12, atol=1e-12 * float(np.abs(sums).max())):
        return None, mean, 0.0, 0.0
    rng, count = np.random.default_rng(seed), len(sums)
    means, chunk = np.empty(resamples), max(1, CHUNK // count)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, count, (min(chunk, resamples - start), count))
        means[start : start + chunk] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tied = np.isclose(means, mean, rtol=1e-12, atol=1e-12 * float(np.abs(means).max()))
    below = (np.count_nonzero((means < mean) & ~tied) + np.count_nonzero(tied) / 2) / resamples
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    gap = without.mean() - without
    return means, mean, _quantile(below, resamples), float((gap**3).sum() / (6 * (gap**2).sum() ** 1.5))


def _quantile(share: float, resamples: int) -> float:
    return NORMAL.inv_cdf(min(max(share, 0.5 / resamples), 1 - 0.5 / resamples))


def sums_by_cluster(values: npt.ArrayLike, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """The sum of the values in each cluster, and the clusters' sizes, in the order of their labels.

    Raises ValueError when nothing is given, lengths differ or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or len(clusters) != array.size or not np.isfinite(array).all():
        raise ValueError(f"needs one finite value a cluster label, got shape {array.shape} and {len(clusters)} labels")
    _, index, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    return np.bincount(index, weights=array).astype(np.float64), sizes.astype(np.float64)


def items_needed(
    variance: float, margin: float, spread: float = 0, confidence: float = 0.95, power: float = 0.8
) -> int:
    """Items for a one-sided bound to clear `margin` with this power when nothing truly changed, rounded up.

    variance: of one paired difference, in the margin's unit squared; for 0/1 values the share of items that flip.
    (z_confidence + z_power)^2 * variance / margin^2, 6.18 * variance / margin^2 as called without the rest. For a score
    interval also give `spread`, the largest change one item can show: it goes by the variance at the margin, and where
    few items flip the plain formula has a power of .5 or less. Raises ValueError unless variance >= 0 and margin > 0.
    """
    if not (variance >= 0 and margin > 0):
        raise ValueError(f"needs variance >= 0 and margin > 0, got {variance} and {margin}")
    each = variance / (2 * max(spread, margin) ** 2)  # the share of items that flip one way, as many as the other
    at_margin = spread**2 * _score_variance(margin / spread, each, each, 1) if spread > margin else variance
    needed = NORMAL.inv_cdf(confidence) * math.sqrt(at_margin) + NORMAL.inv_cdf(power) * math.sqrt(variance)
    return max(1, math.ceil((needed / margin) ** 2))


def items_needed_alone(
    variance: float, distance: float, at_limit: float | None = None, confidence: float = 0.95, power: float = 0.8
) -> int:
    """Items for a one-sided bound of one arm's mean to clear a limit that it is `distance` away from, rounded up.

    variance: of one item. at_limit: the same if the mean were at the limit, p (1 - p) for 0/1 values, by which a score
    interval goes. Raises ValueError unless both are >= 0 and distance > 0.
    """
    at_limit = variance if at_limit is None else at_limit
    if not (variance >= 0 and at_limit >= 0 and distance > 0):
        raise ValueError(f"needs variances >= 0 and distance > 0, got {variance}, {at_limit} and {distance}")
    needed = NORMAL.inv_cdf(confidence) * math.sqrt(at_limit) + NORMAL.inv_cdf(power) * math.sqrt(variance)
    return max(1, math.ceil((needed / distance) ** 2))


def rogan_gladen(rate: npt.ArrayLike, sensitivity: npt.ArrayLike, specificity: npt.ArrayLike) -> Floats:
    """The true rate behind one that a test with these errors has shown; numbers or arrays.

    Below 0 or above 1 where less or more was seen than the test's errors alone give. NaN where sensitivity + specificity
    is 1: such a test says nothing.
    Source: Rogan & Gladen 1978, American Journal of Epidemiology 107:71-76.
    """
    informed = np.asarray(sensitivity, dtype=np.float64) + np.asarray(specificity) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        true = (np.asarray(rate) + np.asarray(specificity) - 1) / np.where(informed == 0, np.nan, informed)
    return np.asarray(true, dtype=np.float64)


def corrected_rates(
    base: npt.ArrayLike,
    tuned: npt.ArrayLike,
    clusters: Sequence[str],
    confusion: dict[str, int],
    confidence: float,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """(value, low, high) of "base" and "tuned", within [0, 1], and "delta", within [-1, 1], without the errors of the test that gave them.

    base, tuned: shape (n,), 0 or 1 as the test said, NaN where it said nothing. clusters: n labels. confusion: what the
    test said of items whose truth is known, as "tp", "fp", "fn" and "tn". A bootstrap that weighs clusters (Bayesian, so
    that 0 events of n are not "certainly none": for single items it is Jeffreys' interval), and at the same time draws
    sensitivity and specificity from the matrix: what is not known of the test widens the intervals.
    Raises ValueError as `cluster_bootstrap_interval` does, or where an arm or a side of the matrix is empty.
    Source: Rubin 1981, Annals of Statistics 9:130-134; Brown, Cai & DasGupta 2001 for Jeffreys' interval.
    """
    tp, fp, fn, tn = (confusion[key] for key in ("tp", "fp", "fn", "tn"))
    arms = [np.asarray(arm, dtype=np.float64) for arm in (base, tuned)]
    seen = [np.isfinite(arm) for arm in arms]
    if not (tp + fn and tn + fp and all(there.any() for there in seen)):
        raise ValueError("needs values in both arms, and true and false items in the confusion matrix")
    rng = np.random.default_rng(seed)
    sensitivity, specificity = (rng.beta(right + 0.5, wrong + 0.5, resamples) for right, wrong in ((tp, fn), (tn, fp)))
    each = [(np.nan_to_num(arm), there) for arm, there in zip(arms, seen, strict=True)]
    sums = np.array([[sums_by_cluster(x, clusters)[0] for x in pair] for pair in each])  # arm, events or items, cluster
    drawn, count = np.empty((2, 2, resamples)), sums.shape[2]
    for start in range(0, resamples, chunk := max(1, CHUNK // count)):
        weights = rng.standard_exponential((min(chunk, resamples - start), count))
        drawn[..., start : start + chunk] = sums @ weights.T
    found: dict[str, tuple[float, Floats]] = {}
    for name, (events, items), (drawn_events, drawn_items) in zip(("base", "tuned"), sums, drawn, strict=True):
        event, other = rng.gamma(0.5, items.mean(), (2, resamples))
        rates = rogan_gladen((drawn_events + event) / (drawn_items + event + other), sensitivity, specificity)
        found[name] = float(rogan_gladen(events.sum() / items.sum(), tp / (tp + fn), tn / (tn + fp))), rates
    found["delta"] = found["tuned"][0] - found["base"][0], found["tuned"][1] - found["base"][1]
    told = {}
    for name, (value, rates) in found.items():
        ends = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
        value, low, high = np.clip([value, *ends], -1 if name == "delta" else 0, 1).tolist()
        told[name] = value, low, high
    return told


def _two_sided_z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1, got {confidence}")
    return NORMAL.inv_cdf((1 + confidence) / 2)
