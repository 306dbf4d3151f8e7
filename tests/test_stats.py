"""Every bound against a published value or another library; what no library has, against the test it inverts."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from scipy.optimize import brentq, minimize_scalar
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from llmtune import stats


def singletons(count):
    return [f"item-{i}" for i in range(count)]


# ---- Tango's score interval


@pytest.mark.parametrize(
    ("b", "c", "n", "confidence", "low", "high"),
    [
        (1, 7, 21, 0.95, -0.517, -0.026),  # airway hyper-responsiveness, Fagerland et al. 2014; R's ratesci
        (6, 16, 161, 0.95, -0.124, -0.005),  # complete response, the same paper's second data; derived
        (28, 25, 618, 0.90, -0.0148, 0.0247),  # R's PropCIs::scoreci.mp(25, 28, 618, 0.90)
        (7, 0, 14, 0.95, 0.177034, 0.732008),  # R's PropCIs::scoreci.mp(0, 7, 14, 0.95)
        (48, 41, 549, 0.90, -0.0157, 0.0414),  # R's PropCIs::scoreci.mp(41, 48, 549, 0.90)
        (9, 3, 32, 0.95, -0.027, 0.390),  # Tango 1998, first example
        (0, 1, 44, 0.90, -0.096, 0.037),  # Tango 1998, contact lenses: 43 of 44 pairs agree
        (16, 8, 86, 0.95, -0.020, 0.207),  # Agresti & Min 2005, a cross-over trial
    ],
)
def test_tango_gives_the_published_intervals(b, c, n, confidence, low, high):
    places = max(len(str(abs(low)).split(".")[1]), len(str(abs(high)).split(".")[1]))
    assert stats.tango_interval(b, c, n, confidence) == pytest.approx((low, high), abs=0.51 * 10**-places)


def score_test(delta, b, c, n):
    """Tango's statistic with its nuisance found by maximising the likelihood, not by the closed form."""

    def minus_log_likelihood(second):
        first, same = second + delta, 1 - 2 * second - delta
        terms = [(b, first), (c, second), (n - b - c, same)]
        return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    second = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    return (b - c - n * delta) / math.sqrt(n * (2 * second + delta - delta**2))


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (3, 2, 20), (12, 30, 200), (1, 1, 3), (0, 5, 40), (81, 1, 98)])
@pytest.mark.parametrize("confidence", [0.90, 0.95])
def test_tango_inverts_its_score_test(b, c, n, confidence):
    z = scipy.stats.norm.ppf((1 + confidence) / 2)
    estimate = (b - c) / n
    low = brentq(lambda delta: score_test(delta, b, c, n) - z, -1 + 1e-9, estimate - 1e-9)
    high = brentq(lambda delta: score_test(delta, b, c, n) + z, estimate + 1e-9, 1 - 1e-9)
    assert stats.tango_interval(b, c, n, confidence) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.parametrize(("n", "bound"), [(20, 0.119), (25, 0.098), (30, 0.083), (60, 0.043)])
def test_no_flip_at_all_still_leaves_room(n, bound):
    low, high = stats.tango_interval(0, 0, n, 0.90)
    z = scipy.stats.norm.ppf(0.95)
    assert high == pytest.approx(bound, abs=5e-4)
    assert high == pytest.approx(z**2 / (n + z**2), abs=1e-12)
    assert low == -high


def test_tango_at_its_edges():
    assert stats.tango_interval(5, 0, 5, 0.90)[1] == 1
    assert stats.tango_interval(0, 5, 5, 0.90)[0] == -1
    for n in range(1, 8):
        for b, c in itertools.product(range(n + 1), repeat=2):
            if b + c <= n:
                low, high = stats.tango_interval(b, c, n, 0.90)
                assert -1 <= low <= (b - c) / n <= high <= 1
                assert high - low > 0.1
                assert stats.tango_interval(c, b, n, 0.90) == pytest.approx((-high, -low), abs=1e-12)


@pytest.mark.parametrize("wrong", [(-1, 0, 5, 0.9), (0, -1, 5, 0.9), (3, 3, 5, 0.9), (0, 0, 0, 0.9), (1, 1, 5, 1.0)])
def test_tango_refuses_what_is_not_a_table(wrong):
    with pytest.raises(ValueError, match=r"needs|confidence"):
        stats.tango_interval(*wrong)


