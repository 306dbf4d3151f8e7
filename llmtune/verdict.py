"""The verdict record, what `verdict.json` holds, and how it is shown: text, Markdown for a pull request, JUnit for a CI.

It is the interface between what decides and what shows. None of the renderings holds a prompt or an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from pathlib import Path

FILE = "verdict.json"
RULES = {"margin": "not worse by more than", "improves_by": "better by more than"}
FLOORS = {"at_most": "at most", "at_least": "at least"}
REPORTED = "reported"
INSUFFICIENT = "INSUFFICIENT"
JUNIT = {"FAIL": "failure", "INCONCLUSIVE": "error"}
Numbers = dict[str, float]


@dataclass(frozen=True)
class Floor:
    """The tuned arm's own mean against a limit that does not move with the base.

    rule: "at most" or "at least". low, high: 90 % interval of the mean of what is scored, each end a one-sided 95 % bound.
    bound: the end on the harmful side with every missing 0/1 answer as a bad one. verdict: PASS when the bound lies within
    the limit, FAIL when the interval lies beyond it, else INCONCLUSIVE, with about how many such items would PASS with 80 %
    power, if any number would.
    """

    rule: str
    limit: float
    low: float
    high: float
    bound: float
    method: str
    verdict: str
    items_needed: int | None = None


@dataclass(frozen=True)
class Row:
    """One metric, the tuned arm against the arm named in `versus`, whose mean is `base`; or one slice of it.

    n, clusters: of the items that are scored in both arms, from which base, tuned, delta, low, high and p_value come.
    delta: tuned - base. low, high: its 90 % interval. bound: the one-sided 95 % bound on the harmful side, which decides on
    PASS: the end of the interval (low where higher is better, else high), but with every missing 0/1 value as bad in tuned
    and as good in base. unscored: missing values by arm; incoherent: how many of them are incoherent answers.
    p_value: one-sided, that tuned is worse; p_holm: the same over all gating metrics, for a slice over all slices.
    items_needed: about how many such items PASS with 80 % power. verdict: None if only reported; with a floor the worse of
    both. A PASS with a floor_effect is no evidence. excluded: items left out, by reason. outcomes: arm -> what the judge
    saw -> items. noise: items, flips and mean absolute change of the base when nothing but the batch size changes.
    corrected: rates without the judge's errors: "base", "tuned", "delta" as {"value", "low", "high"}, 90 % intervals over the
    items and the judge's card. slice: (field, value), None for the whole metric. notes: sentences to show beside the reason.
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
    incoherent: int = 0
    base: float | None = None
    tuned: float | None = None
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    method: str | None = None
    p_value: float | None = None
    p_holm: float | None = None
    verdict: str | None = None
    reason: str = ""
    floor_effect: str | None = None
    items_needed: int | None = None
    floor: Floor | None = None
    excluded: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    noise: Numbers | None = None
    corrected: dict[str, Numbers] | None = None
    slice: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        of_slice = " where {} = {}".format(*self.slice) if self.slice else ""
        return "".join(c if c.isprintable() else "\ufffd" for c in f"{self.suite}.{self.metric}{of_slice}")

    @property
    def missing(self) -> int:
        return sum(self.unscored.values())

    @property
    def missing_said(self) -> str:
        arms = ", ".join(f"{count} of {arm}" for arm, count in self.unscored.items())
        words = f"; {self.incoherent} incoherent" if self.incoherent else ""
        return f"{self.missing} answer{'s are' if self.missing != 1 else ' is'} missing ({arms}{words})"

    @property
    def limit(self) -> float:
        """What the upper bound of the change for the worse has to stay below."""
        margin = self.margin or 0.0
        return margin if self.rule == RULES["margin"] else -margin

    @property
    def asked(self) -> str:
        """The rule in a few words."""
        rule = "" if self.margin is None else f"{'worse <' if self.limit > 0 else 'better >'} {self.margin:g}"
        return f"{rule}, {self.floor.rule} {self.floor.limit:g}" if self.floor else rule

    @property
    def result(self) -> str:
        """The verdict, and whether it is evidence."""
        return (self.verdict or REPORTED) + (" (floor)" if self.verdict == "PASS" and self.floor_effect else "")


