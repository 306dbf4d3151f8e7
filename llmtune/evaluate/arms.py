"""Base, base with examples, tuned: the same items, one process, one model in memory -> the score records.

Every record names the sha256 of the artifact it judged; `llmtune merge` proves that the merged model equals it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune import artifact, config, scores
from llmtune.artifact import Artifact
from llmtune.config import Recorded
from llmtune.config.data import ColumnMap
from llmtune.config.eval import EvalConfig, SuiteConfig
from llmtune.config.metrics import METRICS
from llmtune.data.chats import Chat, load_chats
from llmtune.data.tokens import encode_answer, encode_prompt
from llmtune.errors import ConfigError, DataError, LlmtuneError
from llmtune.evaluate.judges.pattern import RefusalPattern
from llmtune.evaluate.metrics import measure
from llmtune.model import adapters, infer, load
from llmtune.progress import Progress, say
from llmtune.scores import Score

SEED = 0
ITEM_COLUMNS = ColumnMap(user=["prompt"], assistant="answer")


@dataclass(frozen=True)
class Arm:
    """A way to answer: the adapter on or off, and example turns before the prompt."""

    name: str
    tuned: bool
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Suite:
    """A suite with its items read: our own chats, or lm-eval's tasks."""

    config: SuiteConfig
    sha256: str
    chats: list[Chat]
    tasks: dict[str, Any]

    def item_id(self, chat: Chat) -> str:
        return str(chat.row.fields.get("id") or chat.row.place)


@dataclass(frozen=True)
class Subject:
    """What is in memory: one model for both arms where the tune is an adapter, two where it is a whole model."""

    tokenizer: Any
    tuned: Any
    base: Any
    tuned_sha256: str
    base_sha256: str

    @contextlib.contextmanager
    def active(self, arm: Arm) -> Iterator[Any]:
        """The model that answers for `arm`."""
        if arm.tuned or self.base is not None:
            yield self.tuned if arm.tuned else self.base
        else:
            with self.tuned.disable_adapter():
                yield self.tuned


def run(settings: EvalConfig, place: Path | str = "config") -> Artifact:
    """Evaluate the run's arms on every suite and write `<run>/scores`.

    An interrupted evaluation goes on with the suite and arm it was at. Raises ConfigError, DataError or ArtifactError before
    weights are loaded, and LlmtuneError when the tuned arm equals the base on every item: the adapter had no effect.
    """
    view = Recorded(settings)
    assert view.stage == "eval"
    folder = Path(view.run)
    tuned = artifact.finished_run(folder)
    if tuned.kind == "adapter" and tuned.manifest["config"]["adapter"]["method"] == "lily":
        why = "lily mixes its experts by the mean over a batch, so that a score would depend on the items beside it"
        raise ConfigError(place, f"run: {why}; tune with another method to compare it with its base")
    suites = [load_suite(name, Path(place)) for name in view.suites]
    if twice := [name for name, number in Counter(suite.config.suite for suite in suites).items() if number > 1]:
        raise ConfigError(place, f"suites: '{twice[0]}' stands twice")
    arms = [Arm("base", tuned=False), *_few_shot(view, suites, place), Arm("tuned", tuned=True)]
    base = load.find_again(tuned.manifest["base"])
    adapters.require_base(tuned, base)
    dtype = tuned.manifest["base"]["dtype"] if view.dtype == "auto" else view.dtype
    settings_of_run = [dtype, view.device, view.batch_size, RefusalPattern.version, artifact.versions()]
    view.require_all_read(place)
    subject = _load(base, tuned, dtype, view.device)
    parts, key = (
        folder / ".scores-parts",
        json.dumps([tuned.sha256, *settings_of_run]),
    )
    records, cost = [], {}
    for arm in arms:
        for suite in suites:
            if arm.examples and not suite.config.few_shot:
                continue
            part = parts / f"{_hash([key, suite.sha256, arm.name, arm.examples])}.jsonl"
            if not part.exists():
                parts.mkdir(exist_ok=True)
                artifact.write_atomically(part, scores.dump(_measure(subject, arm, suite, view.batch_size)))
            records += scores.read(part)
        cost[arm.name] = _cost([record for record in records if record.arm == arm.name])
    _assert_effect(records)
    with artifact.writing(folder / "scores", "scores", [tuned], replace=True) as draft:
        (draft.path / scores.FILE).write_text(scores.dump(records), encoding="utf-8")
        items = [_item(suite, chat) for suite in suites for chat in suite.chats]
        (draft.path / "items.jsonl").write_text(
            "".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8"
        )
        draft.facts.update(
            config=settings.model_dump(mode="json", exclude_none=True),
            subject=tuned.parent(),
            base=base.facts(),
            arms={"base": "base", "tuned": "tuned", "few_shot": next((arm.name for arm in arms if arm.examples), None)},
            suites={
                suite.config.suite: {**suite.config.model_dump(mode="json", exclude_none=True), "sha256": suite.sha256}
                for suite in suites
            },
            cost=cost,
        )
    shutil.rmtree(parts)
    return artifact.read(folder / "scores")


