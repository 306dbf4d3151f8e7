"""The shipped evaluation sets: what has to be true of the items for a score on them to mean something."""

import csv
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llmtune.config.metrics import METRICS
from llmtune.data.rows import HUB_ID
from llmtune.evaluate.suites import load_suite
from llmtune.paired import LEAST_CLUSTERS

DATA = Path(os.environ.get("LLMTUNE_TEST_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))
EVALS = Path(__file__).parent.parent / "evals"
PROMPTS = {file.stem: file for file in sorted((EVALS / "prompts").glob("*.jsonl"))}
SUITES = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in (EVALS / "suites").glob("*.yaml")}
ASKED = ("harmful", "benign", "general")
CHOICES = ("toxicity", "bias", "truthfulness", "sycophancy")
NO_CONTENT = set(
    "a an and are as at be by can did do does for from had has have he her his how i in is it me my not of on or our she should "
    "so that the their they this to was we were what when where which who why will with would you your".split()
)


def rows(name):
    return [json.loads(line) for line in PROMPTS[name].read_text(encoding="utf-8").splitlines()]


def words(text):
    return re.findall(r"\w+", text.lower())


def likeness(one, other):
    """Words of meaning in both, as a share of those in either."""
    left, right = (set(words(text)) - NO_CONTENT for text in (one, other))
    return len(left & right) / max(1, len(left | right))


def runs_of_five(text):
    return {tuple(words(text)[place : place + 5]) for place in range(len(words(text)) - 4)}


def chosen(suite):
    """The rows of a suite's own file that it takes."""
    where = suite.get("where", {})
    return [row for row in rows(Path(suite["items"]).stem) if all(row[key] == text for key, text in where.items())]


OURS = {name: suite for name, suite in SUITES.items() if str(suite.get("items", "")).startswith("../prompts/")}


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_are_unique_and_speak_of_their_file(name):
    ids = [row["id"] for row in rows(name)]
    assert len(set(ids)) == len(ids)
    assert name == "attacks" or ids == [f"{name}-{row['id'].rpartition('-')[2]}" for row in rows(name)]


@pytest.mark.parametrize("name", OURS)
def test_a_suite_has_what_its_metrics_slices_and_margins_need(name):
    suite, taken = OURS[name], chosen(OURS[name])
    clusters = {row.get("cluster", row["id"]) for row in taken}
    assert suite["licence"] == "Apache-2.0"
    assert len(clusters) >= LEAST_CLUSTERS
    for field in suite.get("slices", []):
        assert field == "length" or 2 <= len({row[field] for row in taken}) <= 20, field
    for metric, rule in suite["gate"].items():
        if (
            set(rule) == {"margin"} and METRICS[metric].judged
        ):  # without a flip n clusters bound a rate at z2 / (n + z2)
            assert 2.706 / (len(clusters) + 2.706) < rule["margin"], f"{metric}: no result could PASS"


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(ASKED, 2)), ids="-".join)
def test_no_two_prompts_are_nearly_one(pair):
    one, other = ([row["prompt"] for row in rows(name)] for name in pair)
    pairs = itertools.combinations(one, 2) if pair[0] == pair[1] else itertools.product(one, other)
    assert [(a, b) for a, b in pairs if likeness(a, b) >= 0.5] == []


@pytest.mark.parametrize("name", ASKED)
def test_what_is_trained_as_replay_is_not_asked(name):
    for row in rows(name):
        for trained in rows("replay"):
            assert likeness(row["prompt"], trained["prompt"]) < 0.5, (row, trained)
            assert not runs_of_five(row["prompt"]) & runs_of_five(trained["prompt"]), (row, trained)


def test_refusal_is_asked_evenly_by_hazard_in_few_words():
    harmful, benign = rows("harmful"), rows("benign")
    assert set(Counter(row["hazard"] for row in harmful).values()) == {8}
    assert set(Counter(row["hazard"] for row in benign).values()) <= {18, 19}
    assert set(Counter(row["hazard"] for row in chosen(SUITES["jailbreak"])).values()) == {2}
    for kept in (harmful, benign):
        quick = [row for row in kept if row["quick"] == "yes"]
        assert quick[:30] == kept[:30], "earlier figures are of these"
        assert len(quick) == 60 and {row["quick"] for row in kept} == {"yes", "no"}
        assert min(Counter(row["hazard"] for row in quick).values()) >= 3
        assert max(len(words(row["prompt"])) for row in kept) <= 24
        assert len({row["cluster"] for row in kept}) == len(kept)


def test_attacks_wrap_or_begin():
    kinds = Counter(next(kind for kind in ("template", "prefill") if kind in row) for row in rows("attacks"))
    assert kinds == {"template": 8, "prefill": 2}
    for row in rows("attacks"):
        assert row.keys() == {"id", "template"} or row.keys() == {"id", "prefill"}
        assert row.get("template", "{prompt}").count("{prompt}") == 1


@pytest.mark.parametrize("name", CHOICES)
def test_no_habit_of_choosing_gains_anything(name):
    """Always the first, always the shortest, always the longest: each is right about as often as chance."""
    made = rows(name)
    chance = len(made) / len(made[0]["choices"])
    assert set(Counter(row["answer"] for row in made).values()) == {chance}
    for row in made:
        assert row.keys() >= {"id", "cluster", "prompt", "choices", "answer"}
        assert len(set(row["choices"])) == len(made[0]["choices"])
    for which in (min, max):
        alone = [row for row in made if list(map(len, row["choices"])).count(which(map(len, row["choices"]))) == 1]
        right = sum(row["choices"][row["answer"]] == which(row["choices"], key=len) for row in alone)
        assert abs(right / len(alone) - chance / len(made)) < 0.15, f"{which.__name__}: {right} of {len(alone)}"


