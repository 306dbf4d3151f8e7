"""A run as one HTML page that needs nothing else: verdict, before and after, curves, proof, costs, where it came from."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment

from llmtune import artifact, plots, scores
from llmtune.errors import ArtifactError

FILE = "report.html"
STEPS = ("adapter", "model", "scores", "verdict", "merged")
GROUPS = ("Task", "General ability", "Capability", "Safety")
REFUSAL, CHOICE = {"complied", "refused"}, {"acc", "acc_norm"}
NAMES = {"rouge_l": "ROUGE-L", "acc": "accuracy", "acc_norm": "accuracy by length", "answer_tokens": "answer length"}
UNITS = dict.fromkeys([*REFUSAL, *CHOICE, "exact_match", "one_sentence"], (100, 1, " %", " points"))
UNITS |= {"loss": (1, 3, " nats/token", ""), "answer_tokens": (1, 1, " tokens", " tokens")}
PLAIN = (1, 3, "", "")  # factor, digits, unit of a value, unit of a difference
Rows = list[dict[str, Any]]


def build(run: Path, output: Path | None = None) -> artifact.Artifact:
    """Write `report.html` on whatever is finished in `run` as a report artifact at `output` (`run/report`), replacing a former one.

    The page names the steps that are missing. Raises ArtifactError when nothing is finished, when a file was changed
    since it was written, or when something else lies at `output`.
    """
    output = output or run / "report"
    steps = {name: artifact.read(run / name) for name in STEPS if artifact.complete(run / name)}
    if not steps:
        raise ArtifactError(f"{run}: nothing to report on; none of {', '.join(STEPS)} is finished in it")
    if output.exists() and not (output / FILE).is_file():
        raise ArtifactError(f"{output}: exists and is not a report; choose another folder, or move it away")
    pages = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"figure": figure, "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False)}
    pages.filters["csp"] = lambda script: base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = pages.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    with artifact.writing(output, "report", list(steps.values()), replace=True) as draft:
        (draft.path / FILE).write_text(page.render(_content(run, steps)), encoding="utf-8")
    return artifact.read(output, "report")


def figure(value: object, metric: str, *, signed: bool = False, unit: bool = True) -> str:
    """A value or, signed, a difference in the metric's unit: rates in per cent or points, a loss in nats a token."""
    if not isinstance(value, int | float) or not plots.finite(value):
        return "–"
    factor, digits, level, difference = UNITS.get(metric, PLAIN)
    number = round(value * factor, digits) + 0.0
    text = f"{'+' if signed and number > 0 else ''}{number:.{digits}f}".replace("-", "−")
    return text + (difference if signed else level) * unit


def _content(run: Path, steps: dict[str, artifact.Artifact]) -> dict[str, Any]:
    """What the template shows. No figure in it is new: each stands in a step's own files."""
    facts = {name: step.manifest for name, step in steps.items()}
    arms = {role: name for role, name in facts.get("scores", {}).get("arms", {}).items() if name}
    records = scores.read(run / "scores" / scores.FILE) if "scores" in steps else []
    verdict = json.loads((run / "verdict" / "verdict.json").read_text(encoding="utf-8")) if "verdict" in steps else None
    words: dict[str, set[str]] = {}  # by suite: what is measured, against whom, and what is asked of it
    said = [(row["suite"], row["metric"], row["versus"], row["rule"]) for row in (verdict or {"rows": []})["rows"]]
    for suite, *more in [*said, *((score.suite, score.metric, score.arm) for score in records)]:
        words.setdefault(suite, set()).update(more)
    task = {"better by more than", arms.get("few_shot")}
    groups = {s: GROUPS[3 if w & REFUSAL else 0 if w & task else 2 if w & CHOICE else 1] for s, w in words.items()}
    rows = _rows(verdict["rows"], verdict["arms"]["base"], groups) if verdict else []
    logged = _lines(run / ("adapter" if "adapter" in steps else "model") / "metrics.jsonl")
    widths = {"wide": 960, "narrow": 340}
    return {
        "run": shlex.quote(str(run)), "title": run.resolve().name, "steps": steps, "facts": facts, "verdict": verdict,
        "rows": rows, "groups": GROUPS, "arms": arms, "logged": logged, "names": NAMES,
        "suites": _examples(records, _lines(run / "scores" / "items.jsonl"), groups),
        "forest": {size: plots.forest_svg(rows, width) for size, width in widths.items()},
        "curves": {size: plots.curves_svg(logged, width) for size, width in widths.items()},
    }  # fmt: skip


def _lines(file: Path) -> Rows:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def _rows(rows: Rows, base: str, groups: dict[str, str]) -> Rows:
    """The verdict's rows in the words of the page, by group, those that gate first."""
    examples = {(row["suite"], row["metric"]): row["base"] for row in rows if row["versus"] != base}
    for row in rows:
        metric, margin, ours = row["metric"], row["margin"], row["versus"] == base
        name, (factor, _, level, unit) = NAMES.get(metric, metric.replace("_", " ")), UNITS.get(metric, PLAIN)
        delta, low, high = (figure(row[key], metric, signed=True, unit=False) for key in ("delta", "low", "high"))
        row |= {"name": name, "group": groups[row["suite"]], "unit": level}
        row["label"] = f"{row['suite']}: {name}{' (floor effect)' if row['floor_effect'] else ''}"
        row |= {"against_base": ours, "few_shot": examples.get((row["suite"], metric))}
        row["asked"] = row["rule"] if margin is None else f"{row['rule']} {margin * factor:g}{unit}"
        side = 1 if row["higher_is_better"] == row["rule"].startswith("better") else -1
        row["threshold"] = None if margin is None else side * margin
        row["detail"] = f"{row['n']} items, {row['asked'] if ours else 'against ' + row['versus']}"
        row["figures"] = f"{delta} [{low}, {high}]{unit}"
    return sorted(rows, key=lambda row: (GROUPS.index(row["group"]), not row["against_base"], not row["verdict"]))


def _examples(records: list[scores.Score], items: Rows, groups: dict[str, str]) -> Rows:
    """Suite by suite the items answered in words: prompt, reference, and for each arm the answer and its marks."""
    found = {(item["suite"], item["item_id"]): {**item, "answers": {}} for item in items}
    for score in records:
        if item := found.get((score.suite, score.item_id)):
            answer = item["answers"].setdefault(score.arm, {"text": None, "outcome": None, "marks": []})
            answer["text"] = score.response if answer["text"] is None else answer["text"]
            answer["outcome"] = answer["outcome"] or score.outcome
            answer["marks"].append((score.metric, score.value))
    suites: dict[str, Rows] = {}
    for item in found.values():
        if any(answer["text"] is not None for answer in item["answers"].values()):
            suites.setdefault(item["suite"], []).append(item)
    shown = [{"name": suite, "group": groups[suite], "items": asked} for suite, asked in suites.items()]
    return sorted(shown, key=lambda suite: GROUPS.index(suite["group"]))
