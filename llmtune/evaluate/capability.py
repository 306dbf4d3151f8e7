"""lm-eval's tasks on a model that is in memory already: one task at a time, the same requests for every arm, none of its caches.

What is scored is lm-eval's: its tasks, prompts, filters, metrics and aggregations, through its own `evaluate` and its own seeds,
so that its command gives the same numbers. Its `use_cache` is not keyed by the model and its request cache not by the data
(measured with 0.4.13), so neither is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
import yaml
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api import metrics as theirs
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from llmtune import config
from llmtune.errors import ConfigError, LlmtuneError, did_you_mean
from llmtune.model.infer import greedy_settings, has_virtual_tokens, neutral
from llmtune.progress import say

SEED = 0
MEANS = (theirs.mean, theirs.nanmean)
OF_ALL_ITEMS = (theirs.f1_score, theirs.matthews_corrcoef, theirs.bypass_agg)
"""Aggregations that say nothing about a single item."""
BROKEN = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, OSError, ImportError)
BROKEN += (SyntaxError, yaml.YAMLError, TemplateError, DatasetsError)
"""What the code and the data of a task can raise. Running out of memory is none of it."""
EXTRAS = {"immutabledict": "ifeval", "langdetect": "ifeval"}


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
    prompt_sha256: str
    reference: str
    response: str
    metrics: dict[str, float | None]
    higher_is_better: dict[str, bool]
    choices: list[str] | None = None
    logprobs: list[float] | None = None
    right: int | None = None


@dataclass(frozen=True)
class Result:
    """One task under one arm.

    aggregates: lm-eval's own table, "metric,filter" -> value. without_items: metrics of it that have no value for a single item, so
    that nothing can be decided on them. notes: what lm-eval warned of, such as prompts it cut, with how often it did.
    """

    items: list[Item]
    aggregates: dict[str, float]
    sample_len: int
    without_items: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Tasks:
    """The tasks that a suite's names stand for, one a name that lm-eval scores, and the groups some of them belong to."""

    tasks: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """Hash of every task's config, with the source of its functions, and of every item it scores."""
        told = {name: [task.dump_config(), [str(doc) for doc in task.eval_docs]] for name, task in self.tasks.items()}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def load_tasks(specs: Sequence[str | dict[str, Any]], place: Path) -> Tasks:
    """Tasks, groups and tags by name: from `tasks/` beside the suite, ours from evals/tasks, else lm-eval's own.

    A spec may be {"task": NAME, key: value} with any key of lm-eval's task files, such as num_fewshot; on a group or a tag it holds for
    every task in it. Raises ConfigError for a name that none has, a task file that does not parse (lm-eval would pass it over), a
    name that stands twice, and directions that contradict each other; LlmtuneError naming the task whose data cannot be read.
    """
    folders = [folder for folder in (config.shipped("evals", "tasks"), place.parent / "tasks") if folder.is_dir()]
    _require_readable(folders)
    local = TaskManager(include_path=list(folders), include_defaults=False).task_index
    made = Tasks({})
    for spec in specs:
        overrides = {} if isinstance(spec, str) else dict(spec)
        name = spec if isinstance(spec, str) else overrides.pop("task", None)
        if not isinstance(name, str):
            raise ConfigError(place, f"lm_eval: {spec} names no task; write {{task: NAME, num_fewshot: 5}}")
        index = local if name in local else _installed()
        if name not in index:
            raise ConfigError(place, f"lm_eval: there is no task '{name}' in evals/tasks nor in lm-eval{did_you_mean(name, index)}")
        with _watched() as notes:
            built = _Factory(place).build(index[name], overrides=overrides or None, registry=index)
        for line in notes.lines():
            say(f"  {name}: lm-eval says: {line}")
        if hasattr(built, "get_all_tasks"):
            made.groups.update({group.name: group for group in [built, *built.get_all_groups()]})
            built = built.get_all_tasks()
        for task in built if isinstance(built, list) else [built]:
            if task.task_name in made.tasks:
                raise ConfigError(place, f"lm_eval: the task '{task.task_name}' stands twice")
            made.tasks[task.task_name] = task
    _require_one_direction(made.tasks, place)
    return made


