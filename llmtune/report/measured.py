"""What was measured beside the scores: judges and their cards, calibration, cost, domain shift. Each may be absent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune import plots
from llmtune.report.wording import Rows
from llmtune.scores import Score

MEASURES = (  # label, how it is written, where it stands
    ("size on disk", "size", ("size_bytes",)),
    ("parameters", "count", ("parameters",)),
    ("the adapter alone, on disk", "size", ("adapter_bytes",)),
    ("weights in memory", "size", ("weights_bytes",)),
    ("peak memory", "size", ("peak_bytes",)),
    *((f"time to the first token, {p}", "time", ("first_token_s", p)) for p in ("p50", "p90", "p99")),
    *((f"time for each further token, {p}", "time", ("per_token_s", p)) for p in ("p50", "p90", "p99")),
    ("tokens a second, one prompt at a time", "rate", ("tokens_per_s_alone",)),
    ("tokens a second, several at once", "rate", ("tokens_per_s",)),
)


def stored(file: Path) -> dict[str, Any]:
    """The object in `file`, empty where there is no such file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def judges(facts: Mapping[str, Any] | None, records: Sequence[Score]) -> Rows:
    """A judge each: what it judged here, and its card. Judges that only the records name have none."""
    used: dict[tuple[str, str], dict[str, None]] = {}
    for score in records:
        if score.judge:
            used.setdefault((score.judge["id"], score.judge["version"]), {})[f"{score.suite}.{score.metric}"] = None
    known = facts or {}
    keys = [*used, *((name, about["version"]) for name, about in known.items() if (name, about["version"]) not in used)]
    return [
        {
            "id": name,
            "version": version,
            "metrics": list(used.get((name, version), {})),
            "card": (known.get(name) or {}).get("card"),
        }
        for name, version in keys
    ]


def calibration(found: Mapping[str, Any], arms: Mapping[str, str]) -> Rows:
    """A suite each: the arms in order with their figures and reliability diagram, and the slices."""
    made = []
    for suite, entry in found.items():
        own = [{"arm": arm, "role": role, **entry[arm]} for role, arm in arms.items() if arm in entry]
        for figures in own:
            title = f"{suite}: reliability of {figures['arm']}"
            figures["plot"] = plots.reliability_svg(figures["bins"], title) if figures.get("bins") else ""
        slices = [
            {
                "field": field,
                "value": value,
                "arms": [{"arm": arm, **of_arm[arm]} for arm in arms.values() if arm in of_arm],
            }
            for field, values in (entry.get("slices") or {}).items()
            for value, of_arm in values.items()
        ]
        made.append({"suite": suite, "n": entry["n"], "classes": entry.get("classes"), "arms": own, "slices": slices})
    return made


def lm_eval(found: Mapping[str, Any] | None, arms: Mapping[str, str]) -> Rows:
    """What lm-eval's own command prints: a row a task or group and metric, its value in each arm."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for suite, by_arm in (found or {}).items():
        for arm in arms.values():
            for task, figures in by_arm.get(arm, {}).items():
                for metric, value in figures.items():
                    if metric != "sample_len":
                        rows.setdefault((suite, task, metric), {"n": figures.get("sample_len")})[arm] = value
    return [
        {"suite": suite, "task": task, "metric": metric, "n": row.pop("n"), "values": row}
        for (suite, task, metric), row in rows.items()
    ]


def cost(found: Mapping[str, Any], arms: Mapping[str, str]) -> Rows:
    """A row a measure: its value in each arm that has one, and tuned over base.

    Beside a median stands the ratio that was taken prompt by prompt, with its interval.
    """
    paired, rows = found.get(arms.get("tuned", ""), {}).get("ratio", {}), []
    for label, kind, path in MEASURES:
        values = {arm: _at(found[arm], path) for arm in arms.values() if arm in found}
        if any(value is not None for value in values.values()):
            base, tuned = values.get(arms.get("base", "")), values.get(arms.get("tuned", ""))
            ratio = tuned / base if tuned is not None and base else None
            by_prompt = paired.get(path[0]) if path[-1] == "p50" else None
            rows.append({"label": label, "kind": kind, "values": values, "ratio": ratio, "by_prompt": by_prompt})
    return rows


def _at(found: Any, path: Sequence[str]) -> float | None:
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if plots.finite(found) else None
