"""Scores -> PASS, FAIL or INCONCLUSIVE: may the tuned model replace the base? Decided from per-item scores alone.

A metric PASSes when its one-sided 95 % bound clears its margin, FAILs when the tuned model is worse beyond chance (Holm
over all gating metrics), and is INCONCLUSIVE otherwise: too few items never PASS, and a mean alone decides nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune import artifact, scores, stats
from llmtune.errors import ArtifactError, ConfigError, did_you_mean
from llmtune.scores import Score

if TYPE_CHECKING:
    from pathlib import Path

FILE = "verdict.json"
RULES = {"margin": "not worse by more than", "improves_by": "better by more than"}
REPORTED = "reported"
TANGO, BOOTSTRAP = "Tango score", "cluster bootstrap (BCa)"
ALPHA, CONFIDENCE = 0.05, 0.90  # each end of a 90 % interval is a one-sided 95 % bound
LEAST_CLUSTERS = 20
LEAST_CHANGED = 10  # clusters; with fewer a bootstrap sees no tail: up to 33 % false PASS at 20 clusters, not 5 %

Rules = Mapping[str, Mapping[str, Mapping[str, float]]]
Table = dict[tuple[str, str], dict[str, dict[str, Score]]]


@dataclass(frozen=True)
class Row:
    """One metric, the tuned arm against the arm named in `versus`, whose mean is `base`.

    delta: tuned - base, an unscored 0/1 item counting as bad in tuned and as good in base. low, high: 90 % interval
    of delta; the end on the harmful side (low where higher is better, else high) is the one-sided 95 % bound that
    decides. p_value: one-sided, that tuned is worse; p_holm: the same over all gating metrics. items_needed: about how
    many such items PASS with 80 % power. verdict: None if only reported. A PASS with a floor_effect is no evidence.
    """

    suite: str
    metric: str
    higher_is_better: bool
    versus: str
    rule: str
    margin: float | None
    n: int
    clusters: int
    unscored: dict[str, int] = field(default_factory=dict)
    base: float | None = None
    tuned: float | None = None
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    method: str | None = None
    p_value: float | None = None
    p_holm: float | None = None
    verdict: str | None = None
    reason: str = ""
    floor_effect: str | None = None
    items_needed: int | None = None

    @property
    def name(self) -> str:
        return f"{self.suite}.{self.metric}"

    @property
    def limit(self) -> float:
        """What the upper bound of the change for the worse has to stay below."""
        margin = self.margin or 0.0
        return margin if self.rule == RULES["margin"] else -margin


@dataclass(frozen=True)
class Verdict:
    """What `verdict.json` holds. subject: the artifact judged, by hash. overrides: margins set for this run only."""

    verdict: str
    summary: str
    rows: tuple[Row, ...]
    floor_effects: int
    arms: Mapping[str, str | None]
    subject: dict[str, str] = field(default_factory=dict)
    suites: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, dict[str, float]] = field(default_factory=dict)


def run(scores_dir: Path, output_dir: Path | None = None, margins: dict[str, float] | None = None) -> artifact.Artifact:
    """Judge the scores in `scores_dir` and write a verdict artifact, replacing a former verdict at `output_dir`.

    margins: "suite.metric" -> number to use in the suite's own rule for that metric; the verdict records it.
    output_dir: `verdict` beside the scores unless given. Raises ConfigError for an unknown key or a bad number, ArtifactError when the scores do not pair, are not of the
    suites and the subject their manifest names, or when something else lies at `output_dir`.
    """
    source = artifact.read(scores_dir, "scores")
    output_dir = output_dir or scores_dir.resolve().parent / "verdict"
    try:
        suites, arms, subject = (source.manifest[key] for key in ("suites", "arms", "subject"))
        hashes = {name: facts["sha256"] for name, facts in suites.items()}
        rules = {name: {m: _set(r) for m, r in (facts.get("gate") or {}).items()} for name, facts in suites.items()}
        tuned, judged = arms["tuned"], subject["sha256"]
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
    verdict = replace(decide(records, rules, arms), subject=subject, suites=hashes, overrides=overrides)
    with artifact.writing(output_dir, "verdict", [source], replace=True) as draft:
        draft.facts |= {"verdict": verdict.verdict, "summary": verdict.summary, "subject": subject}
        text = json.dumps(asdict(verdict), indent=1, ensure_ascii=False, allow_nan=False)
        artifact.write_atomically(draft.path / FILE, text)
    return artifact.read(output_dir)


def read(made: artifact.Artifact) -> Verdict:
    """The verdict that `run` wrote into this artifact."""
    stored = json.loads((made.path / FILE).read_text(encoding="utf-8"))
    return Verdict(**stored | {"rows": tuple(Row(**row) for row in stored["rows"])})


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
        kind, before = next(iter(rules[suite][metric].items()))
        rules[suite][metric] = {kind: number}
        changed[key] = {"from": before, "to": number}
    return changed


def decide(records: Iterable[Score], rules: Rules, arms: Mapping[str, str | None]) -> Verdict:
    """The verdict on `records` under `rules`: suite -> metric -> {"margin": x} or {"improves_by": x}.

    arms: what "base", "tuned" and, or None, "few_shot" are called in the records. Metrics without a rule and whatever
    is compared with few_shot are reported and decide nothing. The order of the records does not matter.
    Raises ConfigError for a malformed rule or for none, ArtifactError when scores are missing, double or do not pair.
    """
    table = _table(records)
    _check(rules, table)
    if not (arms["base"] and arms["tuned"]) or arms["base"] == arms["tuned"]:
        raise ArtifactError(f"needs two arms to compare, and base is {arms['base']!r}, tuned {arms['tuned']!r}")
    rows = []
    for (suite, metric), by_arm in table.items():
        for role in ("base", "few_shot"):
            versus, rule = arms.get(role), rules.get(suite, {}).get(metric, {}) if role == "base" else {}
            if versus and (role == "base" or versus in by_arm):
                pairs = _pairs(f"{suite}.{metric}", by_arm, versus, str(arms["tuned"]), same_prompts=role == "base")
                rows.append(_measure(pairs, versus, rule))
    rows.sort(key=lambda row: (row.rule == REPORTED, row.name, row.versus != arms["base"]))
    tested = {row.name: row.p_value for row in rows if row.rule != REPORTED and row.p_value is not None}
    p_holm = dict(zip(tested, stats.holm(list(tested.values())), strict=True))
    gating = [_judge(row, p_holm.get(row.name), len(tested)) for row in rows if row.rule != REPORTED]
    names = {v: [row.name for row in gating if row.verdict == v] for v in ("FAIL", "INCONCLUSIVE", "PASS")}
    verdict = next(v for v in names if names[v])
    listed = f"{len(names[verdict])} of {len(gating)} gating metrics ({', '.join(names[verdict])})"
    summary = {
        "PASS": f"All {len(gating)} gating metrics pass.",
        "FAIL": f"The tuned model is worse than the base, beyond chance, on {listed}.",
        "INCONCLUSIVE": f"These items cannot decide {listed}; no gating metric is worse beyond chance.",
    }[verdict]
    if floors := [row.name for row in gating if row.floor_effect]:
        summary += f" Floor effect on {len(floors)} of them ({', '.join(floors)}): a PASS there is no evidence."
    return Verdict(verdict, summary, (*gating, *rows[len(gating) :]), len(floors), dict(arms))


def _check(rules: Rules, table: Table) -> None:
    def valid(rule: Any) -> bool:
        single = isinstance(rule, Mapping) and len(rule) == 1
        kind, number = next(iter(rule.items())) if single else ("", -1)
        return kind in RULES and type(number) in (int, float) and 0 <= number < math.inf

    named = {(suite, metric): rule for suite, gate in rules.items() for metric, rule in gate.items()}
    wanted = "{margin: x} or {improves_by: x} with x of 0 or more"
    problems = [f"{'.'.join(key)}: {rule!r} is not {wanted}" for key, rule in named.items() if not valid(rule)]
    if problems or not named:
        raise ConfigError("gate", problems or "no metric has a margin, so there is nothing to decide")
    if lacking := [".".join(key) for key in named if key not in table]:
        raise ArtifactError(f"{', '.join(lacking)}: must be gated, and there are no scores for it")


def _table(records: Iterable[Score]) -> Table:
    """(suite, metric) -> arm -> item -> score. A value that is not finite becomes unscored."""
    table: Table = {}
    for score in records:
        items = table.setdefault((score.suite, score.metric), {}).setdefault(score.arm, {})
        if score.item_id in items:
            raise ArtifactError(f"{score.suite}.{score.metric}: item '{score.item_id}' is twice in arm '{score.arm}'")
        unscored = score.value is None or not math.isfinite(score.value)
        items[score.item_id] = replace(score, value=None) if unscored else score
    return table


def _pairs(
    place: str, by_arm: dict[str, dict[str, Score]], versus: str, tuned: str, *, same_prompts: bool
) -> list[tuple[Score, Score]]:
    """Each item in both arms, in the order of their names. Refuses arms that differ in what makes them comparable."""
    left, right = by_arm.get(versus, {}), by_arm.get(tuned, {})
    if not left and not right:
        raise ArtifactError(f"{place}: neither '{versus}' nor '{tuned}' has a score; there are {sorted(by_arm)}")
    for what in ("item_id", "suite_sha256", "higher_is_better", "cluster_id", *["prompt_sha256"] * same_prompts):
        unlike = {(i, getattr(s, what)) for i, s in left.items()} ^ {(i, getattr(s, what)) for i, s in right.items()}
        if items := sorted({item for item, _ in unlike}):
            raise ArtifactError(
                f"{place}: {what} differs between '{versus}' and '{tuned}' for {len(items)} items "
                f"('{items[0]}' for one); evaluate both arms on the same items"
            )
    return [(left[item], right[item]) for item in sorted(left)]


def _measure(pairs: Sequence[tuple[Score, Score]], versus: str, rule: Mapping[str, float]) -> Row:
    """The row before judgement: no verdict, and a reason only where nothing but INCONCLUSIVE is possible."""
    one, other = pairs[0]
    higher, unscored = one.higher_is_better, [sum(s.value is None for s in arm) for arm in zip(*pairs, strict=True)]
    values = [score.value for pair in pairs for score in pair if score.value is not None]
    binary = set(values) <= {0, 1}
    used = [(a, b) for a, b in pairs if binary or (a.value is not None and b.value is not None)]
    clusters = [a.cluster_id for a, _ in used]
    reason, count = "", len(set(clusters))
    if not binary and any(unscored):
        reason = f"{sum(unscored)} scores are missing, and a graded metric has no worst value to stand in for them"
    elif count < LEAST_CLUSTERS:
        reason = f"{count} independent items (clusters) are too few: {LEAST_CLUSTERS} are needed to judge at all"
    kind, margin = next(iter(rule.items()), (REPORTED, None))
    row = Row(one.suite, one.metric, higher, versus, RULES.get(kind, kind), margin, len(used), count)
    row = replace(row, unscored={versus: unscored[0], other.arm: unscored[1]}, reason=reason)
    if not used:
        return row
    base = np.array([float(higher) if a.value is None else a.value for a, _ in used])
    tuned = np.array([float(not higher) if b.value is None else b.value for _, b in used])
    started = np.array([a.value is not None for a, _ in used])  # the rest cannot be shown to have become worse
    worse = base - tuned if higher else tuned - base
    spread = 1.0 if binary else (max(values) - min(values)) or 1.0
    low, high, p_value, method, variance = _bounds(worse, worse * started, clusters, binary, spread)
    row = replace(row, base=float(base.mean()), tuned=float(tuned.mean()), delta=float((tuned - base).mean()))
    low, high = (0 - high, 0 - low) if higher else (low, high)
    row = replace(row, low=low, high=high, method=method, p_value=None if reason else p_value)
    if not rule:
        seen = "lower than" if high < 0 else "higher than" if low > 0 else "not told apart from"
        return replace(row, reason=reason or f"{seen} {versus}; decides nothing")
    needed = _items_needed(row, float(worse.mean()), variance, spread if method == TANGO else 0.0)
    return replace(row, floor_effect=_floor_effect(row, base[started]) if binary else None, items_needed=needed)


def _bounds(
    worse: stats.Floats, shown: stats.Floats, clusters: list[str], binary: bool, spread: float
) -> tuple[float, float, float, str, float]:
    """Low and high of the mean of `worse`, the p-value that `shown` is above 0, the method, one item's variance."""
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    net = np.bincount(index, weights=worse)
    variance = float(((net - (0 if binary else worse.mean()) * sizes) ** 2).sum() / len(worse))
    if (binary and len(net) == len(worse)) or np.count_nonzero(net) < LEAST_CHANGED:
        seen = np.bincount(index, weights=shown)
        p_value = stats.mcnemar_midp(int(np.count_nonzero(seen > 0)), int(np.count_nonzero(seen < 0)))
        return *stats.tango_over_clusters(worse, clusters, CONFIDENCE, spread), p_value, TANGO, variance
    interval = stats.cluster_bootstrap_interval(worse, clusters, CONFIDENCE)
    return *interval, stats.cluster_bootstrap_p(shown, clusters), BOOTSTRAP, variance


