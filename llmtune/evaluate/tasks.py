"""lm-eval's tasks by name: ours, the user's own and all that lm-eval brings, as its own task objects.

lm-eval passes over a task file that it cannot read and takes paths as relative to the working directory; here the one is an error
and the others are relative to the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api import metrics as theirs
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from llmtune import config
from llmtune.config.eval import SuiteConfig
from llmtune.errors import ConfigError, LlmtuneError, did_you_mean
from llmtune.progress import say

OF_ALL_ITEMS = (theirs.f1_score, theirs.matthews_corrcoef, theirs.bypass_agg)
"""Aggregations that say nothing about a single item."""
BROKEN: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
BROKEN += (OSError, ImportError, SyntaxError, yaml.YAMLError, TemplateError, DatasetsError)
"""What the code and the data of a task can raise. Running out of memory is none of it."""
PLACES = {"dataset_kwargs", "metadata"}
EXTRAS = {"immutabledict": "ifeval", "langdetect": "ifeval"}


@dataclass(frozen=True)
class Tasks:
    """The tasks that a suite's names stand for, one a name that lm-eval scores, and the groups some of them belong to."""

    tasks: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)

    def sha256(self) -> dict[str, str]:
        """Of each task: the hash of its config but no path, of its code, of every item it scores and of those it shows as examples."""
        made = {}
        for name, task in self.tasks.items():
            settings = {key: value for key, value in task.dump_config().items() if key not in PLACES}
            docs = [*task.eval_docs, *((task.fewshot_docs() or []) if settings.get("num_fewshot") else [])]
            told = json.dumps([settings, [str(doc) for doc in docs], _code(task)], sort_keys=True, default=str)
            made[name] = hashlib.sha256(told.encode()).hexdigest()
        return made


def _code(task: Any) -> list[str]:
    """The hash of every Python file beside one that a function of the task is in: what it calls may lie there."""
    functions = [value for value in vars(task.config).values() if inspect.isfunction(value)]
    files = [file for function in functions if (file := inspect.getsourcefile(function))]
    beside = {code for file in files for code in Path(file).parent.glob("*.py")}
    return sorted(hashlib.sha256(code.read_bytes()).hexdigest() for code in beside)


def load(specs: Sequence[str | dict[str, Any]], place: Path, *, unsafe_code: bool = False) -> Tasks:
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
        index = _registry(name, local)
        if name not in index:
            raise ConfigError(
                place, f"lm_eval: there is no task '{name}' in evals/tasks nor in lm-eval{did_you_mean(name, index)}"
            )
        if "dataset_kwargs" in overrides:  # a path in a suite is relative to the suite
            overrides["dataset_kwargs"] = _absolute_files(overrides["dataset_kwargs"], place.parent)
        with watched() as notes:
            built = _Factory(place, unsafe_code=unsafe_code).build(
                index[name], overrides=overrides or None, registry=index
            )
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


def require_usable(suite: SuiteConfig, tasks: dict[str, Any], place: Path) -> None:
    """Raise ConfigError for code that would run unasked, pictures or sound, and for a rule on a metric no item has a value of."""
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if not suite.unsafe_code:
        _require_safe(next(iter(unsafe), ""), bool(unsafe), place)
    if suite.unsafe_code and not unsafe:
        raise ConfigError(place, f"unsafe_code: has no effect: {', '.join(tasks)} run no code of the model")
    if other := [name for name, task in tasks.items() if getattr(task, "MULTIMODAL", False)]:
        raise ConfigError(
            place, f"lm_eval: {other[0]} asks about pictures or sound, and only text is given to a model here"
        )
    _require_gated(suite.gate, tasks, place)


def _require_safe(name: str, unsafe: object, place: Path) -> None:
    if unsafe:
        why = f"{name} runs the code that the model writes on this machine"
        raise ConfigError(place, f"lm_eval: {why}; write unsafe_code: true where nothing here can come to harm")


