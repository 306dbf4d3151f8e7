"""`llmtune quickstart`: the main job end to end on a small real model, with the standard library as its data.

A function's source in, its one-line docstring out. Each step leaves an artifact and is skipped when that is there already:

    data -> adapter -> scores -> verdict -> merged -> report
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune import artifact, config
from llmtune.artifact import Artifact
from llmtune.errors import ArtifactError
from llmtune.progress import Progress, say

INSTRUCTION = "Write a one-line docstring for this Python function."
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
SEALED_MODULES, MOST_SEALED_PER_MODULE = 27, 5
VALIDATION_ROWS, TRAIN_ROWS, MOST_TRAINED_PER_MODULE = 40, 300, 60
REPLAY_ROWS, REPLAY_TOKENS = 88, 64
SMOKE = {"train": 24, "validation": 8, "replay": 6}


@dataclass(frozen=True)
class Function:
    module: str
    name: str
    source: str
    sentence: str

    def row(self, number: int) -> dict[str, Any]:
        prompt = f"{INSTRUCTION}\n\n{self.source}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": self.sentence}]
        return {"id": f"{self.module}.{self.name}-{number}", "cluster": self.module, "messages": turns}


def run(folder: Path, *, smoke: bool = False, replay: bool = True) -> Artifact:
    """Run every step that is not done yet; returns the verdict.

    smoke: a few steps and items, to see that all works. replay: mix answers of the base itself to general instructions into
    the training rows, so that the tune does not narrow it.
    """
    from llmtune import gate, report
    from llmtune.evaluate import arms
    from llmtune.export import merge
    from llmtune.stages import sft

    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    options = {"smoke": smoke, "replay": replay}
    step = _Steps(folder)
    data = step(
        "data",
        "functions of the standard library, and answers of the base to keep",
        None,
        lambda: build_data(folder, **options),
    )
    if data.manifest["options"] != options:
        raise ArtifactError(
            f"{folder}: holds a quickstart with other options; choose another --output, or move it away"
        )
    run_files = {stage: _run_file(folder, stage, smoke=smoke) for stage in ("sft", "eval")}
    adapter = step(
        "adapter", "LoRA fine-tuning", data, lambda: sft.run(config.load(run_files["sft"]), run_files["sft"])
    )
    scores = step(
        "scores",
        "base, base with examples, tuned: the same sealed items",
        adapter,
        lambda: arms.run(config.load(run_files["eval"]), run_files["eval"]) or artifact.read(folder / "scores"),
    )
    verdict = step("verdict", "is it better, and is nothing worse?", scores, lambda: gate.run(scores.path))
    merged = step("merged", "adapter into base, and the proof", adapter, lambda: merge.run(folder))
    report.build(folder)
    _tell(folder, verdict, merged)
    return verdict


class _Steps:
    """Runs a step unless its artifact is there and was made from the same parent."""

    NAMES = ("data", "adapter", "scores", "verdict", "merged")

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def __call__(self, name: str, title: str, parent: Artifact | None, make: Callable[[], Artifact]) -> Artifact:
        self.number += 1
        heading = f"[{self.number}/{len(self.NAMES)}] {name}: {title}"
        if artifact.complete(self.folder / name):
            made = artifact.read(self.folder / name)
            made_from = {entry["sha256"] for entry in made.manifest["parents"]}
            if name == "adapter" and parent is not None:  # it names its rows by their hash
                made_from = {parent.sha256} if _trained_on(made, parent) else set()
            if parent is None or parent.sha256 in made_from:
                say(f"{heading}: done before")
                return made
            raise ArtifactError(f"{made.path}: was made from another {parent.kind}; move it away and run again")
        say(heading)
        began = time.monotonic()
        made = make()
        say(f"  {time.monotonic() - began:.0f} s")
        return made


def _trained_on(adapter: Artifact, data: Artifact) -> bool:
    rows = adapter.manifest["data"]["train"]["sources"]
    return [source["sha256"] for source in rows] == [data.manifest["files"]["train.jsonl"]["sha256"]]


def build_data(folder: Path, *, smoke: bool, replay: bool) -> Artifact:
    """Train, validation and sealed test rows, split by module, and the suite that measures the task."""
    functions = list(scan(Path(sysconfig.get_path("stdlib"))))
    train, validation, test = split(functions)
    if smoke:
        train, validation, test = train[: SMOKE["train"]], validation[: SMOKE["validation"]], test[::2]
    general = _replay(SMOKE["replay"] if smoke else REPLAY_ROWS) if replay else []
    with artifact.writing(folder / "data", "data") as draft:
        rows = {
            "train": [f.row(n) for n, f in enumerate(train)],
            "validation": [f.row(n) for n, f in enumerate(validation)],
        }
        rows["test"] = [{**f.row(n), "sealed": True} for n, f in enumerate(test)]
        rows["train"] += general
        for name, lines in rows.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (draft.path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        suite = config.shipped("evals", "suites/docstrings.yaml")
        shutil.copy(suite, draft.path)
        modules = {name: len({line["cluster"] for line in lines if "cluster" in line}) for name, lines in rows.items()}
        counts = {"train": len(train), "replay": len(general), "validation": len(validation), "test": len(test)}
        draft.facts.update(
            options={"smoke": smoke, "replay": replay}, rows=counts, modules=modules, functions=len(functions)
        )
        say(
            f"  {len(functions):,} functions; train {counts['train']} + {counts['replay']} replayed, validation {counts['validation']}, "
            f"test {counts['test']} in {modules['test']} modules, sealed"
        )
    return artifact.read(folder / "data")


def scan(library: Path) -> Iterator[Function]:
    """Public functions and methods with a good one-sentence docstring, by parsing, never by importing."""
    seen: set[str] = set()
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if SKIPPED & set(parts) or any(part.startswith(("_", "test_")) and part != "__init__" for part in parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library ships files that are broken on purpose
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                made = _function(parts[0], node, lines)
                if made and made.sentence not in seen:
                    seen.add(made.sentence)
                    yield made


def _function(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    sentence = " ".join(re.split(r"(?<=\.)\s|\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    if not (25 <= len(sentence) <= 120 and sentence[0].isupper() and sentence.endswith(".")):
        return None
    stated = node.body[0]
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[start - 1 : stated.lineno - 1] + lines[stated.end_lineno or stated.lineno : node.end_lineno]
    source = textwrap.dedent("\n".join(kept)).rstrip()
    return Function(module, node.name, source, sentence) if 40 <= len(source) <= 450 else None


def split(functions: list[Function]) -> tuple[list[Function], list[Function], list[Function]]:
    """Train, validation and test, no module in two of them; which module goes where is decided by its name's hash.

    What is left over of a test module is dropped, never trained. A module gives at most so many rows, or three would be a
    third of the data.
    """
    by_hash = sorted({f.module for f in functions}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    sealed = [m for m in by_hash if sum(f.module == m for f in functions) >= 2][:SEALED_MODULES]
    test = _at_most(MOST_SEALED_PER_MODULE, [f for f in functions if f.module in sealed])
    ordered = sorted(
        (f for f in functions if f.module not in sealed), key=lambda f: hashlib.sha256(f.source.encode()).hexdigest()
    )
    rest = [m for m in by_hash if m not in sealed]
    validation: list[Function] = []
    for module in rest:
        mine = [f for f in ordered if f.module == module][:MOST_SEALED_PER_MODULE]
        if len(validation) >= VALIDATION_ROWS:
            break
        validation += mine
    held = {f.module for f in validation}
    train = _at_most(MOST_TRAINED_PER_MODULE, [f for f in ordered if f.module not in held])
    return train[:TRAIN_ROWS], validation[:VALIDATION_ROWS], test


def _at_most(limit: int, functions: list[Function]) -> list[Function]:
    taken: Counter[str] = Counter()
    kept = []
    for function in functions:
        taken[function.module] += 1
        if taken[function.module] <= limit:
            kept.append(function)
    return kept


def _replay(rows: int) -> list[dict[str, Any]]:
    """The base's own answers to general instructions, and its own refusals. One cut off is not taught to end there.

    General answers are drawn at temperature 1: then the loss on them is, on average, the divergence from the base. Greedy ones
    teach a sharper model than the base is (+0.15 nats of general loss, measured). A request to decline is answered greedily,
    and kept only where the base declines: no model is trained here to comply with one.
    """
    from llmtune.data.rows import read_rows
    from llmtune.data.tokens import encode_prompt
    from llmtune.evaluate.judges import pattern
    from llmtune.model import infer, load

    base = load.find(base_model())
    tokenizer, model = load.load_tokenizer(base), load.load_model(base)
    asked = [row.fields for row in read_rows(str(config.shipped("evals", "prompts/replay.jsonl")))][:rows]
    replayed = []
    with Progress("base: answers to keep", len(asked)) as bar:
        for sensitive, seed in ((False, 0), (True, None)):
            turns = [[{"role": "user", "content": row["prompt"]}] for row in asked if row["sensitive"] == sensitive]
            prompts = [encode_prompt(tokenizer, turn) for turn in turns]
            answers = infer.generate(model, tokenizer, prompts, REPLAY_TOKENS, 32, seed=seed, on_batch=bar.advance)
            for turn, answer in zip(turns, answers, strict=True):
                said = {"role": "assistant", "content": answer.text, **({} if answer.ended else {"cut_off": True})}
                if answer.text and not (sensitive and pattern.outcome(answer.text) != "refused"):
                    replayed.append({"replay": True, "messages": [*turn, said]})
    return replayed


def base_model() -> str:
    """The model the shipped run file names."""
    name = config.read_yaml(config.shipped("configs", "sft/quickstart.yaml"))["model"]
    return str(name)


def _run_file(folder: Path, stage: str, *, smoke: bool) -> Path:
    """A copy of the shipped run file in the run's own folder, to read, to change and to run again by hand."""
    file = folder / f"{stage}.yaml"
    if not file.exists():
        shipped = config.shipped("configs", f"{stage}/quickstart{'-smoke' if smoke else ''}.yaml")
        shutil.copy(shipped, file)
    return file


