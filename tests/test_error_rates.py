"""The error rates that the gate promises, in a form of seconds; the whole grids are a case of `make acceptance`."""

import error_rates
import numpy as np
import pytest
from error_rates import Clustered
from test_gate import both, flips, one


def test_the_counts_are_the_gates_own_verdicts():
    """What is counted below is decided as the gate decides it."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        n, margin = int(rng.integers(20, 120)), float(rng.choice(error_rates.MARGINS))
        better = int(rng.integers(0, n // 4))
        worse = min(n - better, better + int(rng.integers(0, n // 4)))
        _, row = one(both(*flips(n, worse, better)), {"margin": margin})
        passed = worse <= error_rates.most_that_pass(n, margin)[better]
        failed = not passed and worse >= error_rates.least_beyond_chance(n, 1)[better]
        assert row.verdict == ("PASS" if passed else "FAIL" if failed else "INCONCLUSIVE")


def test_harm_equal_to_the_margin_passes_at_most_six_percent_of_the_time():
    worst = error_rates.worst_false_pass(range(40, 451, 41))
    assert 0.045 < worst.rate <= 0.06, worst


def test_an_unchanged_model_is_called_worse_at_most_about_five_percent_of_the_time():
    """Over a whole report: one metric, or eight with Holm."""
    for metrics in (1, 8):
        worst = error_rates.worst_false_fail(range(50, 451, 100), metrics)
        assert worst.rate <= 0.06, worst


def test_a_true_ten_points_at_450_items_are_found():
    """Also as one of eight gating metrics, and however many items change beside."""
    for discordance in (0.10, 0.15, 0.20, 0.25):
        for metrics in (1, 8):
            passed, failed = error_rates.rates(450, 0.05, discordance, 0.10, metrics)
            assert failed >= 0.95
            assert passed < 1e-3


def test_an_unchanged_model_passes_with_enough_items():
    assert error_rates.rates(450, 0.05, 0.10, 0.0)[0] > 0.94
    assert error_rates.rates(100, 0.05, 0.10, 0.0)[0] < 0.5


def test_a_fixed_threshold_is_worse_in_both_directions():
    """40 items a suite, eight suites: it rejects what did not change and takes what did; the gate does neither."""
    rejected = error_rates.threshold_rejects(40, 0.05, 0.10, 0.0)
    assert 1 - (1 - rejected) ** 8 > 0.5
    assert 1 - error_rates.threshold_rejects(40, 0.05, 0.20, 0.10) > 0.2
    passed, _ = error_rates.rates(40, 0.05, 0.20, 0.10)
    assert passed < 0.01
    false = 1 - (1 - error_rates.rates(40, 0.05, 0.10, 0.0, 8)[1]) ** 8
    assert false <= 0.05


@pytest.mark.parametrize(
    "cell",
    [
        Clustered(30, (5,), 0.5, 0.05, 0.25),  # the bootstrap alone: .075
        Clustered(45, (5,), 0.5, 0.05, 0.12),  # .073
        Clustered(20, (2,), 1.0, 0.05, 0.25),
        Clustered(60, (1, 2, 3, 9), 0.5, 0.10, 0.25),
    ],
    ids=str,
)
def test_clustered_harm_equal_to_the_margin_passes_at_most_six_percent_of_the_time(cell):
    """With three standard errors of 1,000 draws."""
    assert error_rates.clustered_false_pass(cell, 1000) <= 0.06 + 3 * (0.06 * 0.94 / 1000) ** 0.5
    assert error_rates.clustered_fail(cell, 0.0, 500) <= 0.06 + 3 * (0.06 * 0.94 / 500) ** 0.5


def test_a_mean_at_its_floor_is_cleared_rarely():
    """Wilson's bound is for counts and so not level: 7.2 % at worst, at 25 items."""
    worst = error_rates.worst_floor_cleared(range(20, 451))
    assert 0.05 < worst.rate <= 0.073, worst


def test_many_slices_do_not_fail_a_model_that_did_not_change():
    assert error_rates.slices_false_fail(25) <= 0.08