def known_metrics(tasks: dict[str, Any]) -> dict[str, bool] | None:
    """Our name of every metric the tasks declare -> whether it has values for single items; None where code of a task decides."""
    known: dict[str, bool] = {}
    for task in tasks.values():
        if task.config.process_results is not None or any(map(callable, task._metric_fn_list)):
            return None
        for metric, aggregation in task.aggregation().items():
            for ensemble in task._filters:
                known[_name(metric, ensemble.name)] = aggregation not in OF_ALL_ITEMS
    return known


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
    Raises LlmtuneError that names the task, and the item where its own scoring fell over it.
    """
    name, training = task.task_name, model.training
    batch_size = 1 if has_virtual_tokens(model) else batch_size  # PEFT ignores the positions of padded rows there
    at: dict[str, Any] = {}
    with _plain(model, tokenizer), _watched() as notes, _noting(task, at):
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


def group_aggregates(groups: dict[str, Any], results: dict[str, Result]) -> dict[str, dict[str, float]]:
    """lm-eval's own row of each group that has one, such as mmlu, from the results of its tasks."""
    tasks = {name: {**result.aggregates, "sample_len": result.sample_len} for name, result in results.items()}
    rows = {name: group.aggregate(tasks) for name, group in groups.items() if group.has_aggregation}
    return {name: {key: value for key, value in row.items() if _is_score(key, value)} for name, row in rows.items()}


class _Factory(TaskFactory):  # type: ignore[misc]
    """lm-eval's builder of tasks; files in a task file of one's own are relative to that file, and what goes wrong names the task."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        try:
            return super()._build_task(entry, overrides)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(str(error.name))
            how = f"pip install 'llmtune[{extra}]'" if extra else f"pip install {error.name}"
            raise LlmtuneError(f"{self.place}: the task {entry.name} needs a package that is missing; {how}") from error
        except OSError as error:
            why = "is this machine offline?" if "http" in str(error) or "Hub" in str(error) else "correct its data_files"
            raise LlmtuneError(f"{self.place}: the data of the task {entry.name} cannot be read ({error}); {why}") from error
        except BROKEN as error:
            why = f"the task {entry.name} cannot be built ({type(error).__name__}: {error})"
            raise ConfigError(entry.yaml_path or self.place, why) from error

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        task: dict[str, Any] = super()._load_full_config(entry, overrides)
        file = entry.yaml_path
        if file is None or Path(file).is_relative_to(Path(lm_eval.__file__).parent):
            return task
        if isinstance(task.get("num_fewshot", 0), bool):
            raise TypeError("num_fewshot is no number")
        files = dict(task.get("dataset_kwargs") or {})
        for key in {"data_files", "data_dir"} & files.keys():
            files[key] = _absolute(files[key], Path(file).parent)
        return {**task, "dataset_kwargs": files} if files else task


def _absolute(value: Any, folder: Path) -> Any:
    """Paths as a task file names its data: text, a list or a split each. lm-eval takes them as relative to the working directory."""
    if isinstance(value, dict):
        return {split: _absolute(paths, folder) for split, paths in value.items()}
    if isinstance(value, list):
        return [_absolute(path, folder) for path in value]
    return value if "://" in value else str(folder.resolve() / value)


def _require_readable(folders: list[Path]) -> None:
    """lm-eval passes over a file it cannot read, and takes the first of two tasks of one name. Functions are not imported here."""
    for folder in folders:
        names: dict[str, Path] = {}
        for file in sorted(folder.rglob("*.yaml")):
            try:
                task = load_yaml(file, resolve_func=False)
            except BROKEN as error:
                raise ConfigError(file, f"is no task lm-eval can read: {error}") from None
            name = task.get("group") or task.get("task")
            if isinstance(name, str) and names.setdefault(name, file) != file:
                raise ConfigError(file, f"the task '{name}' stands in {names[name].name} too")


def _require_one_direction(tasks: dict[str, Any], place: Path) -> None:
    seen: dict[str, tuple[str, bool]] = {}
    for name, task in tasks.items():
        for metric, higher in task.higher_is_better().items():
            other, direction = seen.setdefault(metric, (name, higher))
            if direction != higher:
                raise ConfigError(place, f"lm_eval: of {metric}, more is better in {name} and worse in {other}; two suites")


@functools.cache
def _installed() -> dict[str, Any]:
    """Everything lm-eval brings, 14,683 names: ten seconds and more, so only where a name is not one of ours, and once."""
    return dict(TaskManager().task_index)


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
    aggregates = {key: float(value) for key, value in row.items() if _is_score(key, value)}
    higher, unnamed = task.higher_is_better(), set()
    items: dict[int, Item] = {}
    ids = _ids(name, results["samples"][name])
    for sample in results["samples"][name]:  # an item stands there once a filter
        item = items.setdefault(sample["doc_id"], _item(task, sample, ids[sample["doc_id"]]))
        for metric in sample["metrics"]:
            if (value := _value(sample[metric], task.aggregation().get(metric, theirs.mean))) is not _NO_VALUE:
                item.metrics[_name(metric, sample["filter"])] = value
                item.higher_is_better[_name(metric, sample["filter"])] = higher.get(metric, True)
            if metric not in higher:
                unnamed.add(metric)
    with_items = {metric for item in items.values() for metric in item.metrics}
    without = sorted(key for key in aggregates if _name(*key.rsplit(",", 1)) not in with_items)
    notes += [f"{metric} has no direction in the task; taken as: more is better" for metric in sorted(unnamed)]
    notes += [f"{key} is computed over all items at once: no item has a value, and nothing is decided on it" for key in without]
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
    if math.isnan(number) and aggregation is theirs.nanmean:
        return _NO_VALUE  # how a task says that the metric is not about this item
    return number if math.isfinite(number) else None


def _name(metric: str, filter: str) -> str:
    return metric if filter == "none" else f"{metric},{filter}"


def _is_score(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, int | float | np.number)


def _ids(task: str, samples: list[dict[str, Any]]) -> dict[int, str]:
    """Of each item: its own id where every item has one of its own, else its place in the task's data."""
    own = {sample["doc_id"]: sample["doc"].get("id") for sample in samples if isinstance(sample["doc"], dict)}
    unique = len(set(map(str, own.values()))) == len(own) and None not in own.values()
    return {place: f"{task}/{own[place] if unique and own else place}" for place in {s["doc_id"] for s in samples}}


