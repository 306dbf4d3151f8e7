import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from llmtune.evaluate import calibration
from llmtune.evaluate.calibration import Answers


def simulated(n, k=4, sharpness=1.0, seed=0, clusters=None):
    """Items whose right choice is drawn from the arm's own probabilities, which are then made `sharpness` times too sharp."""
    rng = np.random.default_rng(seed)
    true = 1.5 * rng.standard_normal((n, k))
    chances = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    right = np.array([rng.choice(k, p=row) for row in chances])
    return Answers(true * sharpness - 7.0, right, clusters or [str(i) for i in range(n)])


def test_brier_and_nll_are_sklearns():
    given = simulated(200)
    chances = calibration.probabilities(given)
    assert chances.sum(axis=1) == pytest.approx(np.ones(200))
    assert calibration.nll(given).mean() == pytest.approx(log_loss(given.right, chances))
    theirs = brier_score_loss(given.right, chances, labels=range(4), scale_by_half=False)
    assert calibration.brier(given).mean() == pytest.approx(theirs)


def test_the_reliability_bins_are_sklearns():
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1, 400)
    correct = (rng.random(400) < confidence**2).astype(float)
    rows = calibration.reliability(confidence, correct)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10, strategy="quantile")
    assert [row["accuracy"] for row in rows] == pytest.approx(accuracy)
    assert [row["confidence"] for row in rows] == pytest.approx(mean)
    assert calibration.expected_calibration_error(confidence, correct) == pytest.approx(np.abs(accuracy - mean).mean())


@pytest.mark.parametrize(
    ("bins", "confidences", "known"),
    [  # as measured apart from this code, with the confidences that show them
        (10, lambda rng, n: rng.uniform(0.6, 1, n), {50: 0.132, 100: 0.096, 200: 0.068, 1000: 0.030}),
        (15, lambda rng, n: rng.beta(5, 1, n), {100: 0.098, 200: 0.071, 500: 0.045, 1000: 0.030, 5000: 0.014}),
    ],
)
def test_the_error_of_a_perfect_model_is_that_of_the_tables(bins, confidences, known):
    rng = np.random.default_rng(0)
    for n, mean in known.items():
        drawn = [calibration.error_if_calibrated(confidences(rng, n), bins) for _ in range(max(1, 2000 // n))]
        assert np.mean([expected for expected, _ in drawn]) == pytest.approx(mean, abs=0.004), n
        assert all(expected < at_most for expected, at_most in drawn)


def test_a_calibrated_model_is_called_miscalibrated_one_time_in_twenty():
    called = 0
    for seed in range(300):
        given = simulated(80, seed=seed)
        confidence = calibration.probabilities(given).max(axis=1)
        correct = calibration.probabilities(given).argmax(axis=1) == given.right
        _, at_most = calibration.error_if_calibrated(confidence)
        called += calibration.expected_calibration_error(confidence, correct) > at_most
    assert 0.02 <= called / 300 <= 0.085


def test_the_temperature_undoes_what_was_done():
    sharp = simulated(600, sharpness=3.0)
    assert calibration.fit_temperature(sharp) == pytest.approx(3.0, rel=0.15)
    found = calibration.temperature(sharp)
    assert found["kept"]
    assert found["nll_after"] < found["nll_before"] - 0.1
    lowest = min(np.linspace(1.5, 5, 400), key=lambda t: calibration.nll(sharp, t).mean())
    assert calibration.fit_temperature(sharp) == pytest.approx(lowest, abs=0.02)


def test_a_temperature_is_seldom_kept_where_there_is_nothing_to_gain():
    kept = sum(calibration.temperature(simulated(60, seed=seed))["kept"] for seed in range(60))
    assert kept <= 4


def test_few_clusters_fit_no_temperature():
    assert calibration.temperature(simulated(60, clusters=[str(i % 19) for i in range(60)])) is None


def test_a_cluster_is_never_split_over_folds(monkeypatch):
    seen = []
    fit = calibration.fit_temperature
    monkeypatch.setattr(calibration, "fit_temperature", lambda given: seen.append(set(given.clusters)) or fit(given))
    calibration.temperature(simulated(90, clusters=[str(i // 3) for i in range(90)]))
    *folds, everything = seen
    assert len(folds) == calibration.FOLDS
    left_out = [everything - fold for fold in folds]
    assert set.union(*left_out) == everything
    assert sum(map(len, left_out)) == len(everything)


def test_items_may_have_unequal_numbers_of_choices():
    given = calibration.answers([[-1.0, -2.0], [-3.0, -1.0, -2.0]], [0, 1], ["a", "b"])
    chances = calibration.probabilities(given)
    assert chances[0] == pytest.approx([0.7311, 0.2689, 0], abs=1e-4)
    assert calibration.brier(given)[0] == pytest.approx(2 * 0.2689**2, abs=1e-4)
    assert 0.05 <= calibration.fit_temperature(given) < 0.06  # all right: as sure as it may get


@pytest.mark.parametrize("right", [[0, 3], [0, 2]])
def test_a_right_choice_that_is_not_there_is_refused(right):
    with pytest.raises(ValueError, match="right choice"):
        calibration.answers([[-1.0, -2.0, -3.0], [-1.0, -2.0]], right, ["a", "b"])


def test_a_suite_tells_of_every_arm_and_slice():
    base, tuned = simulated(120, seed=1), simulated(120, seed=1, sharpness=4.0)
    field = ["odd" if i % 2 else "even" for i in range(120)]
    entry = calibration.summarise({"base": base, "tuned": tuned}, {"parity": field})
    assert entry["n"] == 120
    assert entry["classes"] == 4
    assert entry["base"]["ece"] <= entry["base"]["ece_null_95"]
    assert entry["base"]["says"] == "no miscalibration that 120 items could show"
    assert entry["tuned"]["ece"] > entry["tuned"]["ece_null_95"]
    assert entry["tuned"]["says"].startswith("over-confident beyond chance: right on ")
    assert entry["tuned"]["temperature"]["kept"]
    assert not entry["base"]["temperature"]["kept"]
    assert sum(row["n"] for row in entry["tuned"]["bins"]) == 120
    assert entry["tuned"]["change"]["nll"]["low"] > 0
    assert "change" not in entry["base"]
    halves = entry["slices"]["parity"]
    assert {value: arms["tuned"]["n"] for value, arms in halves.items()} == {"even": 60, "odd": 60}
    both = (halves["even"]["tuned"]["nll"] + halves["odd"]["tuned"]["nll"]) / 2
    assert both == pytest.approx(entry["tuned"]["nll"])
