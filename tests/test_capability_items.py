"""The shipped items behind lm-eval tasks: right by calculation, and scored as they are meant to be."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import tiny

from llmtune import config
from llmtune.config.eval import SuiteConfig
from llmtune.evaluate import capability, instructions, tasks

EVALS = Path(__file__).parent.parent / "evals"
NAMES = {"reasoning": "kind", "code": "kind", "maths": "steps", "instructions": "kind"}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EVALS / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_sixty_items_each_its_own_cluster_spread_evenly(name):
    made = rows(name)
    assert len({row["cluster"] for row in made}) == len(made) == 60
    assert len(set(Counter(row[NAMES[name]] for row in made).values())) == 1
    asked = [row.get("code") or row.get("question") or row["prompt"] for row in made]
    assert len(set(asked)) == 60
    if name == "code":  # short programs differ by a sign
        return
    asked = [set(re.findall(r"\w+", text)) for text in asked]
    likest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(asked, 2))
    assert likest < 0.8, "two items are nearly one"


@pytest.mark.parametrize("name", ["reasoning", "code"])
def test_no_habit_of_choosing_gains_anything(name):
    made = rows(name)
    assert set(Counter(row["answer"] for row in made).values()) == {15}
    for row in made:
        assert len(set(row["choices"])) == 4
    for which in (min, max):
        lengths = [list(map(len, row["choices"])) for row in made]
        right = sum(
            (given[row["answer"]] == which(given)) / given.count(which(given))
            for row, given in zip(made, lengths, strict=True)
        )
        assert abs(right / 60 - 0.25) < 0.15, f"always the {which.__name__}: {right}"


@pytest.mark.parametrize("row", rows("code"), ids=lambda row: row["id"])
def test_the_right_choice_is_what_the_program_prints(row):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(row["code"], row["id"], "exec"), {"__name__": "item"})
    assert printed.getvalue().strip() == row["choices"][row["answer"]]


def test_the_answers_of_word_problems_are_calculated():
    for row in rows("maths"):
        assert re.fullmatch(r"[\d +*/()-]+", row["calculation"])
        assert eval(row["calculation"]) == int(row["answer"]), row
        assert int(row["answer"]) > 0
    operations = {steps: Counter() for steps in "123"}
    for row in rows("maths"):
        operations[row["steps"]][len(re.findall(r"[+*/-]", row["calculation"]))] += 1
    assert set(operations["1"]) == {1} and set(operations["2"]) <= {2, 3}


def test_every_instruction_can_be_followed_and_missed():
    for row in rows("instructions"):
        assert instructions.process_results(row, [row["answer"]]) == {
            "followed": 1.0,
            "parts": [True] * len(row["checks"]),
        }, row
        assert instructions.process_results(row, [""])["followed"] == 0.0
        assert {check.partition(" ")[0] for check in row["checks"]} <= instructions.CHECKS.keys()
    # what a model says that does not read the instruction
    rambling = (
        "Sure! I can help with that, of course. Here is what I think about it: it depends (on many things), doesn't it?"
    )
    kept = [row["id"] for row in rows("instructions") if instructions.process_results(row, [rambling])["followed"]]
    assert len(kept) <= 5, kept
    used = {check.partition(" ")[0] for row in rows("instructions") for check in row["checks"]}
    assert used == instructions.CHECKS.keys()


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ("words_exactly 2", "It's raining.", "It is raining"),
        ("sentences 2", 'He said "no." Then 3.5 hours passed!', "One only"),
        ("sentences_start We", "We sing. We dance.", "We sing. They dance."),
        ("paragraphs 2", "a\n\nb", "a\nb"),
        ("numbered 2", "1. a\n2. b", "1. a\n3. b"),
        ("json_equals [1, 2]", "```json\n[1, 2]\n```", "Here it is: [1, 2]"),
        ("json_number year", '{"year": 3}', '{"year": "3"}'),
        ("json_true_or_false ok", '{"ok": false}', '{"ok": 0}'),
        ("json_objects 1 item", '[{"item": 1}]', '["item"]'),
        ("json_keys_under a b", '{"a": {"b": 1}}', '{"a": "b"}'),
        ("avoids red", "A bored reader", "It is Red."),
        ("one_of yes no", "Yes.", "Yes, it is"),
        ("numbers 2", "3.5 and 10:30", "7"),
        ("word_times sun 2", "Sun, sun", "sunny sun sun sun"),
        ("capital_words 1", "I said NO", "I said no"),
        ("uppercase ", "GO 2 IT!", "Go"),
        ("matches a b", "a b", "xa b"),
    ],
)
def test_checks_are_neither_lax_nor_picky(check, good, bad):
    assert instructions.follows(check, good) and not instructions.follows(check, bad)


@pytest.fixture(scope="module")
def subject():
    return tiny.model(tied=False), tiny.tokenizer()


@pytest.mark.parametrize("name", [*NAMES, "capability"])
def test_the_shipped_suites_run_and_have_the_metrics_they_gate(name, subject):
    file = EVALS / "suites" / f"{name}.yaml"
    suite = config.validate(SuiteConfig, config.read_yaml(file), file)
    found = tasks.load(suite.lm_eval, file)
    tasks.require_usable(suite, found.tasks, file)
    (task,) = found.tasks.values()
    if task.config.generation_kwargs:
        assert task.config.generation_kwargs["until"] == []  # an answer is not cut at its first paragraph
        task.config.generation_kwargs["max_gen_toks"] = 4
    result = capability.run(*subject, task, 4, limit=3)
    assert len(result.items) == 3 and not result.notes
    for item in result.items:
        assert item.metrics.keys() >= suite.gate.keys()
        assert set(suite.slices) <= item.doc.keys()


def test_the_last_number_of_an_answer_is_its_answer(subject, monkeypatch):
    file = EVALS / "suites" / "maths.yaml"
    (task,) = tasks.load(["llmtune_maths"], file).tasks.values()
    wanted = {row["question"]: row["answer"] for row in rows("maths")}
    said = [
        ("First 3, then {}", 1.0),
        ("The answer is **{}**.", 1.0),
        ("{} euros", 1.0),
        ("${}.00", 1.0),
        ("{}, or 9 less", 0.0),
        ("no number", 0.0),
    ]
    answered = iter(said)

    def answers(_, requests, **__):
        asked = [
            next(answer for question, answer in wanted.items() if question in request.args[0]) for request in requests
        ]
        return [next(answered)[0].format(answer) for answer in asked]

    monkeypatch.setattr(capability.HFLM, "generate_until", answers)
    items = capability.run(*subject, task, 4, limit=len(said)).items
    assert [item.metrics["exact_match"] for item in items] == [score for _, score in said]
