"""Item by item: the answers of all arms side by side, what flipped between base and tuned, and what people said of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.config.metrics import METRICS
from llmtune.report.wording import GROUPS, OUTCOMES, UNITS, Rows, name
from llmtune.scores import Score, why_excluded

MOST = 1500
"""Items on one page, shared evenly by its suites; flipped ones first."""
MOST_OF_SUITE = 300
LONGEST, LETTERS = 6_000, 6_000_000
"""Characters of a text on the page, and of all of them together; the whole ones stand in scores.jsonl."""
GRADED = {metric for metric in METRICS if UNITS.get(metric, (1,))[0] == 1} | {"repetition", "preferred"}
WAYS = ("worse", "better", "same", "none")
OF_HARM = ("complied", "harmful")
OF_OUTCOME = ("complied", "refused")
Item = dict[str, Any]


def lines(file: Path) -> Rows:
    """The objects of a JSONL file, none where there is no such file."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]


def collect(
    records: Sequence[Score], known: Rows, arms: Mapping[str, str], about: Mapping[str, Any], audited: Rows
) -> list[Item]:
    """Every item with its arms' answers and marks, its flips, and the human verdicts on them.

    known: `items.jsonl`; an item that is only in the records (of an old evaluation) is made from them. about: suite -> its
    settings. Texts are hidden where the item or the suite says so, and wherever compliance with a request is what is measured.
    """
    found = {(item["suite"], item["item_id"]): {**item, "answers": {}} for item in known}
    for score in records:
        item = found.setdefault(
            (score.suite, score.item_id), {"suite": score.suite, "item_id": score.item_id, "answers": {}}
        )
        item["slices"] = item.get("slices") or score.slices
        item["excluded"] = item.get("excluded") or score.excluded
        hidden = (about.get(score.suite) or {}).get("hidden") or score.metric in OF_HARM
        item["hidden"] = bool(item.get("hidden") or hidden)
        answer = item["answers"].setdefault(score.arm, {"text": None, "outcome": None, "marks": []})
        answer["text"] = score.response if answer["text"] is None else answer["text"]
        answer["outcome"] = answer["outcome"] or score.outcome
        answer["marks"].append((score.metric, score.value))
    for flip in flips(records, arms):
        found[flip["suite"], flip["item_id"]].setdefault("flips", []).append(flip)
    for said in audited:
        if (said["suite"], said["item_id"]) in found:
            found[said["suite"], said["item_id"]].setdefault("audited", []).append(said)
    return list(found.values())


def add_picks(found: Iterable[Item], observed: Iterable[Mapping[str, Any]]) -> None:
    """Which choice each arm finds likeliest, where an item has choices. observed: `observations.jsonl`."""
    asked = {(item["suite"], item["item_id"]): item for item in found if item.get("choices")}
    for one in observed:
        item, logprobs = asked.get((one["suite"], one["item_id"])), one.get("logprobs")
        if item and one["probe"] == "choices" and logprobs and one["arm"] in item["answers"]:
            likeliest = max(range(len(logprobs)), key=lambda i: logprobs[i])
            item["answers"][one["arm"]]["pick"] = item["choices"][likeliest]


def binary(records: Iterable[Score]) -> list[tuple[str, str]]:
    """The metrics, by suite, whose values are 0, 1 or missing."""
    values: dict[tuple[str, str], set[float | None]] = {}
    for score in records:
        values.setdefault((score.suite, score.metric), set()).add(score.value)
    return [key for key, seen in values.items() if key[1] not in GRADED and seen <= {0, 1, None}]


def flips(records: Sequence[Score], arms: Mapping[str, str]) -> Rows:
    """Whatever differs between base and tuned in a 0/1 metric: in value, or in what the judge saw.

    A missing value is the worst one of the tuned arm and the best one of the base, as the gate counts it before it lets a model PASS.
    """
    pairs: dict[tuple[str, str, str], dict[str, Score]] = {}
    kinds = set(binary(records))
    for score in records:
        if (score.suite, score.metric) in kinds:
            pairs.setdefault((score.suite, score.metric, score.item_id), {})[score.arm] = score
    made = []
    for (suite, metric, item_id), by_arm in pairs.items():
        base, tuned = (by_arm.get(arms.get(role, "")) for role in ("base", "tuned"))
        if base and tuned and (base.value != tuned.value or (metric in OF_OUTCOME and base.outcome != tuned.outcome)):
            good = int(base.higher_is_better)
            before, after = (
                (good if base.value is None else base.value),
                (1 - good if tuned.value is None else tuned.value),
            )
            way = "same" if before == after else "better" if after == good else "worse"
            made.append({"suite": suite, "metric": metric, "item_id": item_id, "name": name(metric), "way": way,
                         "before": _said(base), "after": _said(tuned)})  # fmt: skip
    return made


def _said(score: Score) -> str:
    if score.outcome and score.metric in OF_OUTCOME:
        return score.outcome
    if score.value is None:
        return "not scored"
    right = score.metric.startswith(("acc", "exact_match"))
    return ("right" if score.value else "wrong") if right else ("yes" if score.value else "no")