@pytest.mark.parametrize(
    ("n", "margin", "back"), [(40, 0.05, 0.02), (60, 0.10, 0.0), (60, 0.10, 0.05), (100, 0.05, 0.1)]
)
def test_harm_equal_to_the_margin_passes_at_most_about_five_percent_of_the_time(n, margin, back):
    """Exact, over every table: P(upper bound < margin) where the true difference is the margin."""
    worse, false_pass = margin + back, 0.0
    for b in range(n + 1):
        mass = scipy.stats.multinomial.pmf(
            [[b, c, n - b - c] for c in range(n - b + 1)], n, [worse, back, 1 - worse - back]
        )
        for c, probability in enumerate(mass):
            if (b - c) / n < margin and probability > 1e-9:
                false_pass += probability * (stats.tango_interval(b, c, n, 0.90)[1] < margin)
    assert false_pass <= 0.062


# ---- Tango over clusters


def test_over_singletons_it_is_tango():
    values = [1] * 7 + [-1] * 2 + [0] * 31
    expected = stats.tango_interval(7, 2, 40, 0.90)
    assert stats.tango_over_clusters(values, singletons(40), 0.90) == pytest.approx(expected)
    scaled = stats.tango_over_clusters([3 * v for v in values], singletons(40), 0.90, spread=3)
    assert scaled == pytest.approx([3 * end for end in expected])


def test_items_of_one_cluster_count_once():
    values = np.repeat([1.0] * 3 + [0.0] * 27, 5)
    clusters = np.repeat(singletons(30), 5).tolist()
    assert stats.tango_over_clusters(values, clusters, 0.90) == pytest.approx(stats.tango_interval(3, 0, 30, 0.90))


def test_unequal_clusters_count_for_less_than_their_number():
    sizes = [1] * 19 + [21]
    clusters = np.repeat(singletons(20), sizes).tolist()
    pairs = 40**2 / (19 + 21**2)
    expected = stats.tango_interval(0, 0, pairs, 0.90)
    assert stats.tango_over_clusters(np.zeros(40), clusters, 0.90) == pytest.approx(expected)


# ---- Tango by the design effect


def test_by_design_over_singletons_it_is_tango():
    values = [1] * 12 + [-1] * 5 + [0] * 40
    assert stats.tango_by_design(values, singletons(57), 0.90) == stats.tango_interval(12, 5, 57, 0.90)


def few(clusters):
    """What Student's quantile adds to the variance."""
    return (scipy.stats.t.ppf(0.95, clusters - 1) / scipy.stats.norm.ppf(0.95)) ** 2


def test_items_that_change_together_are_as_many_as_their_clusters():
    """The design effect of m equal items a cluster is m, but for the lost degree of freedom."""
    values, labels = np.repeat([1] * 12 + [-1] * 5 + [0] * 43, 5), np.repeat(singletons(60), 5).tolist()
    seen = 5 * 60 / 59
    effect = stats.design_effect(values, labels, 0.90)
    assert effect == pytest.approx(few(60) * seen, rel=1e-3)
    expected = stats.tango_interval(60 / effect, 25 / effect, 300 / effect, 0.90)
    assert stats.tango_by_design(values, labels, 0.90) == pytest.approx(expected)


def test_where_nothing_changed_clusters_are_taken_to_change_whole():
    labels = np.repeat(singletons(25), 4).tolist()
    assert stats.design_effect(np.zeros(100), labels, 0.90) == pytest.approx(4 * few(25), rel=1e-3)
    one = np.zeros(100)
    one[0] = 1  # a single change says little of how clusters vary
    assert 2 < stats.design_effect(one, labels, 0.90) < 4


