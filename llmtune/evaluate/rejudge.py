"""Judge stored answers again with another judge: no model is needed but the judge's own, and the old scores stay as they are."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from llmtune import artifact, scores
from llmtune.artifact import Artifact
from llmtune.config.eval import SuiteConfig
from llmtune.config.judges import JudgeConfig
from llmtune.config.metrics import METRICS
from llmtune.errors import ArtifactError, ConfigError
from llmtune.evaluate import judges, observations, scoring
from llmtune.scores import Score

ITEMS, SHIFT = "items.jsonl", "shift.json"
OWN = {"schema", "kind", "created", "parents", "versions", "hardware", "git_commit", "files"}
"""What an artifact's manifest says of its own making."""


@dataclass(frozen=True)
class Change:
    """What became of one arm's answers to one suite. outcomes: "old > new" -> answers. rates: metric -> mean before and after, over
    the answers with a value."""

    suite: str
    arm: str
    answers: int
    changed: int
    outcomes: dict[str, int]
    rates: dict[str, tuple[float | None, float | None]]


def again(folder: Path, judge: JudgeConfig, output: Path, place: Path | str) -> tuple[Artifact, list[Change]]:
    """New scores at `output`, whose parent are the ones in `folder`: every judged metric by `judge`, everything else as it was.

    Raises ArtifactError for a folder without answers that were judged, ConfigError for a judge that cannot judge them.
    """
    old = artifact.read(folder, "scores")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            "--output", f"{output} lies in the scores themselves, which stay as they are; name another folder"
        )
    before = scores.read(folder / scores.FILE)
    if not any(record.outcome for record in before):
        raise ArtifactError(f"{folder}: no answer in it was judged, so there is nothing to judge again")
    try:
        seen, items = observations.read(folder / observations.FILE), scoring.read_items(folder / ITEMS)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{error.filename}: is missing, and answers are judged again from it; evaluate anew"
        ) from None
    suites = {name: _suite(facts) for name, facts in old.manifest["suites"].items()}
    for name, (suite, _) in suites.items():
        if any(METRICS[metric].judged == "outcome" for metric in suite.metrics) and (
            lack := judge.lacks(suite.metrics)
        ):
            raise ConfigError(place, f"suite '{name}': {lack}")
    judges.load(judge, place)  # what can be known before judging
    who = {record.arm: record.artifact_sha256 for record in before}
    who[scoring.AGAIN] = who[old.manifest["arms"]["base"]]
    records, spoken = scoring.score(seen, items, suites, who, judge, place)
    noise = scoring.noise_floor(records) if old.manifest.get("noise_floor") is not None else None
    records = [*_as_they_were(records, before), *(one for one in before if _by_pair(one.metric))]
    facts = {key: value for key, value in old.manifest.items() if key not in OWN}
    facts |= {"judges": spoken, "noise_floor": noise, "judged_before": old.manifest["judges"]}
    facts["config"] = facts["config"] | {"judge": _told(judge)}
    facts["suites"] = {n: {k: v for k, v in s.items() if k != "judge"} for n, s in facts["suites"].items()}
    with artifact.writing(output, "scores", [old]) as draft:
        for name in old.manifest["files"].keys() - {scores.FILE, *_stale(folder)}:
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, draft.path / name)
        (draft.path / scores.FILE).write_text(scores.dump(records), encoding="utf-8")
        draft.facts.update(facts)
    return artifact.read(output), _changes(before, records)


def _suite(facts: dict[str, Any]) -> tuple[SuiteConfig, str]:
    """The suite as it was, but that the one judge judges it, whoever it named itself."""
    own = {key: value for key, value in facts.items() if key not in ("sha256", "judge")}
    return SuiteConfig.model_construct(**own), str(
        facts["sha256"]
    )  # checked when it was a file; the manifest is hashed


def _told(judge: JudgeConfig) -> dict[str, Any]:
    return judge.model_dump(mode="json", exclude_unset=True)