def _require_gated(gate: dict[str, Any], tasks: dict[str, Any], place: Path) -> None:
    """A task with scoring code of its own may name its metrics as it goes; then nothing is known before it ran."""
    known: dict[str, bool] = {}
    for task in tasks.values():
        scored_by = getattr(task, "_metric_fn_list", None)
        if (
            scored_by is None
            or task.config.process_results is not None
            or not scored_by.keys() <= METRIC_REGISTRY.keys()
        ):
            return
        for metric, aggregation in task.aggregation().items():
            known |= {name_of(metric, ensemble.name): aggregation not in OF_ALL_ITEMS for ensemble in task._filters}
    for metric in gate:
        if metric not in known:
            near = did_you_mean(metric, known)
            raise ConfigError(place, f"gate.{metric}: is no metric of {', '.join(tasks)}{near}")
        if not known[metric]:
            raise ConfigError(
                place, f"gate.{metric}: is computed over all items at once, and the gate compares item by item"
            )


class _Factory(TaskFactory):  # type: ignore[misc]
    """lm-eval's builder of tasks; files in a task file of one's own are relative to that file, and what goes wrong names the task."""

    def __init__(self, place: Path, *, unsafe_code: bool) -> None:
        super().__init__()
        self.place, self.unsafe_code = place, unsafe_code

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        if entry.yaml_path and not self.unsafe_code:  # before the task's own code is imported, which may load more
            _require_safe(entry.name, load_yaml(entry.yaml_path, resolve_func=False).get("unsafe_code"), self.place)
        try:
            return super()._build_task(entry, overrides)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(str(error.name))
            how = f"pip install 'llmtune[{extra}]'" if extra else f"pip install {error.name}"
            raise LlmtuneError(f"{self.place}: the task {entry.name} needs a package that is missing; {how}") from error
        except OSError as error:
            why = (
                "is this machine offline?" if "http" in str(error) or "Hub" in str(error) else "correct its data_files"
            )
            raise LlmtuneError(
                f"{self.place}: the data of the task {entry.name} cannot be read ({error}); {why}"
            ) from error
        except BROKEN as error:
            why = f"the task {entry.name} cannot be built ({type(error).__name__}: {error})"
            raise ConfigError(self.place if overrides else entry.yaml_path or self.place, why) from error

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        task: dict[str, Any] = super()._load_full_config(entry, overrides)
        file = entry.yaml_path
        if file is None or Path(file).is_relative_to(Path(lm_eval.__file__).parent):
            return task
        files = _absolute_files(task.get("dataset_kwargs") or {}, Path(file).parent)
        return {**task, "dataset_kwargs": files} if files else task


def _absolute_files(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """lm-eval takes the paths in `dataset_kwargs` as relative to the working directory."""
    return {
        key: _absolute(value, folder) if key in {"data_files", "data_dir"} else value for key, value in given.items()
    }


def _absolute(value: Any, folder: Path) -> Any:
    """Paths as a task file names its data: text, a list or a split each."""
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
                raise ConfigError(
                    place, f"lm_eval: of {metric}, more is better in {name} and worse in {other}; two suites"
                )


def _registry(name: str, local: dict[str, Any]) -> dict[str, Any]:
    """The local tasks, and behind them lm-eval's own where `name` is none of them or a group of others than them."""
    entry = local.get(name)
    members = (entry.cfg or {}).get("task") if entry else None
    named = [
        m if isinstance(m, str) else m.get("task") or m.get("group")
        for m in members or ()
        if not isinstance(members, str)
    ]
    return local if entry and set(named) <= local.keys() else {**_installed(), **local}


@functools.cache
def _installed() -> dict[str, Any]:
    """Everything lm-eval brings: ten seconds and more for 14,683 names, so only where it is needed, and once."""
    say("  reading lm-eval's own list of tasks")
    return dict(TaskManager().task_index)


def name_of(metric: str, filter: str) -> str:
    return metric if filter == "none" else f"{metric},{filter}"


class Heard(logging.Handler):
    """lm-eval's warnings, each once with how often it came."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.seen[" ".join(record.getMessage().split())[:240]] += 1

    def lines(self) -> list[str]:
        return [f"{text} ({number} times)" if number > 1 else text for text, number in self.seen.items()]


@contextlib.contextmanager
def watched() -> Iterator[Heard]:
    """lm-eval's warnings kept for the one who asked, and its progress bars, which ask no one, only in a terminal."""
    logger, notes = logging.getLogger("lm_eval"), Heard()
    kept, logger.propagate = logger.propagate, False
    logger.addHandler(notes)
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            yield notes
    finally:
        logger.removeHandler(notes)
        logger.propagate = kept
