"""Base, base with examples, tuned: the same items, one process or several -> observations -> the score records.

Every record names the sha256 of what answered: what is evaluated is what ships, be it an adapter, a merged folder, a quantised
one, a GGUF file or an endpoint.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune import artifact, ranks, scores
from llmtune.artifact import Artifact
from llmtune.config import Recorded
from llmtune.config.eval import EvalConfig
from llmtune.config.metrics import METRICS
from llmtune.data.chats import load_chats
from llmtune.errors import ArtifactError, ConfigError, LlmtuneError
from llmtune.evaluate import calibration, contamination, cost, judges, measure, observations, scoring, shift, subjects
from llmtune.evaluate.contamination import Trained
from llmtune.evaluate.measure import Arm, Unit
from llmtune.evaluate.observations import Observation, Store
from llmtune.evaluate.scoring import AGAIN
from llmtune.evaluate.subjects import Memory, Subject
from llmtune.evaluate.suites import Item, Suite, load_suites
from llmtune.model import load
from llmtune.progress import say
from llmtune.scores import Score
from llmtune.training import group

ITEMS = "items.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """What is asked of whom: everything that is known before a weight is loaded."""

    settings: EvalConfig
    place: Path | str
    base: Subject
    tuned: Subject
    suites: list[Suite]
    arms: list[Arm]
    trained: Trained
    memory: Memory
    output: Path

    @property
    def parts(self) -> Path:
        return self.output.parent / f".{self.output.name}-parts"

    def plans(self) -> Iterator[tuple[Arm, Suite, list[Unit]]]:
        """What each arm is asked of each suite, and in which batches."""
        for arm in self.arms:
            for suite in self.suites:
                if not (arm.examples and not suite.config.few_shot):
                    yield arm, suite, measure.plan(arm, suite, self.memory)


def run(settings: EvalConfig, place: Path | str = "config") -> Artifact | None:
    """Evaluate the arms on every suite and write the scores.

    An interrupted evaluation goes on with the batch it was at. Raises ConfigError, DataError or ArtifactError before
    weights are loaded, and LlmtuneError when the tuned arm equals the base on every item: the tune had no effect. Of several
    processes each does a share of the batches; the first judges and writes, and None comes back in the others.
    """
    asked = prepare(settings, place)
    plans, encoded = list(asked.plans()), measure.Encoded()
    for arm, suite, units in plans:
        measure.encode(arm, suite, units, asked.memory, encoded)
    for suite in asked.suites:
        what = f"{len(suite.items)} items" if suite.items else f"lm-eval's {', '.join(suite.tasks)}"
        say(f"  suite {suite.name}: {what}; licence: {suite.config.licence}")
    with observations.alone(asked.parts, place):
        group.join(asked.memory.device)
        store = Store(asked.parts)
        group.wait()  # each knows what was done before any of them does more
        for arm, suite, units in plans:
            measure.observe(arm, suite, units, asked.memory, store, encoded)
        group.wait()
        if ranks.rank() > 0:  # judging may take longer than processes wait for each other
            return None
        asked.memory.release()  # a judge may need the room
        store = Store(asked.parts, failed=True)
        return _write(asked, [one for _, _, units in plans for unit in units for one in store[unit.key]])


def prepare(settings: EvalConfig, place: Path | str) -> Evaluation:
    """Everything found and checked. Raises ConfigError, DataError or ArtifactError."""
    view = Recorded(settings)
    assert view.stage == "eval"
    base, tuned = subjects.of_run(Path(view.run), view.tuned) if view.run else _two(view)
    subjects.require_unlike(base, tuned, place)
    output = _output(view, base, tuned)
    if tuned.adapter and tuned.source and base.source and tuned.source.sha256 != base.source.sha256:
        say(f"  note: {tuned.name} was trained on {tuned.source.name}, and is compared with {base.name}")
    suites = load_suites(view.suites, Path(place), view.items)
    _check_judges(view, suites, place)
    arms = _arms(view, suites, base, tuned, place)
    for arm in arms:
        for suite in suites:
            measure.require_able(arm, suite, place)
    trained = contamination.trained_on(tuned.made)
    if view.cost:
        cost.check(view.cost.whole(), {"base": base, "tuned": tuned}, suites, place)
    if view.shift:
        shift.check(view.shift.whole(), trained, place)
    device = load.choose_device(view.device)
    memory = Memory([base, tuned], subjects.dtype_of(base, tuned, view.dtype, device), device)
    view.require_all_read(place)
    return Evaluation(settings, place, base, tuned, suites, arms, trained, memory, output)


def _two(view: Recorded) -> tuple[Subject, Subject]:
    return subjects.find(view.base), subjects.find(view.tuned)


def _output(view: Recorded, base: Subject, tuned: Subject) -> Path:
    """Where the scores go. Nothing but scores is replaced and, where it is not the run that says whose they are, none of others."""
    folder = Path(view.output_dir or view.run)
    output, named = folder / "scores", not view.run or folder.resolve() != Path(view.run).resolve()
    if named:
        artifact.require_no_run(folder, "output_dir")
    if output.exists():
        old = artifact.read(output, "scores").manifest.get("subjects", {})
        if named and {role: who["sha256"] for role, who in old.items()} != {"base": base.sha256, "tuned": tuned.sha256}:
            raise ArtifactError(
                f"{output}: holds the scores of other models; choose another output_dir (--output of compare)"
            )
    return output


def _arms(view: Recorded, suites: list[Suite], base: Subject, tuned: Subject, place: Path | str) -> list[Arm]:
    size = view.batch_size
    again = [Arm(AGAIN, base, size // 2 or 2, again=True)] if view.noise_floor else []
    return [Arm("base", base, size), *again, *_few_shot(view, suites, base, place), Arm("tuned", tuned, size)]


def _few_shot(view: Recorded, suites: list[Suite], base: Subject, place: Path | str) -> list[Arm]:
    """The base with k examples before each prompt, where asked for."""
    if view.few_shot is None:
        return []
    if not any(suite.config.few_shot for suite in suites):
        raise ConfigError(place, "few_shot: none of the suites asks for it (few_shot: true in the suite)")
    few = view.few_shot
    chats = [chat for chat in load_chats(few.examples, training=True) if not chat.row.fields.get("replay")]
    if len(chats) < few.k:
        raise ConfigError(place, f"few_shot.k: {few.k} examples are asked for, and {few.examples} holds {len(chats)}")
    drawn = random.Random(few.seed).sample(chats, few.k)
    turns = [turn for chat in drawn for turn in chat.turns if turn["role"] != "system"]
    return [Arm(f"base + {few.k} examples", base, view.batch_size, turns)]


def _check_judges(view: Recorded, suites: list[Suite], place: Path | str) -> None:
    """Every judge is made once before any weight is loaded, so that one that cannot judge is found in time."""
    ours = [suite for suite in suites if not suite.tasks]
    for suite in ours:
        if any(METRICS[name].judged == "outcome" for name in suite.config.metrics):
            chosen = suite.config.judge or view.judge.whole()
            if lack := chosen.lacks(suite.config.metrics):
                raise ConfigError(place, f"suite '{suite.name}': {lack}")
            judges.load(chosen, place)
    if any("preferred" in suite.config.metrics for suite in ours):
        if view.preference is None:
            raise ConfigError(
                place, "preference: a suite measures 'preferred', which needs a judge of kind endpoint here"
            )
        view.preference.whole()


def _write(asked: Evaluation, seen: list[Observation]) -> Artifact:
    """What all processes observed, judged -> the scores artifact."""
    suites = {suite.name: suite for suite in asked.suites}
    items = {(item.suite, item.item_id): item for suite in asked.suites for item in suite.items}
    for one in seen:
        if one.item is not None and (one.suite, one.item_id) not in items:
            items[one.suite, one.item_id] = Item(one.suite, one.item_id, **one.item)
    items, left_out = contamination.leave_out(items, asked.trained)
    settings, sha256 = asked.settings, {arm.name: arm.subject.sha256 for arm in asked.arms}
    who = {name: (suite.config, suite.sha256) for name, suite in suites.items()}
    records, spoken = scoring.score(seen, items, who, sha256, settings.judge, asked.place, settings.preference)
    noise = scoring.noise_floor(records) if settings.noise_floor else None
    records = [record for record in records if record.arm != AGAIN]
    _assert_effect(records, asked.tuned)
    beside = _beside(asked, seen, items, records)
    parents = [one.made for one in (asked.base, asked.tuned) if one.made]
    few_shot = next((arm.name for arm in asked.arms if arm.examples), None)
    with artifact.writing(asked.output, "scores", parents, replace=True) as draft:
        (draft.path / scores.FILE).write_text(scores.dump(records), encoding="utf-8")
        (draft.path / observations.FILE).write_text("".join(one.line() for one in seen), encoding="utf-8")
        scoring.write_items(items.values(), draft.path / ITEMS)
        for name, found in beside.items():
            (draft.path / name).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        draft.facts.update(
            config=settings.model_dump(mode="json", exclude_none=True),
            subject=asked.tuned.parent(),
            base=asked.base.facts().get("source") or asked.base.facts(),
            subjects={"base": asked.base.facts(), "tuned": asked.tuned.facts()},
            dtype=asked.memory.dtype,
            processes=ranks.world_size(),
            arms={"base": "base", "tuned": "tuned", "few_shot": few_shot},
            suites={
                name: {**suite.config.model_dump(mode="json", exclude_none=True), "sha256": suite.sha256}
                for name, suite in suites.items()
            },
            judges=spoken,
            noise_floor=noise,
            contamination=left_out,
            lm_eval=_tables(seen, asked.suites),
            cost={arm.name: _cost([record for record in records if record.arm == arm.name]) for arm in asked.arms},
        )
    if failed := [one for one in seen if one.error]:
        say(f"  {len(failed)} answers failed ({failed[0].error}); the same command asks for those alone again")
    else:
        shutil.rmtree(asked.parts)
    return artifact.read(asked.output)


def _beside(
    asked: Evaluation, seen: list[Observation], items: dict[tuple[str, str], Item], records: list[Score]
) -> dict[str, dict[str, Any]]:
    """What stands beside the scores and decides nothing, by its file."""
    found = {"calibration.json": calibration.of_observations((one for one in seen if one.arm != AGAIN), items)}
    settings, memory = asked.settings, asked.memory
    if settings.cost:
        both, ours = (
            {"base": asked.base, "tuned": asked.tuned},
            [item for suite in asked.suites for item in suite.items],
        )
        found["cost.json"] = cost.measure(settings.cost, both, ours, memory, settings.batch_size)
    if settings.shift:
        found["shift.json"] = shift.measure(settings.shift, items.values(), records, asked.trained, memory.device)
    return {name: figures for name, figures in found.items() if figures}


def _tables(seen: list[Observation], suites: list[Suite]) -> dict[str, Any] | None:
    """lm-eval's own rows, where a suite has tasks of it; without one it is not imported."""
    if not any(suite.tasks for suite in suites):
        return None
    from llmtune.evaluate import capability

    return capability.tables(seen, suites)


def _cost(records: list[Score]) -> dict[str, float | None]:
    answers = {(record.suite, record.item_id): record for record in records if record.latency_s is not None}.values()
    seconds = sum(record.latency_s or 0.0 for record in answers)
    tokens = sum(record.tokens or 0 for record in answers)
    return {
        "latency_s": round(seconds / len(answers), 3) if answers else None,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
    }


def _assert_effect(records: list[Score], tuned: Subject) -> None:
    """Raises LlmtuneError when an adapter changes nothing; of two models that agree, which may be, it is said."""
    both: dict[tuple[str, str, str], dict[str, tuple[float | None, str | None]]] = {}
    for record in records:
        if record.value is not None or record.response is not None:
            key = record.suite, record.metric, record.item_id
            both.setdefault(key, {})[record.arm] = (record.value, record.response)
    if both and all(found.get("base") == found.get("tuned") for found in both.values()):
        told = f"base and tuned agree on all {len(both)} measurements to the last digit"
        if tuned.adapter:
            raise LlmtuneError(f"{told}: the adapter had no effect")
        say(f"  note: {told}: on these items they are one model")
