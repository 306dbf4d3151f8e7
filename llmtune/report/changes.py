"""The verdict in the words of the page: a row a metric, the slices of those that gate, and what examples alone would give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune import plots
from llmtune.report.wording import GROUPS, Rows, figure, name, unit_of, visible

DECISIONS = {
    "PASS": ("Promote", "The tuned model may replace its base."),
    "FAIL": ("Reject", "The tuned model must not replace its base."),
    "INCONCLUSIVE": ("Hold", "These items cannot decide; the base stays until more of them do."),
}
COUNTED = ("FAIL", "INSUFFICIENT", "INCONCLUSIVE", "PASS")


def told(verdict: Mapping[str, Any], groups: Mapping[str, str], noise: Mapping[str, Any]) -> Rows:
    """The rows of the verdict, by group, those that gate first. noise: suite -> metric -> what the base differs from itself by."""
    base = verdict["arms"]["base"]
    examples = {(row["suite"], row["metric"]): row["base"] for row in verdict["rows"] if row["versus"] != base}
    rows = [_told(row, groups, noise) for row in verdict["rows"]]
    for row in rows:
        row["against_base"] = row["versus"] == base
        row["few_shot"] = examples.get((row["suite"], row["metric"])) if row["against_base"] else None
        row["detail"] = f"{row['n']} items, {row['asked'] if row['against_base'] else 'against ' + row['versus']}"
    return sorted(rows, key=lambda row: (GROUPS.index(row["group"]), not row["against_base"], not row["verdict"]))


def _told(row: Mapping[str, Any], groups: Mapping[str, str], noise: Mapping[str, Any]) -> dict[str, Any]:
    metric, margin, floor = row["metric"], row["margin"], row.get("floor")
    factor, _, level, unit = unit_of(metric)
    delta, low, high = (figure(row[key], metric, signed=True, unit=False) for key in ("delta", "low", "high"))
    side = 1 if row["higher_is_better"] == row["rule"].startswith("better") else -1
    asked = row["rule"] if margin is None else f"{row['rule']} {margin * factor:g}{unit}"
    limit = figure(floor["limit"], metric, unit=level == " %") if floor else ""
    own = f"{figure(row['tuned'], metric, unit=False)} itself, {floor['rule']} {limit}" if floor else None
    floor_at = floor["limit"] - row["base"] if floor and row["base"] is not None else None
    return {
        **row,
        "name": name(metric),
        "group": groups[row["suite"]],
        "unit": level,
        "label": visible(f"{row['suite']}: {name(metric)}{' (floor effect)' if row['floor_effect'] else ''}"),
        "asked": asked,
        "own": own,
        "threshold": None if margin is None else side * margin,
        "floor_at": floor_at,  # where, as a change from this base, the model's own limit lies
        "figures": f"{delta} [{low}, {high}]{unit}",
        "bound_said": figure(row["bound"], metric, signed=True, unit=False) if _missing(row) else None,
        "noise": (measured := row.get("noise") or noise.get(row["suite"], {}).get(metric)),
        "noise_said": _noise_said(measured, row["delta"]) if measured else None,
        "noise_at": measured["mean_abs_delta"] if measured else None,
    }


def _missing(row: Mapping[str, Any]) -> bool:
    """Does the bound that decides differ from the interval, which is of what is scored?"""
    return row.get("bound") is not None and any(row["unscored"].values())


def _noise_said(measured: Mapping[str, Any], delta: float | None) -> str | None:
    """How far the base is from itself when nothing but the batch size changes."""
    if not measured["flips"]:
        return None
    within = delta is not None and abs(delta) <= measured["mean_abs_delta"]
    said = f"{measured['flips']:g} of {measured['items']:g} items differ between two runs of the base"
    return said + (", and the change lies within that noise" if within else "")


def nearest(rows: Rows) -> dict[str, Any] | None:
    """Of the gating rows that pass, the one whose bound leaves the least of its margin."""
    left = {}
    for i, row in enumerate(rows):
        bound = row.get("bound")
        if row["verdict"] == "PASS" and row["margin"] and bound is not None:
            left[i] = abs(bound - row["threshold"]) / row["margin"]
    return rows[min(left, key=lambda i: left[i])] if left else None


def slices(verdict: Mapping[str, Any], groups: Mapping[str, str]) -> Rows:
    """A gating metric each: its slices in order of their fields, drawn on one scale. What fails comes first."""
    found: dict[tuple[str, str], Rows] = {}
    for row in verdict.get("slices") or []:
        found.setdefault((row["suite"], row["metric"]), []).append(_told(row, groups, {}))
    made: Rows = []
    for (suite, metric), rows in found.items():
        ends = [
            abs(row[key]) for row in rows for key in ("delta", "low", "high", "threshold") if plots.finite(row[key])
        ]
        for row in rows:
            row["field"], row["value"] = row["slice"]
            row["plot"] = plots.interval_svg(row, max(ends, default=0) or 1)
        counts = {word: sum(row["verdict"] == word for row in rows) for word in COUNTED}
        made.append(
            {
                "suite": suite,
                "metric": metric,
                "name": name(metric),
                "group": groups[suite],
                "rows": rows,
                "counts": counts,
            }
        )
    made.sort(key=lambda one: (-one["counts"]["FAIL"], GROUPS.index(one["group"])))
    return made


def beaten(rows: Rows) -> Rows:
    """The rows in which the tune is worse than the base with examples in its prompt, beyond its 90 % interval."""
    against = [
        row for row in rows if not row["against_base"] and plots.finite(row["low"]) and plots.finite(row["high"])
    ]
    return [row for row in against if (row["high"] < 0 if row["higher_is_better"] else row["low"] > 0)]


def rung(rows: Rows) -> Rows:
    """What examples in the prompt give beside what the tune gives: a row a metric in which the tune changed anything."""
    found = []
    for row in rows:
        if row["few_shot"] is not None and row["base"] is not None and row["tuned"] is not None:
            gained, given = row["tuned"] - row["base"], row["few_shot"] - row["base"]
            better = gained > 0 if row["higher_is_better"] else gained < 0
            found.append({**row, "given": given, "share": given / gained if better else None})
    return found