def counted(
    records: Sequence[Score], found: Iterable[Item], arms: Mapping[str, str], groups: Mapping[str, str]
) -> Rows:
    """A row a 0/1 metric: how many items count in it, and how many of them flipped which way."""
    counts: dict[tuple[str, str], Counter[str]] = {key: Counter() for key in binary(records)}
    for score in records:
        if (score.suite, score.metric) in counts and score.arm == arms.get("tuned") and not score.excluded:
            counts[score.suite, score.metric]["n"] += 1
    for item in found:
        for flip in () if item.get("excluded") else item.get("flips", ()):
            counts[flip["suite"], flip["metric"]][flip["way"]] += 1
    rows = [
        {"suite": suite, "metric": metric, "name": name(metric)} | {key: ways[key] for key in ("n", *WAYS)}
        for (suite, metric), ways in counts.items()
        if ways["n"]
    ]
    return sorted(rows, key=lambda row: GROUPS.index(groups[row["suite"]]))


def shown(found: Iterable[Item], groups: Mapping[str, str], about: Mapping[str, Any]) -> Rows:
    """Suite by suite the items for the page: those that flipped for the worse first, and how many are left out."""
    suites: dict[str, list[Item]] = {}
    for item in found:
        if item["answers"]:
            suites.setdefault(item["suite"], []).append(item)
    made, room, share = [], MOST, {}
    for left, suite in zip(
        range(len(suites), 0, -1), sorted(suites, key=lambda suite: len(suites[suite])), strict=True
    ):
        share[suite] = min(MOST_OF_SUITE, max(20, room // left))
        room -= min(share[suite], len(suites[suite]))
    for suite in sorted(suites, key=lambda suite: GROUPS.index(groups[suite])):
        items = suites[suite]
        for item in items:
            item["flips_by"] = {flip["metric"]: flip["way"] for flip in item.get("flips", ())}
            item["tags"] = [f"{field}: {value}" for field, value in (item.get("slices") or {}).items()]
        kept = sorted(items, key=lambda item: WAYS.index(_way(item)))[: share[suite]]
        made.append({
            "name": suite, "group": groups[suite], "description": (about.get(suite) or {}).get("description"),
            "n": len(items), "shown": len(kept), "flipped": sum(_way(item) != "none" for item in items),
            "hidden": any(item.get("hidden") for item in items),
            "ways": {way: own for way in WAYS if (own := [item for item in kept if _way(item) == way])},
        })  # fmt: skip
    return made


def longest(suites: Rows) -> int:
    """How many characters of each text the page has room for."""
    texts = sum(1 + len(item["answers"]) for suite in suites for own in suite["ways"].values() for item in own)
    return min(LONGEST, max(500, LETTERS // max(1, texts)))


def tags(found: Iterable[Item]) -> list[str]:
    """The slices that may be chosen, `field: value`, in order."""
    return sorted({tag for item in found for tag in item.get("tags", ())})


def _way(item: Item) -> str:
    """The worst that happened to it."""
    return min((flip["way"] for flip in item.get("flips", ())), key=WAYS.index, default="none")


def examples(found: Sequence[Item], groups: Mapping[str, str], most: int = 5) -> dict[str, Any] | None:
    """The first items of the first suite that was answered in words and may be shown openly, in the order of the file."""
    worded = [
        item
        for item in found
        if not item.get("hidden") and any(a["text"] is not None for a in item["answers"].values())
    ]
    suites = sorted({item["suite"] for item in worded}, key=lambda suite: GROUPS.index(groups[suite]))
    own = [item for item in worded if item["suite"] == suites[0]] if suites else []
    return {"name": suites[0], "n": len(own), "items": own[:most]} if own else None


def excluded(found: Iterable[Item]) -> Rows:
    """Items that decide nothing, by suite and reason."""
    counts = Counter((i["suite"], why_excluded(i["excluded"])) for i in found if i.get("excluded"))
    return [{"suite": suite, "reason": reason, "n": n} for (suite, reason), n in counts.items()]


def outcomes(found: Iterable[Item], arms: Mapping[str, str]) -> Rows:
    """What the judge saw: suite and arm -> how many answers of each outcome, excluded items aside."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for item in found:
        for arm, answer in item["answers"].items():
            if answer["outcome"] and not item.get("excluded"):
                counts.setdefault((item["suite"], arm), Counter())[answer["outcome"]] += 1
    order = list(arms.values())
    keys = sorted(
        counts, key=lambda key: (list(dict.fromkeys(k[0] for k in counts)).index(key[0]), order.index(key[1]))
    )
    return [{"suite": suite, "arm": arm, "n": counts[suite, arm].total(), **{word: counts[suite, arm][word] for word in OUTCOMES}}
            for suite, arm in keys]  # fmt: skip


def answering(records: Iterable[Score], arms: Mapping[str, str]) -> Rows:
    """How each arm answers, suite by suite: mean length, how many end by themselves, and how much of it is said again."""
    seen: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for score in records:
        of_answer = score.metric in METRICS and METRICS[score.metric].probe == "answer"
        kept = seen.setdefault((score.suite, score.arm), {}) if of_answer and not score.excluded else {}
        if score.tokens is not None:
            kept.setdefault("tokens", {})[score.item_id] = score.tokens
        if score.response is not None:
            kept.setdefault("empty", {})[score.item_id] = float(not score.response.strip())
        if score.metric in ("stops", "repetition", "incoherent") and score.value is not None:
            kept.setdefault(score.metric, {})[score.item_id] = score.value
    order = list(arms.values())
    rows = [
        {"suite": suite, "arm": arm, "n": max(map(len, kept.values()))}
        | {key: sum(values.values()) / len(values) for key, values in kept.items()}
        for (suite, arm), kept in seen.items()
        if kept
    ]
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    return sorted(rows, key=lambda row: (suites.index(row["suite"]), order.index(row["arm"])))
