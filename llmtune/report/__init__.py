"""A run as one HTML page that needs nothing else: verdict, every change, what flipped, judges, costs, where it came from."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from llmtune import artifact, plots, scores, verdict
from llmtune.errors import ArtifactError
from llmtune.progress import say
from llmtune.report import changes, items, measured, people, wording

FILE = "report.html"
STEPS = ("adapter", "model", "scores", "verdict", "merged")
HERE = Path(__file__).parent


def build(run: Path, output: Path | None = None) -> artifact.Artifact:
    """Write `report.html` on whatever is finished in `run` as a report artifact at `output` (`run/report`), replacing a former one.

    Where there is a verdict, `report.md` for a pull request, `report.json` and `junit.xml` lie beside it; they hold no prompt
    and no answer. A verdict that is of other scores than those in `run` counts as none. The page names the steps that are missing. Raises ArtifactError when nothing is finished, when a file was changed since it was written, or when something
    else lies at `output`.
    """
    output = output or run / "report"
    steps = {name: artifact.read(run / name) for name in STEPS if artifact.complete(run / name)}
    if not steps and artifact.complete(run):
        raise ArtifactError(f"{run}: is one step of a run; name the run's folder, {run.resolve().parent}")
    if not steps:
        raise ArtifactError(f"{run}: nothing to report on; none of {', '.join(STEPS)} is finished in it")
    if output.exists() and not (output / FILE).is_file():
        raise ArtifactError(f"{output}: exists and is not a report; choose another folder, or move it away")
    other = _foreign(steps)
    steps = {name: step for name, step in steps.items() if name != "verdict" or not other}
    content = _content(run, steps) | {"foreign": other}
    if other:
        say(f"{run}: {other}")
    with artifact.writing(output, "report", list(steps.values()), replace=True) as draft:
        (draft.path / FILE).write_text(_render(content), encoding="utf-8")
        if content["verdict"]:
            decided = verdict.read(run / "verdict" / verdict.FILE)
            others = {
                "report.json": json.dumps(_summary(content), indent=1),
                "junit.xml": verdict.render_junit(decided),
            }
            others["report.md"] = verdict.render_markdown(decided) + _flipped(content)
            for name, text in others.items():
                (draft.path / name).write_text(text, encoding="utf-8")
    return artifact.read(output, "report")


def _foreign(steps: Mapping[str, artifact.Artifact]) -> str | None:
    """What is wrong with a verdict that was not taken on the scores beside it; it is then shown nowhere."""
    if not {"scores", "verdict"} <= steps.keys():
        return None
    judged = [parent for parent in steps["verdict"].manifest["parents"] if parent["kind"] == "scores"]
    if any(parent["sha256"] == steps["scores"].sha256 for parent in judged):
        return None
    told = ", ".join(f"{parent['path']}, {parent['sha256'][:12]}" for parent in judged)
    return f"the verdict is of other scores ({told}) than those beside it ({steps['scores'].sha256[:12]})"


def _render(content: Mapping[str, Any]) -> str:
    pages = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=ChainableUndefined, finalize=wording.visible,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    pages.filters |= {"figure": wording.figure, "metric_name": wording.name}
    pages.filters["cut"] = functools.partial(_cut, longest=items.longest(content["suites"]))
    pages.filters["json"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    pages.filters["compact"] = lambda value: json.dumps(value, ensure_ascii=False)
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return pages.get_template("page.html.jinja").render(
        **content, script=script, script_sha256=digest, style=style + plots.rules()
    )


def _cut(text: str, longest: int) -> str:
    """A text that is too long for the page, with what is left out counted."""
    more = len(text) - longest
    return text if more <= 0 else f"{text[:longest]}\n[{more:,} more characters stand in scores/]"


def _content(run: Path, steps: Mapping[str, artifact.Artifact]) -> dict[str, Any]:
    """What the templates show: figures of the steps' own files, and counts of their records."""
    facts = {name: step.manifest for name, step in steps.items()}
    folder, scored = run / "scores", facts.get("scores", {})
    arms = {role: name for role in ("base", "few_shot", "tuned") if (name := (scored.get("arms") or {}).get(role))}
    records = scores.read(folder / scores.FILE) if "scores" in steps else []
    records = [score for score in records if score.arm in arms.values()]
    decided = measured.stored(run / "verdict" / verdict.FILE) if "verdict" in steps else None
    about, asked = scored.get("suites") or {}, decided["rows"] if decided else []
    wanted = {
        row["suite"] for row in asked if row["rule"].startswith("better") or row["versus"] == arms.get("few_shot")
    }
    wanted |= {score.suite for score in records if score.arm == arms.get("few_shot")}
    groups = wording.groups(
        [*((row["suite"], row["metric"]) for row in asked), *((s.suite, s.metric) for s in records)], wanted, about
    )
    audit = people.verdicts(run, steps["scores"].sha256 if "scores" in steps else None, records)
    found = items.collect(records, items.lines(folder / "items.jsonl"), arms, about, audit["said"])
    items.add_picks(found, items.lines(folder / "observations.jsonl"))
    rows = changes.told(decided, groups, scored.get("noise_floor") or {}) if decided else []
    logged = items.lines(run / ("adapter" if "adapter" in steps else "model") / "metrics.jsonl")
    older = scored.get("cost") if isinstance(scored.get("cost"), dict) else None
    widths = {"wide": 960, "narrow": 340}
    return {
        "run": shlex.quote(str(run)), "title": run.resolve().name, "steps": steps, "facts": facts, "arms": arms, "groups": wording.GROUPS,
        "verdict": decided, "decision": changes.DECISIONS[decided["verdict"]] if decided else None, "rows": rows,
        "nearest": changes.nearest(rows), "slices": changes.slices(decided, groups) if decided else [], "rung": changes.rung(rows),
        "examples": items.examples(found, groups), "suites": items.shown(found, groups, about), "tags": items.tags(found),
        "flips": items.counted(records, found, arms, groups), "audit": audit, "excluded": items.excluded(found),
        "outcomes": items.outcomes(found, arms), "outcome_names": wording.OUTCOMES, "answering": items.answering(records, arms),
        "judges": measured.judges(scored.get("judges"), records),
        "calibration": measured.calibration(measured.stored(folder / "calibration.json"), arms),
        "cost": measured.cost(cost := measured.stored(folder / "cost.json"), arms), "cost_of": cost, "older_cost": older,
        "lm_eval": measured.lm_eval(scored.get("lm_eval"), arms), "beaten": changes.beaten(rows),
        "shift": measured.stored(folder / "shift.json"), "logged": logged,
        "forest": {size: plots.forest_svg(rows, width) for size, width in widths.items()},
        "curves": {size: plots.curves_svg(logged, width) for size, width in widths.items()},
    }  # fmt: skip


def _summary(content: Mapping[str, Any]) -> dict[str, Any]:
    """`report.json`: the verdict as it stands, and what the page counts beside it."""
    audit = {key: content["audit"][key] for key in ("n", "agreed", "rows", "earlier")}
    kept = {key: content[key] for key in ("flips", "excluded", "outcomes", "answering")}
    artifacts = {name: step.sha256 for name, step in content["steps"].items()}
    return {
        "decision": content["decision"][0].lower(),
        "artifacts": artifacts,
        **kept,
        "audit": audit,
        "verdict": content["verdict"],
    }


def _flipped(content: Mapping[str, Any]) -> str:
    """A line for `report.md`: the page has the items."""
    ways = [f"{row['suite']}.{row['metric']} {row['worse']} worse, {row['better']} better" for row in content["flips"]]
    return f"\nItems that flipped, of both answers in `{FILE}`: {'; '.join(ways)}.\n" if ways else ""