def _stale(folder: Path) -> set[str]:
    """What was worked out from the old outcomes."""
    if not (folder / SHIFT).is_file():
        return set()
    found = json.loads((folder / SHIFT).read_text(encoding="utf-8"))
    judged = {name for name, metric in METRICS.items() if metric.judged == "outcome"}
    return {SHIFT} if any((one.get("harm") or {}).get("metric") in judged for one in found.values()) else set()


def _by_pair(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].judged == "pair"


def _as_they_were(records: list[Score], before: list[Score]) -> list[Score]:
    """Without the arm of the noise floor, and with what was decided about an item later than it was observed."""
    excluded = {(one.suite, one.item_id): one.excluded for one in before}
    kept = [one for one in records if one.arm != scoring.AGAIN]
    return [replace(one, excluded=excluded.get((one.suite, one.item_id))) for one in kept]


def _changes(before: list[Score], after: list[Score]) -> list[Change]:
    old, new = _judged(before), _judged(after)
    changes = []
    for suite, arm in dict.fromkeys((suite, arm) for suite, arm, _, _ in new):
        outcomes: dict[str, tuple[str, str]] = {}
        values: dict[str, tuple[list[float | None], list[float | None]]] = {}
        for key, record in new.items():
            if key[:2] == (suite, arm) and key in old:
                outcomes[record.item_id] = str(old[key].outcome), str(record.outcome)
                both = values.setdefault(record.metric, ([], []))
                both[0].append(old[key].value)
                both[1].append(record.value)
        counted = Counter(f"{was} > {now}" for was, now in outcomes.values())
        changed = sum(was != now for was, now in outcomes.values())
        rates = {metric: (_mean(was), _mean(now)) for metric, (was, now) in values.items()}
        changes.append(Change(suite, arm, len(outcomes), changed, dict(sorted(counted.items())), rates))
    return changes


def _judged(records: list[Score]) -> dict[tuple[str, str, str, str], Score]:
    return {(one.suite, one.arm, one.metric, one.item_id): one for one in records if one.outcome}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def as_json(made: Artifact, changes: list[Change]) -> dict[str, Any]:
    return {
        "scores": str(made.path),
        "judges": _names(made.manifest["judges"]),
        "judged_before": _names(made.manifest["judged_before"]),
        "answers": sum(one.answers for one in changes),
        "changed": sum(one.changed for one in changes),
        "unscored": sum(n for one in changes for pair, n in one.outcomes.items() if pair.endswith("> unscored")),
        "changes": [asdict(one) for one in changes],
    }


def _names(spoken: dict[str, Any]) -> str:
    return ", ".join(f"{name} {facts['version']}" for name, facts in spoken.items())


def render(made: Artifact, changes: list[Change]) -> str:
    """How many outcomes are others now and which way, a table of old against new, and the rates by both judges."""
    answers, changed = sum(one.answers for one in changes), sum(one.changed for one in changes)
    total: Counter[str] = Counter()
    for one in changes:
        total.update(one.outcomes)
    ways = [f"{pair.replace('>', 'to')}: {n}" for pair, n in total.most_common() if len(set(pair.split(" > "))) > 1]
    judged = _names(made.manifest["judges"]), _names(made.manifest["judged_before"])
    lines = [
        f"{changed} of {answers} answers are judged otherwise by {judged[0]} than by {judged[1]}",
        *wrap("; ".join(ways), 110),
        "",
    ]
    names = [name for name in judges.OUTCOMES if any(name in pair.split(" > ") for pair in total)]
    lines.append(f"{'old, down; new, across':<24}" + "".join(f"{name:>12}" for name in names))
    lines += [f"{was:<24}" + "".join(f"{total[f'{was} > {now}']:>12}" for now in names) for was in names]
    lines += ["", f"{'':<36}{'old judge':>12}{'new judge':>12}"]
    for one in changes:
        for metric, rates in one.rates.items():
            cells = "".join(f"{'-' if rate is None else f'{rate:.3f}':>12}" for rate in rates)
            lines.append(f"{f'{one.suite}.{metric}, {one.arm}':<36}{cells}")
    return "\n".join(lines)