def test_the_design_effect_is_that_of_an_analysis_of_variance():
    """Unequal clusters, against the variance of a ratio estimator (Cochran 1977, 6.4) by hand."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 9, 40)
    values = np.concatenate(
        [rng.choice([-1, 0, 1], size, p=p) for size, p in zip(sizes, rng.dirichlet([1, 4, 1], 40), strict=True)]
    )
    labels = np.repeat(singletons(40), sizes)
    mean, n = values.mean(), len(values)
    residual = [values[labels == label].sum() - mean * (labels == label).sum() for label in singletons(40)]
    clustered = 40 / 39 * sum(r**2 for r in residual) / n**2
    sums = np.array([values[labels == label].sum() for label in singletons(40)])
    changed, whole = abs(sums).sum() ** 2 / (sums**2).sum(), (sizes**2).sum() / n
    seen = clustered / (np.var(values) / n)
    assert 1.1 < seen < whole
    effect = few(n / whole) * (seen * changed + whole * stats.WHOLE) / (changed + stats.WHOLE)
    assert stats.design_effect(values, labels.tolist(), 0.90) == pytest.approx(effect, rel=1e-3)
    expected = stats.tango_interval((values > 0).sum() / effect, (values < 0).sum() / effect, n / effect, 0.90)
    assert stats.tango_by_design(values, labels.tolist(), 0.90) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("confidence", [0.90, 0.95])
@pytest.mark.parametrize("degrees", [9, 19, 47.3, 500])
def test_students_quantile_against_scipy(confidence, degrees):
    expected = scipy.stats.t.ppf((1 + confidence) / 2, degrees)
    assert stats.student(confidence, degrees) == pytest.approx(expected, abs=1e-3)
    z = scipy.stats.norm.ppf((1 + stats.widened(confidence, round(degrees) + 1)) / 2)
    count = round(degrees) + 1
    assert z == pytest.approx(
        scipy.stats.t.ppf((1 + confidence) / 2, count - 1) * (count / (count - 1)) ** 0.5, abs=1e-3
    )


def test_clusters_that_vary_less_than_chance_gain_nothing():
    values = [1, -1] * 30  # every pair of items cancels
    labels = [f"pair-{i // 2}" for i in range(60)]
    assert stats.tango_by_design(values, labels, 0.90)[1] > stats.tango_interval(30, 30, 60, 0.90)[1]
    with pytest.raises(ValueError, match="two clusters"):
        stats.tango_by_design([1, 0], ["one", "one"], 0.90)


# ---- Wilson's score interval


@pytest.mark.parametrize(
    ("events", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(events, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
    assert stats.wilson_interval(events, n, 0.95) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("events", "n"), [(0, 60), (3, 60), (30, 60), (60, 60), (1, 1), (137, 450)])
@pytest.mark.parametrize("confidence", [0.90, 0.95])
def test_wilson_against_statsmodels_and_scipy(events, n, confidence):
    ours = stats.wilson_interval(events, n, confidence)
    assert ours == pytest.approx(proportion_confint(events, n, alpha=1 - confidence, method="wilson"), abs=1e-12)
    theirs = scipy.stats.binomtest(events, n).proportion_ci(confidence, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("wrong", [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 1.0)])
def test_wilson_refuses_what_is_no_proportion(wrong):
    with pytest.raises(ValueError, match=r"needs|confidence"):
        stats.wilson_interval(*wrong)


def test_wilson_over_clusters_counts_a_cluster_once():
    values, labels = np.repeat([1.0] * 4 + [0.0] * 36, 5), np.repeat(singletons(40), 5).tolist()
    assert stats.wilson_over_clusters(values, labels, 0.90) == pytest.approx(stats.wilson_interval(4, 40, 0.90))
    low, high = stats.wilson_over_clusters(1 + 4 * values, labels, 0.90, lowest=1, spread=4)
    assert (low, high) == pytest.approx(tuple(1 + 4 * end for end in stats.wilson_interval(4, 40, 0.90)))


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.10, 0.20, 0.50])
@pytest.mark.parametrize("n", [40, 60, 112, 225, 450])
def test_a_mean_at_its_floor_is_cleared_at_most_about_five_percent_of_the_time(n, limit):
    """Exact: P(upper bound <= limit) where the true share is the limit."""
    cleared = [stats.wilson_interval(k, n, 0.90)[1] <= limit for k in range(n + 1)]
    assert scipy.stats.binom.pmf(np.flatnonzero(cleared), n, limit).sum() <= 0.06


# ---- Clopper's and Pearson's exact interval


@pytest.mark.parametrize(
    ("events", "n"), [(0, 30), (1, 42), (3, 60), (30, 60), (60, 60), (1, 1), (137, 450), (20, 4000)]
)
@pytest.mark.parametrize("confidence", [0.90, 0.95])
def test_clopper_pearson_against_statsmodels_and_scipy(events, n, confidence):
    ours = stats.clopper_pearson(events, n, confidence)
    assert ours == pytest.approx(proportion_confint(events, n, alpha=1 - confidence, method="beta"), abs=1e-9)
    theirs = scipy.stats.binomtest(events, n).proportion_ci(confidence, method="exact")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    with pytest.raises(ValueError, match="events <= n"):
        stats.clopper_pearson(n + 1, n, confidence)


def test_clopper_pearson_gives_the_published_intervals():
    """Newcombe 1998, table I, method 5."""
    for events, n, low, high in [
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ]:
        assert stats.clopper_pearson(events, n, 0.95) == pytest.approx((low, high), abs=5.1e-5)


# ---- McNemar's mid-p


@pytest.mark.parametrize(
    ("b", "c", "published"),
    [(7, 1, 0.039), (16, 6, 0.035)],  # Fagerland et al. 2013, two-sided: airway, complete response
)
def test_midp_gives_the_published_values(b, c, published):
    assert 2 * stats.mcnemar_midp(b, c) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(("b", "c"), [(7, 1), (16, 6), (5, 5), (30, 12), (400, 350), (6000, 5900)])
def test_midp_against_scipy_and_statsmodels(b, c):
    n = b + c
    one_sided = scipy.stats.binom.sf(b, n, 0.5) + scipy.stats.binom.pmf(b, n, 0.5) / 2
    assert stats.mcnemar_midp(b, c) == pytest.approx(one_sided, rel=1e-9)
    assert stats.mcnemar_midp(c, b) == pytest.approx(1 - one_sided, rel=1e-9)
    if b > c:
        exact = mcnemar([[0, b], [c, 0]], exact=True).pvalue
        assert 2 * stats.mcnemar_midp(b, c) == pytest.approx(exact - scipy.stats.binom.pmf(b, n, 0.5), rel=1e-9)


def test_midp_points_at_the_first_count():
    assert stats.mcnemar_midp(8, 0) < 0.01 < 0.99 < stats.mcnemar_midp(0, 8)
    assert stats.mcnemar_midp(0, 0) == 0.5
    assert stats.holm([stats.mcnemar_midp(0, 500)]) == [1.0]  # the sum of the masses is 1 + 1.6e-13
    with pytest.raises(ValueError, match="negative"):
        stats.mcnemar_midp(-1, 3)


@pytest.mark.parametrize(("b", "c"), [(7, 1), (16, 6), (30, 12), (12, 30)])
def test_clustered_mcnemar_over_singletons_is_mcnemars(b, c):
    values = [1] * b + [-1] * c + [0] * 20
    ours = stats.mcnemar_clustered(values, singletons(len(values)))
    theirs = mcnemar([[0, b], [c, 0]], exact=False, correction=False).pvalue
    assert 2 * min(ours, 1 - ours) == pytest.approx(theirs, rel=1e-9)
    assert (ours < 0.5) == (b > c)


def test_clustered_mcnemar_counts_what_changes_together_once():
    values = np.repeat([1] * 12 + [-1] * 5 + [0] * 23, 4)
    once = stats.mcnemar_clustered([1] * 12 + [-1] * 5 + [0] * 23, singletons(40))
    assert stats.mcnemar_clustered(values, np.repeat(singletons(40), 4).tolist()) == pytest.approx(once)
    assert stats.mcnemar_clustered(values, singletons(160)) < once / 10
    assert stats.mcnemar_clustered([0] * 40, singletons(40)) == 0.5


# ---- Holm


@pytest.mark.parametrize(
    "p_values", [[0.01, 0.04, 0.03, 0.005], [0.5], [0.2, 0.2, 0.2], [0.04, 0.001, 1.0, 0.02, 0.02, 0.9], []]
)
def test_holm_against_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1] if p_values else []
    assert stats.holm(p_values) == pytest.approx(list(expected))


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with pytest.raises(ValueError, match="outside"):
        stats.holm([0.1, float("nan")])


# ---- the cluster bootstrap


@pytest.mark.parametrize("confidence", [0.90, 0.95])
def test_bca_equals_scipys_on_singletons(confidence):
    values = np.random.default_rng(3).exponential(1, 50) - 0.5
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=confidence, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    # unpadded numbers would be sorted as text; the order of the clusters decides which draw is which
    ours = stats.cluster_bootstrap_interval(values, [f"{i:02}" for i in range(50)], confidence)
    assert ours == pytest.approx(tuple(theirs), rel=1e-9)
    plain = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert abs(ours[1] - plain.confidence_interval.high) > 1e-3  # the skew is corrected for, so this test can see BCa


def test_bca_equals_scipys_on_a_ratio_of_cluster_sums():
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 9, 30)
    sums = rng.normal(0.2, 1, 30) * sizes
    theirs = scipy.stats.bootstrap(
        (sums, sizes),
        lambda s, m, axis=-1: s.sum(axis=axis) / m.sum(axis=axis),
        n_resamples=10_000,
        confidence_level=0.90,
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    clusters = np.repeat([f"{i:02}" for i in range(30)], sizes).tolist()
    ours = stats.cluster_bootstrap_interval(np.repeat(sums / sizes, sizes), clusters, 0.90)
    assert ours == pytest.approx(tuple(theirs), rel=1e-9)


def test_repeating_items_within_their_cluster_adds_no_certainty():
    values = np.random.default_rng(1).normal(0, 1, 40)
    once = stats.cluster_bootstrap_interval(values, singletons(40), 0.90)
    repeated = stats.cluster_bootstrap_interval(np.repeat(values, 6), np.repeat(singletons(40), 6).tolist(), 0.90)
    naive = stats.cluster_bootstrap_interval(np.repeat(values, 6), singletons(240), 0.90)
    assert repeated == pytest.approx(once)
    assert naive[1] - naive[0] < 0.6 * (once[1] - once[0])


def test_bca_counts_half_of_the_ties_as_scipy_does():
    values = np.array([0.0] * 22 + [1.0] * 3)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=0.90, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    clusters = [f"{i:02}" for i in range(25)]
    assert stats.cluster_bootstrap_interval(values, clusters, 0.90) == pytest.approx(tuple(theirs))
    # thirds do not add up exactly, which must not untie them
    thirds = stats.cluster_bootstrap_interval(values / 3, clusters, 0.90)
    assert thirds == pytest.approx(tuple(end / 3 for end in theirs))


def test_memory_is_bounded_by_chunks_that_change_nothing(monkeypatch):
    values = np.random.default_rng(2).normal(0, 1, 1000)
    tracemalloc.start()
    whole = stats.cluster_bootstrap_interval(values, singletons(1000), 0.90)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6  # at once it would be 240 MB
    monkeypatch.setattr(stats, "CHUNK", 100_000)
    assert stats.cluster_bootstrap_interval(values, singletons(1000), 0.90) == pytest.approx(whole)


def test_equal_clusters_have_no_width():
    assert stats.cluster_bootstrap_interval([0.1] * 30, singletons(30), 0.90) == pytest.approx((0.1, 0.1))
    assert stats.cluster_bootstrap_interval([0.0] * 30, singletons(30), 0.90) == (0, 0)
    pairs = [f"{i // 2}" for i in range(40)]
    assert stats.cluster_bootstrap_interval([0, 1] * 20, pairs, 0.90) == (0.5, 0.5)
    assert stats.cluster_bootstrap_interval([0.3, 0.5], ["one", "one"], 0.90) == pytest.approx((0.4, 0.4))


def test_bootstrap_p_is_the_level_at_which_the_interval_reaches_zero():
    values = np.random.default_rng(2).exponential(1, 60) - 0.8
    p_value = stats.cluster_bootstrap_p(values, singletons(60))
    assert 0.01 < p_value < 0.2
    low, _ = stats.cluster_bootstrap_interval(values, singletons(60), 1 - 2 * p_value)
    assert low == pytest.approx(0, abs=1e-3)
    assert stats.cluster_bootstrap_p(-values, singletons(60)) == pytest.approx(1 - p_value, abs=0.02)


def test_bootstrap_p_at_its_edges():
    assert stats.cluster_bootstrap_p([1.0, 2.0] * 15, singletons(30)) == pytest.approx(1 / 10_001)
    assert stats.cluster_bootstrap_p([0.0] * 30, singletons(30)) == 1
    assert stats.cluster_bootstrap_p([0.2] * 30, singletons(30)) == pytest.approx(1 / 10_001)


def test_bootstrap_p_is_level_where_nothing_changed():
    rng = np.random.default_rng(8)
    p_values = [stats.cluster_bootstrap_p(rng.normal(0, 1, 40), singletons(40), resamples=500) for _ in range(400)]
    assert 0.03 <= np.mean(np.array(p_values) < 0.05) <= 0.085


@pytest.mark.parametrize(
    ("values", "clusters"), [([], []), ([1.0], ["a", "b"]), ([1.0, float("nan")], ["a", "b"]), ([[1.0]], ["a"])]
)
def test_bootstrap_refuses_what_it_cannot_resample(values, clusters):
    with pytest.raises(ValueError, match="finite value a cluster"):
        stats.cluster_bootstrap_interval(values, clusters, 0.90)


# ---- how many items


@pytest.mark.parametrize(
    ("margin", "counts"),
    [(0.10, [13, 31, 62, 124]), (0.05, [50, 124, 248, 495]), (0.02, [310, 773, 1546, 3092])],
)
def test_items_needed_at_two_to_twenty_percent_discordance(margin, counts):
    assert [stats.items_needed(share, margin) for share in (0.02, 0.05, 0.10, 0.20)] == counts


def test_without_a_flip_the_score_bound_says_how_many():
    needed = stats.items_needed(0.0, 0.05, spread=1)
    assert needed == 52
    assert stats.tango_interval(0, 0, needed, 0.90)[1] < 0.05 < stats.tango_interval(0, 0, needed - 1, 0.90)[1]
    assert stats.items_needed(0.0, 2.0, spread=1) == 1
    with pytest.raises(ValueError, match="margin > 0"):
        stats.items_needed(0.1, 0.0)


@pytest.mark.parametrize(("discordance", "margin"), [(0.02, 0.05), (0.05, 0.10), (0.10, 0.05), (0.20, 0.10)])
def test_items_needed_for_a_score_interval_give_their_power(discordance, margin):
    def power(n):
        flips = np.random.default_rng(6).multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], size=1000)
        return np.mean([stats.tango_interval(b, c, n, 0.90)[1] < margin for b, c, _ in flips])

    assert 0.77 <= power(stats.items_needed(discordance, margin, spread=1)) <= 0.87
    if discordance <= margin:
        assert power(stats.items_needed(discordance, margin)) < 0.6


@pytest.mark.parametrize(("true", "limit"), [(0.0, 0.05), (0.05, 0.10), (0.10, 0.20), (0.3, 0.4)])
def test_items_needed_to_clear_a_floor_give_their_power(true, limit):
    n = stats.items_needed_alone(true * (1 - true), limit - true, limit * (1 - limit))
    cleared = [k for k in range(n + 1) if stats.wilson_interval(k, n, 0.90)[1] <= limit]
    assert scipy.stats.binom.pmf(cleared, n, true).sum() == pytest.approx(0.8 if true else 1.0, abs=0.07)
    with pytest.raises(ValueError, match="distance > 0"):
        stats.items_needed_alone(0.1, 0.0)


# ---- rates without a test's errors


def test_rogan_gladen_gives_the_published_estimates():
    """23 of 150 cows positive by a test of sensitivity .96 and specificity .89: R's epiR::epi.prev, 5.1 in 100."""
    assert stats.rogan_gladen(23 / 150, 0.96, 0.89) == pytest.approx(0.051, abs=5e-4)
    assert stats.rogan_gladen(6 / 151, 0.964, 0.927) < 0  # its second example, Helicobacter pylori, told as 0
    assert stats.rogan_gladen(0.3, 1.0, 1.0) == pytest.approx(0.3)
    assert stats.rogan_gladen([0.02, 0.5, 0.99], 0.9, 0.9) == pytest.approx([-0.1, 0.5, 1.1125])
    assert np.isnan(stats.rogan_gladen(0.3, 0.5, 0.5))


