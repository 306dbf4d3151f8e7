"""lm-eval's tasks on a model that is in memory already: one task at a time, the same requests for every arm, none of its caches.

What is scored is lm-eval's: its tasks, prompts, filters, metrics and aggregations, through its own `evaluate` and its own seeds,
so that its command gives the same numbers. Its `use_cache` is not keyed by the model and its request cache not by the data
(measured with 0.4.13), so neither is used.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api import metrics as theirs
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM

from llmtune.errors import ConfigError, LlmtuneError
from llmtune.evaluate.observations import Observation
from llmtune.evaluate.suites import Suite
from llmtune.evaluate.tasks import BROKEN, OF_ALL_ITEMS, name_of, watched
from llmtune.model.infer import greedy_settings, has_virtual_tokens, neutral

SEED = 0
MEANS = (theirs.mean, theirs.nanmean)


@dataclass(frozen=True)
class Item:
    """One item of a task under one arm.

    metrics: lm-eval's name -> value, with `,filter` behind it where the filter has a name ("exact_match,strict-match"); None where
    lm-eval's own value is no number. logprobs: of each choice, in nats, and `right` the index of the right one, for a task of
    `multiple_choice` that is scored by lm-eval itself; a task that scores its choices by code of its own has none.
    """

    task: str
    item_id: str
    doc: dict[str, Any]
    prompt: str
    reference: str
    response: str | None
    metrics: dict[str, float | None]
    higher_is_better: dict[str, bool]
    question: str | None = None
    choices: list[str] | None = None
    logprobs: list[float] | None = None
    right: int | None = None


@dataclass(frozen=True)
class Result:
    """One task under one arm.

    aggregates: lm-eval's own table, "metric,filter" -> value, None where it is no number. without_items: metrics of it that have
    no value for a single item, so that nothing can be decided on them. notes: what lm-eval warned of, such as prompts it cut,
    with how often it did.
    """

    items: list[Item]
    aggregates: dict[str, float | None]
    sample_len: int
    without_items: list[str]
    notes: list[str]


def run(
    model: Any,
    tokenizer: Any,
    task: Any,
    batch_size: int,
    *,
    limit: int | None = None,
    chat_template: bool = True,
    unsafe_code: bool = False,
) -> Result:
    """One task on the model, `batch_size` requests a forward pass. Cheap to call again: building lm-eval's model takes no time.

    chat_template: off is lm-eval's command without --apply_chat_template. unsafe_code: its --confirm_run_unsafe_code.
    Raises LlmtuneError that names the task, and the item where its own scoring fell over it; ConfigError for a model without
    a chat template.
    """
    name, training = task.task_name, model.training
    if chat_template and tokenizer.chat_template is None:
        raise ConfigError(name, "the model has no chat template; write chat_template: false in the suite")
    batch_size = 1 if has_virtual_tokens(model) else batch_size  # PEFT ignores the positions of padded rows there
    at: dict[str, Any] = {}
    with _plain(model, tokenizer), watched() as notes, _noting(task, at):
        lm = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        notes.seen.clear()  # that it was given a model in memory, as meant
        drawn = {name: _draw(len(task.eval_docs), limit)} if limit else None
        _seed(task)
        try:
            results = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": {name: task}},
                samples=drawn,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,  # as its command
                confirm_run_unsafe_code=unsafe_code,
            )
        except BROKEN as error:
            where = f" at item {at['doc']}" if "doc" in at else ""
            raise LlmtuneError(f"the lm-eval task {name} failed{where}: {type(error).__name__}: {error}") from error
        finally:
            model.train(training)  # lm-eval puts it into eval mode for good
    return _result(task, results, notes.lines())


def tables(seen: Iterable[Observation], suites: Iterable[Suite]) -> dict[str, dict[str, dict[str, Any]]]:
    """suite -> arm -> task or group -> "metric,filter" -> what lm-eval's own command prints.

    A group such as mmlu has its row from those of its tasks, by lm-eval's own rule.
    """
    groups = {suite.name: suite.groups for suite in suites if suite.tasks}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in seen:
        if one.table is not None and one.item is not None:
            found.setdefault(one.suite, {}).setdefault(one.arm, {})[one.item_id.partition("/")[0]] = one.table
    for suite, arms in found.items():
        for tasks in arms.values():
            rows = {name: group.aggregate(tasks) for name, group in groups[suite].items() if group.has_aggregation}
            tasks |= {name: _scores(row) | {"sample_len": row["sample_len"]} for name, row in rows.items()}
    return found


def _seed(task: Any) -> None:
    """As its command does before a run; examples and sampled answers are drawn from these."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 - theirs draws from it
    torch.manual_seed(DEFAULT_OTHER_SEED)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _draw(items: int, limit: int) -> list[int]:
    """The same drawn items for every arm; lm-eval's own `limit` takes the first ones, of whatever class they are."""
    return sorted(random.Random(SEED).sample(range(items), min(items, limit)))