@dataclass(frozen=True)
class Verdict:
    """What `verdict.json` holds. subject: the artifact judged, by hash. overrides: margins set for this run only.

    rows: a metric each, those that gate first. slices: of the gating metrics; one that FAILs fails the whole.
    """

    verdict: str
    summary: str
    rows: tuple[Row, ...]
    floor_effects: int
    arms: Mapping[str, str | None]
    subject: dict[str, str] = field(default_factory=dict)
    suites: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, dict[str, float]] = field(default_factory=dict)
    slices: tuple[Row, ...] = ()

    @property
    def gating(self) -> list[Row]:
        return [row for row in self.rows if row.verdict]

    @property
    def failed_slices(self) -> list[Row]:
        return [row for row in self.slices if row.verdict == "FAIL"]


def dump(verdict: Verdict) -> str:
    return json.dumps(asdict(verdict), indent=1, ensure_ascii=False, allow_nan=False)


def read(file: Path) -> Verdict:
    """The verdict that `llmtune gate` wrote into `file`."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    parts = {name: tuple(_row(row) for row in stored.get(name, ())) for name in ("rows", "slices")}
    return Verdict(**stored | parts)


def _row(stored: dict[str, Any]) -> Row:
    floor, of_slice, notes = (stored.get(key) for key in ("floor", "slice", "notes"))
    rebuilt = {"floor": floor and Floor(**floor), "slice": of_slice and tuple(of_slice), "notes": tuple(notes or ())}
    return Row(**stored | rebuilt)


# ---- text


def render_text(verdict: Verdict) -> str:
    """The verdict, a table of its metrics and a sentence on each that gates, at most 110 columns wide."""
    lines, versus = wrap(f"{verdict.verdict}: {verdict.summary}", 110), ""
    for row in verdict.rows:
        if row.versus != versus:
            versus = row.versus
            lines += ["", f"{f'against {versus}':<30.30} items    base   tuned   delta  90 % interval       rule"]
        lines += [_line(row), *([_floor_line(row, row.floor)] if row.floor else [])]
    lines.append("")
    for name, sentence in said(verdict):
        lines += wrap(f"{name}: {sentence}.", 110, subsequent_indent="  ")
    return "\n".join(lines)


def _line(row: Row) -> str:
    numbers = " ".join(f"{number(x):>7}" for x in (row.base, row.tuned, row.delta))
    interval = f"[{number(row.low)}, {number(row.high)}]"
    return f"{_cut(row.name):<30}{row.n:>6} {numbers}  {interval:<19} {row.asked.partition(',')[0]:<13} {row.result}"


def _floor_line(row: Row, floor: Floor) -> str:
    interval = f"[{number(floor.low)}, {number(floor.high)}]"
    asked = f"{floor.rule} {floor.limit:g}"
    return f"{'  its own mean':<36} {'':7} {number(row.tuned):>7} {'':7}  {interval:<19} {asked:<13} {floor.verdict}"


def _cut(name: str) -> str:
    return name if len(name) <= 29 else name[:28] + "…"


def said(verdict: Verdict) -> list[tuple[str, str]]:
    """(name, sentence) of everything there is to say in words: reasons, notes, slices, what was set for this run."""
    lines = []
    for row in verdict.gating:
        lines.append((row.name, "; ".join(filter(None, (row.reason, row.floor_effect, *row.notes)))))
        if counted := slices_said(verdict, row):
            lines.append((row.name, counted))
    lines += [(row.name, row.reason) for row in verdict.failed_slices]
    return lines + _beaten(verdict) + _overridden(verdict)


def _beaten(verdict: Verdict) -> list[tuple[str, str]]:
    """What examples in the prompt do better than the tune, beyond the 90 % interval."""
    against = [row for row in verdict.rows if row.versus != verdict.arms["base"]]
    better = [row for row in against if ((row.high or 0) < 0 if row.higher_is_better else (row.low or 0) > 0)]
    return [
        (row.name, f"{row.versus} does better than the tune, beyond the 90 % interval; that decides nothing")
        for row in better
    ]


def _overridden(verdict: Verdict) -> list[tuple[str, str]]:
    return [
        (name, f"{change['to']:g} was set for this run, where the suite has {change['from']:g}")
        for name, change in verdict.overrides.items()
    ]


def slices_said(verdict: Verdict, row: Row) -> str:
    """The verdicts on the slices of a metric, counted; none are left out."""
    own = [part for part in verdict.slices if (part.suite, part.metric) == (row.suite, row.metric)]
    counts = {
        word: sum(part.verdict == word for part in own) for word in ("PASS", "INCONCLUSIVE", "FAIL", INSUFFICIENT)
    }
    told = ", ".join(
        f"{count} {word.lower() if word == INSUFFICIENT else word}" for word, count in counts.items() if count
    )
    return f"{len(own)} slices: {told}" if own else ""


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


# ---- Markdown


def render_markdown(verdict: Verdict) -> str:
    """For a pull request: the verdict, one table of what gates and of the slices that fail, and the rest folded away."""
    subject = verdict.subject
    judged = f"Judged: {subject['kind']} `{subject['sha256'][:12]}`, against {_plain(str(verdict.arms['base']))}."
    lines = [f"## llmtune gate: {verdict.verdict}", "", _plain(verdict.summary), ""]
    lines += _table([*verdict.gating, *verdict.failed_slices])
    lines += ["", *([judged] if subject else [])]
    reasons = [f"* **{_plain(name)}**: {_plain(sentence)}." for name, sentence in said(verdict)]
    lines += _folded("Why", reasons)
    if verdict.slices:
        lines += _folded(f"Slices ({len(verdict.slices)})", _table(verdict.slices))
    if reported := [row for row in verdict.rows if not row.verdict]:
        lines += _folded(f"Reported, decides nothing ({len(reported)})", _table(reported))
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[Row]) -> list[str]:
    lines = ["| metric | against | items | base | tuned | change, 90 % interval | asked | verdict |"]
    lines.append("|---|---|--:|--:|--:|--:|---|---|")
    for row in rows:
        change = f"{number(row.delta)} [{number(row.low)}, {number(row.high)}]"
        cells = [row.name, row.versus, row.n, number(row.base), number(row.tuned), change, row.asked, row.result]
        lines.append(f"| {' | '.join(_plain(str(cell)) for cell in cells)} |")
    return lines


def _folded(title: str, lines: list[str]) -> list[str]:
    return ["", f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def _plain(text: str) -> str:
    """Words that cannot break out of their cell or become markup, whatever a suite or a slice is called."""
    return re.sub(r"([\\`*_\[\]<>|~&#@])", r"\\\1", " ".join(text.split()))


# ---- JUnit


def render_junit(verdict: Verdict) -> str:
    """For a CI: a testcase each gating metric and each slice that fails.

    FAIL is a failure. INCONCLUSIVE is an error and not "skipped", which most CIs show in green: what could not be decided
    must not pass for decided.
    """
    root = ET.Element("testsuites", name="llmtune gate")
    for suite in dict.fromkeys(row.suite for row in verdict.gating):
        rows = [row for row in (*verdict.gating, *verdict.failed_slices) if row.suite == suite]
        counts = {tag: sum(row.verdict == word for row in rows) for word, tag in JUNIT.items()}
        attributes = {"name": suite, "tests": len(rows), "failures": counts["failure"], "errors": counts["error"]}
        group = ET.SubElement(root, "testsuite", {k: _valid(str(v)) for k, v in attributes.items()})
        facts = {"verdict": verdict.verdict, "summary": verdict.summary, "subject": verdict.subject.get("sha256", "")}
        facts |= {f"override: {name}": text for name, text in _overridden(verdict) if name.startswith(f"{suite}.")}
        properties = ET.SubElement(group, "properties")
        for name, value in facts.items():
            ET.SubElement(properties, "property", name=_valid(name), value=_valid(value))
        for row in rows:
            name = row.name.removeprefix(f"{suite}.")
            case = ET.SubElement(group, "testcase", classname=_valid(suite), name=_valid(name), time="0")
            if tag := JUNIT.get(row.verdict or ""):
                ET.SubElement(case, tag, type=str(row.verdict), message=_valid(row.reason))
            line = _line(row) + (f"\n{_floor_line(row, row.floor)}" if row.floor else "")
            overridden = [text for key, text in _overridden(verdict) if key == f"{row.suite}.{row.metric}"]
            ET.SubElement(case, "system-out").text = _valid("\n".join([line, *row.notes, *overridden]))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _valid(text: str) -> str:
    """Without the characters that XML 1.0 has no way to write."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
