"""People's verdicts on judged answers: which answers are worth a look, a file that loses none, and what follows from them.

Looked at are the items whose outcome flipped between base and tuned; to learn how often the judge is wrong, also some or all of
those that did not flip, since among flips a judge's errors are more frequent than elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtune import artifact, paired, scores, stats
from llmtune.config.metrics import AGAINST, counts
from llmtune.errors import ArtifactError
from llmtune.scores import Score

FILE, ITEMS = "audit.jsonl", "items.jsonl"
VERDICTS = ("refused", "partial", "complied", "incoherent")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Pair:
    """One item's answers and what the judge made of them, by arm: base, then tuned.

    hidden: shown when asked for, as whatever answers a request that should be refused.
    """

    suite: str
    metric: str
    item_id: str
    prompt: str
    prefill: str
    hidden: bool
    texts: dict[str, str]
    outcomes: dict[str, str]

    @property
    def flipped(self) -> bool:
        return len(set(self.outcomes.values())) > 1

    @property
    def order(self) -> str:
        """By which pairs are walked and drawn: as if at random, the same every time."""
        return hashlib.sha256(json.dumps([self.suite, self.item_id]).encode()).hexdigest()

    @property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """Each different answer with the arms that gave it, in no order by which the arms could be told."""
        arms = list(self.texts)[:: 1 if int(self.order[-1], 16) % 2 else -1]
        said = dict.fromkeys(self.texts[arm] for arm in arms)
        return {text: tuple(arm for arm in arms if self.texts[arm] == text) for text in said}


@dataclass(frozen=True)
class Question:
    """One answer to give a verdict on; where both arms said the same, of both."""

    pair: Pair
    text: str
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """The judged items of a scores artifact, those left out of the verdict aside."""

    sha256: str
    pairs: list[Pair]
    records: list[Score]
    base: str
    tuned: str

    def questions(self, sample: int | None = 0) -> list[Question]:
        """Of every flipped pair and of `sample` others (None: all), mixed, so that nobody can tell which is which."""
        still = sorted((pair for pair in self.pairs if not pair.flipped), key=lambda pair: pair.order)
        chosen = sorted([*(pair for pair in self.pairs if pair.flipped), *still[:sample]], key=lambda pair: pair.order)
        return [Question(pair, text, arms) for pair in chosen for text, arms in pair.answers.items()]


def load(folder: Path) -> Audit:
    """The scores in `folder`. Raises ArtifactError where no answer in them was judged."""
    made = artifact.read(folder, "scores")
    try:
        lines = (folder / ITEMS).read_text(encoding="utf-8").splitlines()
        base, tuned = (str(made.manifest["arms"][role]) for role in ("base", "tuned"))
    except (FileNotFoundError, KeyError):
        raise ArtifactError(f"{folder}: holds no items to show beside the answers; evaluate anew") from None
    items = {(one["suite"], one["item_id"]): one for one in map(json.loads, lines)}
    records = scores.read(folder / scores.FILE)
    found: dict[tuple[str, str, str], dict[str, Score]] = {}
    asked: dict[str, str] = {}  # an outcome is one, whichever metrics of its suite are made of it
    for record in records:
        judged = record.outcome and record.arm in (base, tuned) and record.excluded is None and record.metric in AGAINST
        if judged and asked.setdefault(record.suite, record.metric) == record.metric:
            found.setdefault((record.suite, record.metric, record.item_id), {})[record.arm] = record
    pairs = [
        Pair(
            suite,
            metric,
            item_id,
            items[suite, item_id]["prompt"],
            items[suite, item_id].get("prefill", ""),
            bool(items[suite, item_id].get("hidden")) or metric == "complied",
            {arm: str(both[arm].response or "") for arm in (base, tuned)},
            {arm: str(both[arm].outcome) for arm in (base, tuned)},
        )
        for (suite, metric, item_id), both in found.items()
        if {base, tuned} <= both.keys()
    ]
    if not pairs:
        raise ArtifactError(
            f"{folder}: no answer in it was judged to be refused or complied, so there is nothing to audit"
        )
    return Audit(made.sha256, pairs, records, base, tuned)


class Log:
    """`audit.jsonl`: a line a verdict, on the disk before the next question is asked. Of one answer the last verdict counts.

    mend: what was left unfinished is removed, which whoever only reads must not do.
    """

    def __init__(self, file: Path, sha256: str, *, mend: bool = True) -> None:
        self.file, self.sha256 = file, sha256
        if mend:
            self._mend()
        self.said = [one for one in self._read() if one["scores_sha256"] == sha256]

    def add(self, question: Question, verdict: str, by: str) -> None:
        pair, at = question.pair, datetime.now(UTC).isoformat(timespec="seconds")
        more = [
            {
                "scores_sha256": self.sha256,
                "suite": pair.suite,
                "metric": pair.metric,
                "item_id": pair.item_id,
                "arm": arm,
                "outcome": pair.outcomes[arm],
                "verdict": verdict,
                "by": by,
                "at": at,
            }
            for arm in question.arms
        ]
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(one) + "\n" for one in more))
            stream.flush()
            os.fsync(stream.fileno())
        self.said += more

    def answered(self, pair: Pair, arms: Iterable[str], by: str) -> bool:
        """Whether this person gave a verdict on the answers of these arms."""
        own = {(one["suite"], one["item_id"], one["arm"]) for one in self.said if one["by"] == by}
        return all((pair.suite, pair.item_id, arm) in own for arm in arms)

    def last(self) -> dict[tuple[str, str, str], str]:
        """(suite, item, arm) -> the last verdict on it."""
        return {(one["suite"], one["item_id"], one["arm"]): str(one["verdict"]) for one in self.said}

    def _mend(self) -> None:
        """A line that a power cut left unfinished was no verdict yet; a whole one lacks its end only."""
        text = self.file.read_bytes() if self.file.exists() else b""
        rest = text.rpartition(b"\n")[2]
        if not rest:
            return
        try:
            json.loads(rest)
        except ValueError:
            os.truncate(self.file, len(text) - len(rest))
        else:
            with self.file.open("ab") as stream:
                stream.write(b"\n")

    def _read(self) -> Iterable[dict[str, Any]]:
        if not self.file.exists():
            return
        for number, line in enumerate(self.file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                one = json.loads(line)
                yield {
                    key: one[key] for key in ("scores_sha256", "suite", "item_id", "arm", "outcome", "verdict", "by")
                }
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{self.file}:{number}: is no verdict ({error!r}); mend or remove that line"
                ) from None


def summary(audit: Audit, log: Log) -> dict[str, Any]:
    """What people say of the judge and of the change, from the last verdict on each answer of these scores."""
    last = log.last()
    audited = [pair for pair in audit.pairs if all((pair.suite, pair.item_id, arm) in last for arm in pair.texts)]
    return {
        "scores_sha256": audit.sha256,
        "people": sorted({str(one["by"]) for one in log.said}),
        "flips": sum(pair.flipped for pair in audit.pairs),
        "agreement": {arm: _agreement(audit, arm, last) for arm in (audit.base, audit.tuned)},
        "flips_audited": dict(Counter(_told(pair, last) for pair in audited if pair.flipped)),
        "deltas": [_delta(audit, suite, metric, audited, last) for suite, metric in _measured(audit.pairs)],
        "twice": _twice(log.said),
    }


Last = Mapping[tuple[str, str, str], str]


def _agreement(audit: Audit, arm: str, last: Last) -> dict[str, Any]:
    """Of one arm's answers: how many a person calls as the judge does, by whether the item flipped, and over all of them.

    They agree where the metric comes to the same value, so that a partial refusal that the judge calls refused is a
    disagreement in `complied` and none in `refused`.
    """
    found: dict[str, Any] = {}
    parts, confusion = [], Counter[str]()
    for name, flipped in (("flipped", True), ("not_flipped", False)):
        pairs = [pair for pair in audit.pairs if pair.flipped == flipped]
        seen = [(pair, said) for pair in pairs if (said := last.get((pair.suite, pair.item_id, arm)))]
        same = sum(counts(pair.metric, said) == counts(pair.metric, pair.outcomes[arm]) for pair, said in seen)
        confusion.update(f"{pair.outcomes[arm]} > {said}" for pair, said in seen)
        share = _share(same, len(seen))
        found[name] = {"answers": len(pairs), "audited": len(seen), "agreed": same, **share}
        if pairs:
            if len(seen) == len(pairs):  # then nothing is left to chance
                share = dict.fromkeys(share, share["value"])
            parts.append((len(pairs), share))
    found["all"] = _together(parts)
    found["confusion"] = dict(sorted(confusion.items()))
    return found


Share = dict[str, float | None]


def _share(some: int, n: int) -> Share:
    if not n:
        return {"value": None, "low": None, "high": None}
    low, high = stats.wilson_interval(some, n, CONFIDENCE)
    return {"value": some / n, "low": low, "high": high}


def _together(parts: Sequence[tuple[int, Share]]) -> Share:
    """The share over strata of these sizes; its interval is at least as wide as it has to be. Nothing where one is not known."""
    whole: Share = {}
    for key in ("value", "low", "high"):
        known = [(n, share[key]) for n, share in parts]
        total = sum(n * value for n, value in known if value is not None)
        whole[key] = None if any(value is None for _, value in known) else total / sum(n for n, _ in known)
    return whole


def _told(pair: Pair, last: Last) -> str:
    """confirmed: people see the same change; refuted: they see none; otherwise: another one."""
    judge, people = list(pair.outcomes.values()), [last[pair.suite, pair.item_id, arm] for arm in pair.texts]
    worth = [[counts(pair.metric, outcome) for outcome in both] for both in (judge, people)]
    if worth[0][0] != worth[0][1]:
        judge, people = [str(value) for value in worth[0]], [str(value) for value in worth[1]]
    return "confirmed" if people == judge else "refuted" if people[0] == people[1] else "otherwise"


def _measured(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((pair.suite, pair.metric) for pair in pairs))


def _delta(audit: Audit, suite: str, metric: str, audited: Sequence[Pair], last: Last) -> dict[str, Any]:
    """tuned - base over every item that both arms have a value of, with its 90 % interval: by the judge, and with people's word where they gave it."""
    records = [one for one in audit.records if (one.suite, one.metric) == (suite, metric)]
    known = {
        (pair.item_id, arm) for pair in audited if (pair.suite, pair.metric) == (suite, metric) for arm in pair.texts
    }
    people = [
        replace(one, value=counts(metric, last[suite, one.item_id, one.arm]))
        if (one.item_id, one.arm) in known
        else one
        for one in records
    ]
    found: dict[str, Any] = {"suite": suite, "metric": metric, "audited": len(known) // 2}
    for who, these in (("judge", records), ("people", people)):
        by_arm = paired.table(these)[suite, metric]
        row = paired.measure(
            paired.match(f"{suite}.{metric}", by_arm, audit.base, audit.tuned, same_prompts=True), audit.base, {}
        )
        found |= {"n": row.n, who: {"delta": row.delta, "low": row.low, "high": row.high}}
    return found


def _twice(said: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Answers that more than one person looked at, and on how many of them all say the same."""
    by: dict[tuple[str, str, str], dict[str, str]] = {}
    for one in said:
        by.setdefault((one["suite"], one["item_id"], one["arm"]), {})[one["by"]] = one["verdict"]
    several = [set(verdicts.values()) for verdicts in by.values() if len(verdicts) > 1]
    return {"answers": len(several), "alike": sum(len(verdicts) == 1 for verdicts in several)}


def render(found: Mapping[str, Any]) -> str:
    """The summary in words and two tables."""
    flips = found["flips_audited"]
    told = ", ".join(f"{flips[key]} {key}" for key in ("confirmed", "refuted", "otherwise") if key in flips)
    lines = [
        f"{found['flips']} items flipped; people looked at {sum(flips.values())} of them{': ' if told else ''}{told}"
    ]
    lines += ["", f"{'judge agrees with people':<32}{'answers':>9}{'audited':>9}{'agreed':>9}   share, 95 % interval"]
    for arm, one in found["agreement"].items():
        for key, title in (("flipped", "flipped"), ("not_flipped", "not flipped")):
            part = one[key]
            cells = "".join(f"{part[name]:>9}" for name in ("answers", "audited", "agreed"))
            lines.append(f"{f'{arm}, {title}':<32}{cells}   {_interval(part)}")
        lines.append(f"{f'{arm}, all of them':<32}{'':>27}   {_interval(one['all'])}")
    lines += [
        "",
        f"{'tuned - base, 90 % interval':<32}{'items':>9}{'audited':>9}   by the judge, and by people where they looked",
    ]
    for row in found["deltas"]:
        cells = "   ".join(_change(row[who]) for who in ("judge", "people"))
        lines.append(f"{row['suite'] + '.' + row['metric']:<32}{row['n']:>9}{row['audited']:>9}   {cells}")
    if found["twice"]["answers"]:
        lines += [
            "",
            f"{found['twice']['answers']} answers were seen by several people, who agree on {found['twice']['alike']}",
        ]
    return "\n".join(lines)


def _change(of: Mapping[str, float | None]) -> str:
    if of["delta"] is None:
        return "no item is scored in both arms"
    return f"{of['delta']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]"


def _interval(share: Mapping[str, float | None]) -> str:
    if share["value"] is None:
        return "not known: audit some of them"
    return f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"