def load_suite(name: str, place: Path) -> Suite:
    """A shipped suite by its name, or one of your own by its path. Raises ConfigError or DataError naming the place."""
    own = name.endswith(".yaml") or "/" in name
    file = (Path(place).resolve().parent / name) if own else config.shipped("evals", f"suites/{name}.yaml")
    raw = config.read_yaml(file)
    suite = config.validate(SuiteConfig, raw, file)
    if suite.lm_eval:
        from llmtune.evaluate import capability

        tasks = capability.load_tasks(suite.lm_eval, file)
        return Suite(
            suite, _hash([raw, {name: [str(doc) for doc in task.eval_docs] for name, task in tasks.items()}]), [], tasks
        )
    needs_answer = bool({"loss", "rouge_l", "exact_match"} & set(suite.metrics))
    chats = list(
        load_chats(str(suite.items), "auto", suite.columns or ITEM_COLUMNS, training=False, answers=needs_answer)
    )
    made = Suite(suite, _hash([raw, [chat.turns for chat in chats]]), chats, {})
    ids = [made.item_id(chat) for chat in chats]
    if len(set(ids)) < len(ids):
        raise DataError(suite.items or "items", f"the id {next(i for i in ids if ids.count(i) > 1)!r} stands twice")
    return made


def _few_shot(view: Recorded, suites: list[Suite], place: Path | str) -> list[Arm]:
    """The base with k examples before each prompt, where asked for."""
    wanted = [suite for suite in suites if suite.config.few_shot]
    if view.few_shot is None:
        return []
    if not wanted:
        raise ConfigError(place, "few_shot: none of the suites asks for it (few_shot: true in the suite)")
    few = view.few_shot
    chats = [chat for chat in load_chats(few.examples, training=True) if not chat.row.fields.get("replay")]
    if len(chats) < few.k:
        raise ConfigError(place, f"few_shot.k: {few.k} examples are asked for, and {few.examples} holds {len(chats)}")
    drawn = random.Random(few.seed).sample(chats, few.k)
    return [
        Arm(
            f"base + {few.k} examples",
            tuned=False,
            examples=[turn for chat in drawn for turn in chat.turns if turn["role"] != "system"],
        )
    ]


def _load(base: load.Source, tuned: Artifact, dtype: str, device: str) -> Subject:
    tokenizer = load.load_tokenizer(base)
    if tuned.kind == "adapter":
        model = adapters.attach(load.load_model(base, dtype, device), base, tuned)
        return Subject(tokenizer, model, None, tuned.sha256, base.sha256)
    return Subject(
        tokenizer,
        load.load_model(load.find(str(tuned.path)), dtype, device),
        load.load_model(base, dtype, device),
        tuned.sha256,
        base.sha256,
    )


def _measure(subject: Subject, arm: Arm, suite: Suite, batch_size: int) -> list[Score]:
    """Every metric of one suite for one arm."""
    measures = _lm_eval if suite.tasks else _own
    with subject.active(arm) as model:
        return list(
            measures(subject, model, arm, suite, batch_size)
        )  # a list: a generator would outlive the adapter's state


