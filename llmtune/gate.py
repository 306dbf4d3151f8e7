"""Scores -> PASS, FAIL or INCONCLUSIVE: may the tuned model replace the base? Decided from per-item scores alone.

A metric PASSes when its one-sided 95 % bound clears its margin and, where there is one, its floor; it FAILs when the
tuned model is worse beyond chance (Holm over all gating metrics) or surely beyond its floor, and is INCONCLUSIVE
otherwise: too few items never PASS, and a mean alone decides nothing. A slice can FAIL the whole, and never rescue it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmtune import artifact, cards, paired, scores, stats
from llmtune import verdict as verdicts
from llmtune.errors import ArtifactError, ConfigError, did_you_mean
from llmtune.paired import Pairs, Table
from llmtune.verdict import FILE, FLOORS, INSUFFICIENT, REPORTED, RULES, Floor, Row, Verdict

if TYPE_CHECKING:
    from pathlib import Path

    from llmtune.scores import Score

ALPHA = 0.05
LEAST_SLICE = 30  # items; a smaller slice is "insufficient"

Rules = Mapping[str, Mapping[str, Mapping[str, float]]]
Noise = Mapping[str, Mapping[str, Mapping[str, float]]]


def run(scores_dir: Path, output_dir: Path | None = None, margins: dict[str, float] | None = None) -> artifact.Artifact:
    """Judge the scores in `scores_dir` and write a verdict artifact, replacing a former verdict at `output_dir`.

    margins: "suite.metric" -> number to use in the suite's own rule for that metric; the verdict records it.
    output_dir: `verdict` beside the scores unless given. Raises ConfigError for an unknown key or a bad number,
    ArtifactError when the scores do not pair, are not of the suites and the subject their manifest names, were judged by
    one whose card does not allow it, or when something else lies at `output_dir`.
    """
    source = artifact.read(scores_dir, "scores")
    output_dir = output_dir or scores_dir.resolve().parent / "verdict"
    try:
        suites, arms, subject = (source.manifest[key] for key in ("suites", "arms", "subject"))
        hashes = {name: facts["sha256"] for name, facts in suites.items()}
        rules = {name: {m: _set(r) for m, r in (facts.get("gate") or {}).items()} for name, facts in suites.items()}
        keys, found = ("items", "flips", "mean_abs_delta"), source.manifest.get("noise_floor") or {}
        noise = {name: {m: {key: float(x[key]) for key in keys} for m, x in of.items()} for name, of in found.items()}
        tuned, judged, judges = arms["tuned"], subject["sha256"], dict(source.manifest["judges"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{scores_dir}: its manifest lacks what a gate needs ({error!r}); evaluate anew") from None
    if output_dir.resolve().is_relative_to(scores_dir.resolve()):
        raise ArtifactError(f"{output_dir}: lies inside the scores it would judge; choose another output_dir")
    if output_dir.exists():
        artifact.read(output_dir, "verdict")  # nothing but a verdict is replaced
    overrides = _override(rules, margins or {})
    records = scores.read(scores_dir / scores.FILE)
    for score in records:
        if score.suite_sha256 != hashes.get(score.suite):
            raise ArtifactError(f"{scores_dir}: suite '{score.suite}' is not of the version its manifest names")
        if score.arm == tuned and score.artifact_sha256 != judged:
            raise ArtifactError(f"{scores_dir}: item '{score.item_id}' was answered by another model than the subject")
    verdict = decide(records, rules, arms, judges, noise)
    verdict = replace(verdict, subject=subject, suites=hashes, overrides=overrides)
    with artifact.writing(output_dir, "verdict", [source], replace=True) as draft:
        draft.facts |= {"verdict": verdict.verdict, "summary": verdict.summary, "subject": subject}
        artifact.write_atomically(draft.path / FILE, verdicts.dump(verdict))
    return artifact.read(output_dir)


def read(made: artifact.Artifact) -> Verdict:
    """The verdict that `run` wrote into this artifact."""
    return verdicts.read(made.path / FILE)


def _set(rule: Mapping[str, float | None]) -> dict[str, float]:
    """The rule without a kind that is None, as a config writes the kind that was not chosen."""
    return {kind: number for kind, number in rule.items() if number is not None}


def _override(rules: dict[str, dict[str, dict[str, float]]], margins: dict[str, float]) -> dict[str, dict[str, float]]:
    gates = {f"{suite}.{metric}": (suite, metric) for suite in rules for metric in rules[suite]}
    if unknown := [f"{key}: gates nothing{did_you_mean(key, gates)}" for key in margins if key not in gates]:
        raise ConfigError("margins", unknown)
    changed = {}
    for key, number in margins.items():
        suite, metric = gates[key]
        rule = rules[suite][metric]
        kind = next(kind for kind in RULES if kind in rule)
        changed[key] = {"from": rule[kind], "to": number}
        rules[suite][metric] = rule | {kind: number}
    return changed


def decide(
    records: Iterable[Score],
    rules: Rules,
    arms: Mapping[str, str | None],
    judges: cards.Judges | None = None,
    noise: Noise | None = None,
) -> Verdict:
    """The verdict on `records` under `rules`: suite -> metric -> {"margin": x} or {"improves_by": x}, and a floor if any.

    arms: what "base", "tuned" and, or None, "few_shot" are called in the records. Metrics without a rule and whatever
    is compared with few_shot are reported and decide nothing. judges: id -> {"version", "card"}, as the scores name them.
    noise: suite -> metric -> {"items", "flips", "mean_abs_delta"}. The order of the records does not matter.
    Raises ConfigError for a malformed rule or for none, ArtifactError when scores are missing, double or do not pair, or a
    judge's card does not allow it to decide.
    """
    table = paired.table(records)
    _check(rules, table)
    if not (arms["base"] and arms["tuned"]) or arms["base"] == arms["tuned"]:
        raise ArtifactError(f"needs two arms to compare, and base is {arms['base']!r}, tuned {arms['tuned']!r}")
    gated = {key: table[key] for key in table if key[1] in rules.get(key[0], {})}
    cards.check(
        {".".join(key): [s for arm in of.values() for s in arm.values()] for key, of in gated.items()}, judges or {}
    )
    rows, parts = [], {}
    for (suite, metric), by_arm in table.items():
        for role in ("base", "few_shot"):
            versus, rule = arms.get(role), rules.get(suite, {}).get(metric, {}) if role == "base" else {}
            if versus and (role == "base" or versus in by_arm):
                place, tuned = f"{suite}.{metric}", str(arms["tuned"])
                pairs = paired.match(place, by_arm, versus, tuned, same_prompts=role == "base")
                row = paired.measure(pairs, versus, rule)
                known = (noise or {}).get(suite, {}).get(metric) if role == "base" else None
                rows.append(
                    replace(row, noise=dict(known) if known else None, corrected=cards.corrected(pairs, judges or {}))
                )
                if rule:
                    parts[place] = _slices(pairs, versus, rule)
    rows.sort(key=lambda row: (row.rule == REPORTED, row.versus != arms["base"], row.name))
    gating = _judged([row for row in rows if row.rule != REPORTED], "metrics")
    slices = _judged_slices(parts)
    word, summary = _summary(gating, [row for row in slices if row.verdict == "FAIL"])
    floors = sum(row.floor_effect is not None for row in gating)
    rows = [_told(row) for row in (*gating, *rows[len(gating) :])]
    return Verdict(word, summary, tuple(rows), floors, dict(arms), slices=slices)


def _summary(gating: Sequence[Row], failed_slices: Sequence[Row]) -> tuple[str, str]:
    """The verdict on the whole, and the sentence that says it."""

    def listed(rows: Sequence[Row]) -> str:
        return f"{len(rows)} of {len(gating)} gating metrics ({', '.join(row.name for row in rows)})"

    failed, undecided = ([row for row in gating if row.verdict == word] for word in ("FAIL", "INCONCLUSIVE"))
    beyond = [row for row in failed if row.floor and row.floor.verdict == "FAIL"]
    worse = [row for row in failed if row not in beyond or (row.p_holm is not None and row.p_holm < ALPHA)]
    many = f"{len(failed_slices)} slice{'s' * (len(failed_slices) > 1)}"
    slices = f"{many} ({', '.join(row.name for row in failed_slices)})"
    parts = [f"worse than the base, beyond chance, on {listed(worse)}"] if worse else []
    parts += [f"beyond its floor on {listed(beyond)}"] if beyond else []
    parts += [f"worse than the base, beyond chance, on {slices}"] if failed_slices else []
    if parts:
        word, said = "FAIL", f"The tuned model is {'; it is '.join(parts)}."
    elif undecided:
        word, said = (
            "INCONCLUSIVE",
            f"These items cannot decide {listed(undecided)}; no gating metric is worse beyond chance.",
        )
    else:
        word = "PASS"
        said = f"All {len(gating)} gating metrics pass." if len(gating) > 1 else "The one gating metric passes."
    if floors := [row for row in gating if row.floor_effect]:
        said += f" Floor effect on {listed(floors)}: a PASS there is no evidence."
    return word, said


def _check(rules: Rules, table: Table) -> None:
    def valid(rule: Any) -> bool:
        if not isinstance(rule, Mapping) or not all(
            type(x) in (int, float) and math.isfinite(x) for x in rule.values()
        ):
            return False
        chosen, floors = rule.keys() & RULES.keys(), rule.keys() & FLOORS.keys()
        known = len(chosen) == 1 and len(floors) <= 1 and rule.keys() == chosen | floors
        return known and all(rule[kind] >= 0 for kind in chosen)

    named = {(suite, metric): rule for suite, gate in rules.items() for metric, rule in gate.items()}
    wanted = "{margin: x} or {improves_by: x} with x of 0 or more, and at most one of at_most and at_least beside it"
    problems = [f"{'.'.join(key)}: {rule!r} is not {wanted}" for key, rule in named.items() if not valid(rule)]
    if problems or not named:
        raise ConfigError("gate", problems or "no metric has a margin, so there is nothing to decide")
    if lacking := [".".join(key) for key in named if key not in table]:
        raise ArtifactError(f"{', '.join(lacking)}: must be gated, and there are no scores for it")


def _slices(pairs: Pairs, versus: str, rule: Mapping[str, float]) -> list[Row]:
    """A row each slice, by the same computation; a floor is the whole metric's and not its slices'."""
    rows = []
    own = {kind: number for kind, number in rule.items() if kind in RULES}
    for field, value, part in paired.by_slice(pairs):
        row = paired.describe(part, versus, own)[0]
        if row.n < LEAST_SLICE or row.clusters < paired.LEAST_CLUSTERS:
            said = f"{row.n} items of {row.clusters} sources, and {LEAST_SLICE} of {paired.LEAST_CLUSTERS} are needed"
            said = f"{said} to judge a slice" + (f"; {row.missing_said}" if row.missing else "")
            row = replace(row, verdict=INSUFFICIENT, reason=said)
        else:
            row = paired.measure(part, versus, own)
        rows.append(replace(row, slice=(field, value)))
    return rows


def _judged_slices(parts: Mapping[str, list[Row]]) -> tuple[Row, ...]:
    """Holm within each metric, times the number of metrics: one unchanged model in twenty FAILs by any slice, at most."""
    testable = {name: [row for row in rows if row.verdict != INSUFFICIENT] for name, rows in parts.items()}
    metrics, done = sum(bool(rows) for rows in testable.values()), []
    for name in sorted(parts):
        done += [row for row in parts[name] if row.verdict == INSUFFICIENT]
        told = f"slices, times {metrics} metrics" if metrics > 1 else "slices"
        done += _judged(testable[name], told, metrics)
    return tuple(sorted(done, key=lambda row: (row.suite, row.metric, row.slice)))


def _judged(rows: Sequence[Row], what: str, times: int = 1) -> list[Row]:
    """The rows with a verdict each, their p adjusted by Holm over all that have one, and multiplied."""
    p_values = [row.p_value for row in rows if row.p_value is not None]
    adjusted = iter([min(1.0, times * p) for p in stats.holm(p_values)])
    over = f"{len(p_values)} {what}"
    return [_judge(row, None if row.p_value is None else next(adjusted), over) for row in rows]


def _judge(row: Row, p_holm: float | None, over: str) -> Row:
    """The row with PASS, FAIL or INCONCLUSIVE, and why; with a floor the worse of the two."""
    lost = row.missing - row.incoherent
    if row.reason or row.low is None or row.high is None or row.bound is None or row.margin is None:
        floor = row.floor and replace(row.floor, verdict="INCONCLUSIVE")
        reason = (row.reason or "no item is scored in both arms") + _first_get(lost)
        return replace(row, verdict="INCONCLUSIVE", reason=reason, floor=floor)
    low, high = (-row.high, -row.bound) if row.higher_is_better else (row.low, row.bound)
    asked = f"{row.margin:g} is allowed" if row.limit > 0 else f"better by more than {row.margin:g} is asked"
    surely = "95 % bound, each missing answer counted against the tuned model" if row.missing else "95 % bound"
    reason = f"{'worse by at most' if high >= 0 else 'better by at least'} {abs(high):.4g} ({surely}), where {asked}"
    more, needed = "", None
    if high < row.limit:
        word, more = "PASS", "; a real change for the worse, within what is allowed" if low > 0 else ""
    elif p_holm is not None and p_holm < ALPHA:
        word = "FAIL"
        of = f" on the {row.n} items scored in both arms" if row.missing else ""
        reason = f"worse by {abs(row.delta or 0.0):.3g}{of}, beyond chance (p = {p_holm:.2g} after Holm over {over})"
    else:
        word, needed = "INCONCLUSIVE", row.items_needed
        more = f"; about {needed} such items would decide" if needed else ""
    if row.floor:
        words = (word, row.floor.verdict)
        word = next(worst for worst in ("FAIL", "INCONCLUSIVE", "PASS") if worst in words)
        more += f"; {_floor_said(row.floor, row.tuned or 0.0)}"
        open_ones = [n for w, n in zip(words, (needed, row.floor.items_needed), strict=True) if w == "INCONCLUSIVE"]
        needed = max([n for n in open_ones if n], default=None) if word == "INCONCLUSIVE" and all(open_ones) else None
    if row.missing:
        more += f"; {row.missing_said}"
        more += _first_get(lost) if word == "INCONCLUSIVE" and not needed else ""
    return replace(row, verdict=word, reason=reason + more, p_holm=p_holm, items_needed=needed)


def _first_get(lost: int) -> str:
    """lost: missing answers that another call could bring."""
    return f"; first get the {f'{lost} missing answers' if lost > 1 else 'missing answer'}" if lost else ""


def _floor_said(floor: Floor, mean: float) -> str:
    most = floor.rule == FLOORS["at_most"]
    end = floor.bound if floor.verdict != "FAIL" else floor.low if most else floor.high
    side = "at least" if (floor.verdict == "FAIL") == most else "at most"
    asked = f"where {floor.rule} {floor.limit:g} is {'allowed' if most else 'asked'}"
    said = f"its own mean, {mean:.3g}, is {side} {end:.3g} (95 % bound), {asked}"
    return said + (f"; about {floor.items_needed} such items would decide that" if floor.items_needed else "")


def _told(row: Row) -> Row:
    """The row with what else there is to say: incoherent arms in its reason, the rest as notes."""
    notes = []
    if row.excluded:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(row.excluded.items()))
        notes.append(f"{sum(row.excluded.values())} items are left out: {reasons}")
    if row.noise:
        flips, items, change = (row.noise[key] for key in ("flips", "items", "mean_abs_delta"))
        said = f"{flips:g} of {items:g} items flip when nothing but the batch size changes"
        inside = row.delta is not None and 0 < abs(row.delta) <= change
        notes.append(said + (f", and the change lies inside that noise ({change:.3g})" if inside else ""))
    if row.corrected:
        names = {"base": row.versus, "tuned": "tuned", "delta": "change"}
        rates = [f"{names[key]} {_rate(x, at_edge=key != 'delta')}" for key, x in row.corrected.items()]
        notes.append(f"without the judge's measured errors: {', '.join(rates)}")
    return replace(row, reason="; ".join([row.reason, *paired.incoherent(row)]), notes=tuple(notes))


def _rate(found: Mapping[str, float], *, at_edge: bool) -> str:
    if at_edge and found["value"] in (0.0, 1.0):
        return f"{found['value']:g} (beyond what its errors leave room for)"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