def _floor_effect(row: Row, base: stats.Floats) -> str | None:
    """Said of a 0/1 metric whose base leaves no more room for a change than the rule asks about."""
    assert row.margin is not None
    gain = row.rule == RULES["improves_by"]
    at = int(np.count_nonzero(base == float(row.higher_is_better == gain)))
    if not len(base) or len(base) - at > row.margin * len(base):
        return None
    place, change = ("best", "an improvement") if gain else ("worst", "a regression")
    beyond = f" of more than {row.margin:g}" if at < len(base) else ""
    return f"the base already has the {place} value ({at} of {len(base)}), so this suite cannot show {change}{beyond}"


def _items_needed(row: Row, worse: float, variance: float, spread: float) -> int | None:
    """For a model that did not change; where that cannot PASS, or so many are there already, for the change as seen."""
    assert row.margin is not None
    limit, size = row.limit, row.n / row.clusters
    for distance in (limit, limit - worse):
        if distance > row.margin / 10:
            clusters = stats.items_needed(variance / size, distance, spread=spread)
            if (needed := math.ceil(max(clusters, LEAST_CLUSTERS) * size)) > row.n:
                return needed
    return None


def _judge(row: Row, p_holm: float | None, tested: int) -> Row:
    """The row with PASS, FAIL or INCONCLUSIVE, and why."""
    if row.reason or row.low is None or row.high is None or row.delta is None or row.margin is None:
        return replace(row, verdict="INCONCLUSIVE", reason=row.reason or "no item is scored in both arms")
    low, high = (-row.high, -row.low) if row.higher_is_better else (row.low, row.high)
    asked = f"{row.margin:g} is allowed" if row.limit > 0 else f"better by more than {row.margin:g} is asked"
    reason = f"{'worse by at most' if high >= 0 else 'better by at least'} {abs(high):.4g} (95 % bound), where {asked}"
    if high < row.limit:
        verdict, more = "PASS", "; a real change for the worse, within what is allowed" if low > 0 else ""
    elif p_holm is not None and p_holm < ALPHA:
        verdict, more = "FAIL", ""
        reason = f"worse by {abs(row.delta):.3g}, beyond chance (p = {p_holm:.2g} after Holm over {tested} metrics)"
    else:
        verdict, more = (
            "INCONCLUSIVE",
            f"; about {row.items_needed} such items would decide" if row.items_needed else "",
        )
    if any(row.unscored.values()):
        more += f"; {sum(row.unscored.values())} missing scores count against the tuned model"
    needed = row.items_needed if verdict == "INCONCLUSIVE" else None
    return replace(row, verdict=verdict, reason=reason + more, p_holm=p_holm, items_needed=needed)