def _tell(folder: Path, verdict: Artifact, merged: Artifact) -> None:
    from llmtune import gate
    from llmtune.verdict import render_text

    proof = merged.manifest["proof"]
    run = _short(folder)
    say("\n" + render_text(gate.read(verdict)))
    say(
        f"merge: proven, float32 logits differ by {proof['algebra']['max_logit_difference']:.1e}; stored in {proof['dtype']}, "
        f"{proof['storage']['ratio']:.2f} x the noise of that dtype (at most 1.5)"
    )
    for shown in _samples(folder, 3):
        say("\n" + shown)
    say(f"""
where   {run}/report/report.html   the whole story on one page
        {run}/adapter              for PEFT;  {run}/merged  a plain transformers folder
        {run}/sft.yaml, eval.yaml  what was run: change and run again

next    llmtune chat {run} --instruction "{INSTRUCTION}"
        then paste a function of your own; or, once:
        llmtune chat {run} --instruction "{INSTRUCTION}" --file my_function.py""")


def _samples(folder: Path, number: int) -> Iterator[str]:
    """Sealed functions with the answers of base and tuned, for the eye."""
    from llmtune import scores

    said: dict[str, dict[str, str]] = {}
    for record in scores.read(folder / "scores" / scores.FILE):
        if record.suite == "docstrings" and record.response is not None:
            said.setdefault(record.item_id, {})[record.arm] = record.response
    items = [json.loads(line) for line in (folder / "scores" / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = [item for item in items if item["suite"] == "docstrings" and item["item_id"] in said][:number]
    for item in shown:
        signature = item["prompt"].split("\n\n", 1)[1].splitlines()[0]
        answers = said[item["item_id"]]
        first = " ".join(answers["base"].split())
        yield (
            f"{signature[:100]}\n  base   {first[:90]}{'...' if len(first) > 90 else ''}\n"
            f"  tuned  {' '.join(answers['tuned'].split())[:100]}\n  real   {item['reference']}"
        )


def _short(folder: Path) -> str:
    cwd = Path.cwd()
    return str(folder.relative_to(cwd)) if folder.is_relative_to(cwd) else str(folder)