def test_it_undoes_what_a_test_does_to_a_rate():
    for true, sensitivity, specificity in itertools.product((0, 0.2, 0.9), (0.7, 0.95), (0.6, 0.99)):
        seen = true * sensitivity + (1 - true) * (1 - specificity)
        assert stats.rogan_gladen(seen, sensitivity, specificity) == pytest.approx(true, abs=1e-12)


PERFECT, GOOD = ({"tp": n, "fn": m, "tn": n, "fp": m} for n, m in ((10**7, 0), (90, 10)))


def test_with_a_perfect_judge_the_rates_are_jeffreys_intervals():
    base, tuned = np.array([1] * 12 + [0] * 88), np.zeros(100)
    found = stats.corrected_rates(base, tuned, singletons(100), PERFECT, 0.90, resamples=100_000)
    assert found["base"][0] == pytest.approx(0.12)
    assert found["base"][1:] == pytest.approx(scipy.stats.beta(12.5, 88.5).ppf([0.05, 0.95]), abs=1.5e-3)
    assert found["tuned"][0] == 0
    assert found["tuned"][1:] == pytest.approx(scipy.stats.beta(0.5, 100.5).ppf([0.05, 0.95]), abs=1.5e-3)
    theirs = proportion_confint(12, 100, alpha=0.1, method="jeffreys")
    assert found["base"][1:] == pytest.approx(theirs, abs=1.5e-3)