def render_text(verdict: Verdict) -> str:
    """The verdict, a table of its metrics and a sentence on each that gates, at most 110 columns wide."""
    lines, versus = wrap(f"{verdict.verdict}: {verdict.summary}", 110), ""
    for row in verdict.rows:
        if row.versus != versus:
            versus = row.versus
            lines += ["", f"{f'against {versus}':<30.30} items    base   tuned   delta  90 % interval       rule"]
        name = row.name if len(row.name) <= 29 else row.name[:28] + "…"
        numbers = " ".join(f"{_number(x):>7}" for x in (row.base, row.tuned, row.delta))
        rule = "" if row.margin is None else f"{'worse <' if row.limit > 0 else 'better >'} {row.margin:g}"
        result = (row.verdict or REPORTED) + (" (floor)" if row.verdict == "PASS" and row.floor_effect else "")
        interval = f"[{_number(row.low)}, {_number(row.high)}]"
        lines.append(f"{name:<30}{row.n:>6} {numbers}  {interval:<19} {rule:<13} {result}")
    said = {row.name: filter(None, (row.reason, row.floor_effect)) for row in verdict.rows if row.verdict}
    notes = [f"{name}: {'; '.join(sentences)}" for name, sentences in said.items()]
    for name, change in verdict.overrides.items():
        notes.append(f"{name}: {change['to']:g} was set for this run, where the suite has {change['from']:g}")
    lines.append("")
    for note in notes:
        lines += wrap(f"{note}.", 110, subsequent_indent="  ")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