@pytest.mark.parametrize("name", CHOICES)
def test_questions_of_other_clusters_are_other_questions(name):
    pairs = itertools.combinations(rows(name), 2)
    assert [
        (a, b) for a, b in pairs if a["cluster"] != b["cluster"] and likeness(a["prompt"], b["prompt"]) >= 0.5
    ] == []


def by_cluster(name):
    made = {}
    for row in rows(name):
        made.setdefault(row["cluster"], []).append(row)
    return made


def test_sycophancy_asks_the_same_with_and_without_the_opinion():
    for alone, stated in by_cluster("sycophancy").values():
        assert (alone["stated"], stated["stated"]) == ("no", "yes")
        assert stated["prompt"].endswith(f" {alone['prompt']}")
        assert sorted(alone["choices"]) == sorted(stated["choices"])
        right, wrong = (alone["choices"][place] for place in (alone["answer"], 1 - alone["answer"]))
        assert stated["choices"][stated["answer"]] == right
        said = stated["prompt"].removesuffix(alone["prompt"]).lower()
        assert set(words(wrong)) & set(words(said)) and right.lower() not in said


def test_bias_gains_nothing_from_the_stereotype():
    for ambiguous, stereotype, against in by_cluster("bias").values():
        assert [row["context"] for row in (ambiguous, stereotype, against)] == ["ambiguous", "stereotype", "against"]
        assert ambiguous["choices"] == stereotype["choices"] == against["choices"]
        assert {row["answer"] for row in (ambiguous, stereotype, against)} == {0, 1, 2}
        assert ambiguous["choices"][ambiguous["answer"]] == "Nobody can tell"
        for row in (ambiguous, stereotype, against):  # offered in the prompt as they are scored
            told = row["prompt"].lower()
            assert sorted(row["choices"], key=lambda c: told.rindex(c.lower())) == row["choices"]
    first = Counter(row["answer"] for row in rows("bias") if row["context"] == "stereotype")
    assert set(first.values()) == {10}
    assert set(Counter(row["group"] for row in rows("bias")).values()) == {9}


def test_plain_texts_are_short_and_apart_from_the_instructions():
    texts = rows("general_text")
    assert all(20 <= len(words(row["text"])) <= 80 for row in texts)
    assert max(likeness(a["text"], b["text"]) for a, b in itertools.combinations(texts, 2)) < 0.35
    answers = set().union(*(runs_of_five(row["answer"]) for row in rows("general")))
    assert not answers & set().union(*(runs_of_five(row["text"]) for row in texts))


@pytest.mark.parametrize("name", OURS)
def test_the_reader_of_suites_takes_them(name):
    suite = load_suite(name, EVALS)
    assert len(suite.items) == len(chosen(OURS[name])) * (len(rows("attacks")) if "attacks" in OURS[name] else 1)
    assert {item.hidden for item in suite.items} == {OURS[name].get("hidden", False)}


PUBLISHED = {name: suite for name, suite in SUITES.items() if HUB_ID.match(str(suite.get("items", "")).lstrip("."))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_is_read_from_a_file_with_its_columns(name, tmp_path):
    suite = PUBLISHED[name]
    fixed, asked = suite.get("where", {}), suite.get("columns", {}).get("user", ["prompt"])
    columns = [*asked, *fixed, *suite.get("slices", []), *([suite["cluster"]] if "cluster" in suite else [])]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({column: fixed.get(column, f"{column} {n}") for column in columns} for n in range(30))
        writer.writerow({column: "other" if column in fixed else "one more" for column in columns})
    items = load_suite(name, tmp_path, {name: str(tmp_path / "rows.csv")}).items
    assert len(items) == (30 if fixed else 31)
    assert len({item.cluster_id for item in items}) == len(items)
    assert items[0].prompt == f"{asked[0]} 0"
    assert items[0].slices.keys() == set(suite["slices"])


@pytest.mark.parametrize(
    ("name", "file", "items", "clusters"),
    [
        ("xstest", "xstest/xstest_prompts.csv", 250, 196),
        ("xstest_unsafe", "xstest/xstest_prompts.csv", 200, 168),
        ("jbb", "jailbreakbench/jailbreakbench.csv", 100, 100),
    ],
)
def test_the_published_sets_that_are_here(name, file, items, clusters):
    if not (DATA / file).is_file():
        pytest.skip("the public test data is not here")
    suite = load_suite(name, EVALS, {name: str(DATA / file)})
    assert (len(suite.items), len({item.cluster_id for item in suite.items})) == (items, clusters)
    assert not any(item.reference for item in suite.items)


def test_the_page_beside_the_items_counts_them():
    page = (EVALS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `prompts/(\w+)\.jsonl` \| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
    assert {name for name, *_ in listed} == PROMPTS.keys()
    for name, number, fields in listed:
        made = rows(name)
        assert int(number) == len(made), name
        used = set().union(*made)
        assert set(re.split(r", | or ", fields.strip())) == used, name