def test_what_is_not_known_of_the_judge_widens_the_rates():
    rng = np.random.default_rng(0)
    base, tuned = (rng.random((2, 300)) < np.array([[0.3], [0.5]])).astype(float)
    few = {key: count // 5 for key, count in GOOD.items()}
    many = {key: 1000 * count for key, count in GOOD.items()}
    spans = {}
    for name, confusion in (("few", few), ("good", GOOD), ("many", many)):
        found = stats.corrected_rates(base, tuned, singletons(300), confusion, 0.90)
        assert found["delta"][0] == pytest.approx((tuned.mean() - base.mean()) / 0.8)
        spans[name] = {arm: high - low for arm, (_, low, high) in found.items()}
    for arm in ("base", "tuned", "delta"):
        assert spans["few"][arm] > spans["good"][arm] > spans["many"][arm]
    assert spans["many"]["base"] == pytest.approx(2 * 1.645 * np.sqrt(base.var() / 300) / 0.8, rel=0.05)


def test_corrected_rates_cover_the_truth():
    """True rates .30 and .45, a judge with sensitivity .88 and specificity .94 of which 200 labels are known."""
    rng, inside = np.random.default_rng(1), np.zeros(3)
    for _ in range(300):
        truth = rng.random((2, 150)) < np.array([[0.30], [0.45]])
        seen = np.where(truth, rng.random((2, 150)) < 0.88, rng.random((2, 150)) < 0.06).astype(float)
        tp, tn = rng.binomial(100, 0.88), rng.binomial(100, 0.94)
        confusion = {"tp": tp, "fn": 100 - tp, "tn": tn, "fp": 100 - tn}
        found = stats.corrected_rates(*seen, singletons(150), confusion, 0.90, resamples=1000)
        ends = zip(found.values(), (0.30, 0.45, 0.15), strict=True)
        inside += [low <= true <= high for (_, low, high), true in ends]
    assert (inside / 300 >= 0.86).all()


def test_items_of_one_cluster_are_weighed_together():
    base, tuned = np.repeat([1.0, 0.0], [10, 40]), np.repeat([1.0, 0.0], [20, 30])
    once = stats.corrected_rates(base, tuned, singletons(50), GOOD, 0.90)
    labels = np.repeat(singletons(50), 4).tolist()
    repeated = stats.corrected_rates(np.repeat(base, 4), np.repeat(tuned, 4), labels, GOOD, 0.90)
    for arm in once:
        assert repeated[arm] == pytest.approx(once[arm], abs=0.01)


def test_what_the_test_said_nothing_of_does_not_count():
    base = np.array([1.0] * 10 + [0.0] * 30)
    tuned = np.array([1.0] * 10 + [np.nan] * 20 + [0.0] * 10)
    found = stats.corrected_rates(base, tuned, singletons(40), PERFECT, 0.90)
    assert (found["base"][0], found["tuned"][0]) == pytest.approx((0.25, 0.5))
    for empty in ({**GOOD, "tp": 0, "fn": 0}, {**GOOD, "tn": 0, "fp": 0}):
        with pytest.raises(ValueError, match="true and false items"):
            stats.corrected_rates(base, tuned, singletons(40), empty, 0.90)
    with pytest.raises(ValueError, match="values in both arms"):
        stats.corrected_rates(base, np.full(40, np.nan), singletons(40), GOOD, 0.90)