def _own(subject: Subject, model: Any, arm: Arm, suite: Suite, batch_size: int) -> Iterator[Score]:
    title, tokenizer, wanted = f"{arm.name}: {suite.config.suite}", subject.tokenizer, suite.config.metrics
    prompts = _encode(
        encode_prompt, tokenizer, suite.chats, [_with_examples(c.prompt, arm.examples) for c in suite.chats]
    )

    def record(index: int, metric: str, value: float | None, **more: Any) -> Score:
        chat = suite.chats[index]
        identity = suite.item_id(chat)
        return Score(
            suite=suite.config.suite,
            suite_sha256=suite.sha256,
            metric=metric,
            higher_is_better=METRICS[metric].higher_is_better,
            item_id=identity,
            cluster_id=str(chat.row.fields.get("cluster") or identity),
            prompt_sha256=_hash(prompts[index]),
            arm=arm.name,
            value=value,
            artifact_sha256=subject.tuned_sha256 if arm.tuned else subject.base_sha256,
            **more,
        )

    if "loss" in wanted:
        rows = _encode(
            encode_answer, tokenizer, suite.chats, [_with_examples(c.turns, arm.examples) for c in suite.chats]
        )
        with Progress(f"{title}, loss", len(rows)) as bar:
            losses = infer.token_losses(model, rows, tokenizer.pad_token_id, on_batch=bar.advance)
        for index, loss in enumerate(losses):
            yield record(index, "loss", loss, tokens=rows[index].supervised)
    if generated := [metric for metric in wanted if METRICS[metric].probe == "answer"]:
        chosen = sorted(
            random.Random(SEED).sample(
                range(len(prompts)), min(len(prompts), suite.config.generate_items or len(prompts))
            )
        )
        assert suite.config.max_new_tokens is not None
        with Progress(f"{title}, answers", len(chosen)) as bar:
            answers = infer.generate(
                model,
                tokenizer,
                [prompts[i] for i in chosen],
                suite.config.max_new_tokens,
                batch_size,
                on_batch=bar.advance,
            )
        for index, answer in zip(chosen, answers, strict=True):
            chat = suite.chats[index]
            for metric in generated:
                value, outcome = measure(metric, answer, chat.answer)
                judged = {"id": RefusalPattern.id, "version": RefusalPattern.version} if outcome else None
                more = {"response": answer.text, "tokens": answer.tokens, "latency_s": answer.latency_s}
                yield record(index, metric, value, outcome=outcome, judge=judged, **more)


def _encode(encode: Any, tokenizer: Any, chats: list[Chat], turns: list[list[dict[str, Any]]]) -> list[Any]:
    """Every item's turns as tokens. Raises one DataError that names every item that cannot be."""
    encoded, problems = [], []
    for chat, turn in zip(chats, turns, strict=True):
        try:
            encoded.append(encode(tokenizer, turn, chat.tools))
        except ValueError as error:
            problems.append(f"{chat.row.place}: {error}")
    if problems:
        raise DataError("items", problems)
    return encoded


def _lm_eval(subject: Subject, model: Any, arm: Arm, suite: Suite, batch_size: int) -> Iterator[Score]:
    from llmtune.evaluate import capability

    say(f"  {arm.name}: {suite.config.suite}, lm-eval")
    for item in capability.run(model, subject.tokenizer, suite.tasks, batch_size, suite.config.limit):
        identity = f"{item['task']}/{item['doc'].get('id', item['doc_id'])}"
        for metric, value in item["metrics"].items():
            yield Score(
                suite=suite.config.suite,
                suite_sha256=suite.sha256,
                metric=metric,
                higher_is_better=item["higher"][metric],
                item_id=identity,
                cluster_id=str(item["doc"].get("cluster", identity)),
                prompt_sha256=item["prompt_hash"],
                arm=arm.name,
                value=value,
                artifact_sha256=subject.tuned_sha256 if arm.tuned else subject.base_sha256,
                response=item["response"],
            )


def _with_examples(turns: list[dict[str, Any]], examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = turns[:1] if turns[0]["role"] == "system" else []
    return [*system, *examples, *turns[len(system) :]]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _cost(records: list[Score]) -> dict[str, float | None]:
    answers = {(record.suite, record.item_id): record for record in records if record.latency_s is not None}.values()
    seconds = sum(record.latency_s or 0.0 for record in answers)
    tokens = sum(record.tokens or 0 for record in answers)
    return {
        "latency_s": round(seconds / len(answers), 3) if answers else None,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
    }


def _assert_effect(records: list[Score]) -> None:
    both: dict[tuple[str, str, str], dict[str, tuple[float | None, str | None]]] = {}
    for record in records:
        both.setdefault((record.suite, record.metric, record.item_id), {})[record.arm] = (record.value, record.response)
    if all(arms.get("base") == arms.get("tuned") for arms in both.values()):
        raise LlmtuneError(
            f"base and tuned agree on all {len(both)} measurements to the last digit: the adapter had no effect"
        )


def _item(suite: Suite, chat: Chat) -> dict[str, Any]:
    return {
        "suite": suite.config.suite,
        "item_id": suite.item_id(chat),
        "prompt": chat.prompt[-1]["content"],
        "reference": chat.answer,
        "hidden": suite.config.hidden,
    }