def _result(task: Any, results: Any, notes: list[str]) -> Result:
    name = task.task_name
    row = results["results"][name]
    aggregates = _scores(row)
    higher, unnamed = task.higher_is_better(), set()
    items: dict[int, Item] = {}
    ids = _ids(name, results["samples"][name])
    for sample in results["samples"][name]:  # an item stands there once a filter
        item = items.setdefault(sample["doc_id"], _item(task, sample, ids[sample["doc_id"]]))
        for metric in sample["metrics"]:
            if (value := _value(sample[metric], task.aggregation().get(metric, theirs.mean))) is not _NO_VALUE:
                item.metrics[name_of(metric, sample["filter"])] = value
                item.higher_is_better[name_of(metric, sample["filter"])] = higher.get(metric, True)
            if metric not in higher:
                unnamed.add(metric)
    with_items = {metric for item in items.values() for metric in item.metrics}
    without = sorted(key for key in aggregates if name_of(*key.rsplit(",", 1)) not in with_items)
    notes += [f"{metric} has no direction in the task; taken as: more is better" for metric in sorted(unnamed)]
    notes += [
        f"{key} is computed over all items at once: no item has a value, and nothing is decided on it"
        for key in without
    ]
    return Result(list(items.values()), aggregates, int(row["sample_len"]), without, notes)


_NO_VALUE = object()


def _value(raw: Any, aggregation: Any) -> Any:
    """A metric of one item: lm-eval's own number where the aggregate is a mean of them, else its own aggregate of this item alone.

    So a perplexity is the perplexity of this text, a list of followed instructions their share, (reference, answer) a BLEU.
    """
    if aggregation in OF_ALL_ITEMS:
        return _NO_VALUE
    if aggregation not in MEANS:
        try:
            raw = aggregation([raw])
        except BROKEN:
            return _NO_VALUE
    if not isinstance(raw, bool | int | float | np.number | np.bool_):
        return _NO_VALUE
    number = float(raw)
    if math.isnan(number) and aggregation is not theirs.mean:
        return _NO_VALUE  # how a task says that the metric is not about this item
    return number if math.isfinite(number) else None


def _scores(row: dict[str, Any]) -> dict[str, float | None]:
    """The scores in a row of lm-eval's table; None for one that is no finite number."""
    found = {
        key: float(value) for key, value in row.items() if "," in key and isinstance(value, int | float | np.number)
    }
    return {key: value if math.isfinite(value) else None for key, value in found.items() if "_stderr," not in key}


def _ids(task: str, samples: list[dict[str, Any]]) -> dict[int, str]:
    """Of each item: its own id where every item has one of its own, else its place in the task's data."""
    own = {sample["doc_id"]: sample["doc"].get("id") for sample in samples if isinstance(sample["doc"], dict)}
    unique = len(set(map(str, own.values()))) == len(own) and None not in own.values()
    return {place: f"{task}/{own[place] if unique and own else place}" for place in {s["doc_id"] for s in samples}}


def _item(task: Any, sample: dict[str, Any], identity: str) -> Item:
    doc = sample["doc"] if isinstance(sample["doc"], dict) else {"doc": sample["doc"]}
    choices, logprobs, right = _choices(task, sample)
    said = str(sample["resps"][0][0]) if task.OUTPUT_TYPE == "generate_until" else None
    if choices is not None and logprobs is not None:
        said = choices[int(np.argmax(logprobs))]
    target = sample["target"]
    if choices is not None and isinstance(target, int) and 0 <= target < len(choices):
        target = choices[target]
    return Item(
        task=task.task_name,
        item_id=identity,
        doc=doc,
        prompt=str(sample["arguments"][0][0]),
        reference=str(target),
        response=said,
        metrics={},
        higher_is_better={},
        question=_question(task, sample),
        choices=choices,
        logprobs=logprobs,
        right=right,
    )


def _question(task: Any, sample: dict[str, Any]) -> str | None:
    """The item in its own words: no examples before it and no chat template around it."""
    said = task.doc_to_text(sample["doc"])
    return said if isinstance(said, str) and said.strip() else None


def _choices(task: Any, sample: dict[str, Any]) -> tuple[list[str] | None, list[float] | None, int | None]:
    """Choices, their log-probabilities and the right one, as lm-eval's own scoring reads them."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None, None, None
    choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    logprobs = [float(answers[0][0]) for answers in sample["resps"]][: len(choices)]  # behind them: without the context
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    plain = task.config.process_results is None and isinstance(gold, int) and 0 <= gold < len(choices)
    return choices, logprobs, gold if plain else None


@contextlib.contextmanager
def _plain(model: Any, tokenizer: Any) -> Iterator[None]:
    """The model under a neutral generation config, and safe from HFLM's `tie_weights()`, which fails on some adapters."""
    settings = greedy_settings(model, tokenizer, 1)
    settings.max_new_tokens = None  # the task says how long, and transformers would let this one win
    model.tie_weights = lambda *_, **__: None
    try:
        with neutral(model, settings), warnings.catch_warnings():
            # one row at a time has no padding, so that position ids are not missed
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            yield
    finally:
        del model.tie_weights


@contextlib.contextmanager
def _noting(task: Any, at: dict[str, Any]) -> Iterator[None]:
    """`at["doc"]` is the item that the task's own scoring has before it."""
    score = task.process_results

    def noted(doc: Any, results: Any) -> Any:
        at["doc"] = str(doc.get("id", doc) if isinstance(doc, dict) else doc)[:200]
        scored = score(doc, results)
        del at["doc"]
        return scored

    task.process_results = noted
    try:
        yield
    finally:
        del task.process_results