def _item(task: Any, sample: dict[str, Any], identity: str) -> Item:
    doc = sample["doc"] if isinstance(sample["doc"], dict) else {"doc": sample["doc"]}
    asked = [[part for part in arguments if isinstance(part, str)] for arguments in sample["arguments"]]
    choices, logprobs, right = _choices(task, sample)
    said = sample["resps"][0][0]
    if choices is not None and logprobs is not None:
        said = choices[int(np.argmax(logprobs))]
    target = sample["target"]
    if choices is not None and isinstance(target, int) and 0 <= target < len(choices):
        target = choices[target]
    return Item(
        task=task.task_name,
        item_id=identity,
        doc=doc,
        prompt=asked[0][0],
        prompt_sha256=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        reference=str(target),
        response=str(said),
        metrics={},
        higher_is_better={},
        choices=choices,
        logprobs=logprobs,
        right=right,
    )


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
        with neutral(model, settings):
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


class _Notes(logging.Handler):
    """lm-eval's warnings, each once with its number, instead of hundreds of lines in a log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.seen[" ".join(record.getMessage().split())[:240]] += 1

    def lines(self) -> list[str]:
        return [f"{text} ({number} times)" if number > 1 else text for text, number in self.seen.items()]


@contextlib.contextmanager
def _watched() -> Iterator[_Notes]:
    """lm-eval's warnings kept, and its progress bars, which ask no one whether they are wanted, only in a terminal."""
    logger, notes = logging.getLogger("lm_eval"), _Notes()
    logger.addHandler(notes)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            yield notes
    finally:
        logger.removeHandler(notes)
