"""lm-eval's tasks on a model that is in memory already: one process, the same requests for every arm, none of its caches.

Its `use_cache` is not keyed by the model and its request cache not by the data (measured with 0.4.13), so neither is used.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from llmtune import config
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.model.infer import greedy_settings, neutral

SEED = 0


def load_tasks(names: list[str], place: Path) -> dict[str, Any]:
    """Tasks by name: ours from evals/tasks and from beside the suite, else lm-eval's own.

    Raises ConfigError for a name neither has; a task file that does not parse is an error and not skipped, as lm-eval would.
    """
    found: dict[str, Any] = {}
    for folder in (place.parent / "tasks", config.shipped("evals", "tasks")):
        for file in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            try:
                task = load_yaml(file)
            except (
                yaml.YAMLError,
                ValueError,
                TypeError,
                LookupError,
                AttributeError,
                ImportError,
                OSError,
                SyntaxError,
            ) as error:
                raise ConfigError(file, f"is no task lm-eval can read: {error}") from None
            found.setdefault(task.get("task", file.stem), _with_absolute_files(task, file))
    theirs = [name for name in names if name not in found]
    manager = TaskManager(include_defaults=bool(theirs))
    if missing := [name for name in theirs if name not in manager.all_tasks]:
        raise ConfigError(place, f"lm_eval: there is no task '{missing[0]}' in evals/tasks nor in lm-eval")
    try:
        hub = manager.load(theirs)["tasks"] if theirs else {}
    except OSError as error:
        raise LlmtuneError(
            f"{place}: the data of {theirs[0]} cannot be read ({error}); is this machine offline?"
        ) from None
    ours = {name: ConfigurableTask(config=found[name]) for name in names if name in found}
    return {**ours, **hub}


def run(
    model: Any, tokenizer: Any, tasks: dict[str, Any], batch_size: int, limit: int | None
) -> Iterator[dict[str, Any]]:
    """One dict an item and task: {"task", "doc_id", "doc", "prompt", "response", "metrics": {name: value}, "higher": {...}}."""
    with _plain(model, tokenizer):
        lm = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        # the same drawn items for every arm; lm-eval's own `limit` takes the first ones, of whatever class they are
        drawn = {name: _draw(len(task.eval_docs), limit) for name, task in tasks.items()} if limit else None
        # its bars ask no one whether they are wanted: in a log they would be hundreds of lines
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with quiet:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(tasks.values()),
                apply_chat_template=True,
                log_samples=True,
                bootstrap_iters=0,
                samples=drawn,
                random_seed=SEED,
            )
    for name, samples in results["samples"].items():
        higher = results["higher_is_better"][name]
        for sample in samples:
            yield {
                "task": name,
                "doc_id": sample["doc_id"],
                "doc": sample["doc"],
                "prompt": str(sample["arguments"][0][0]),
                "prompt_hash": sample["prompt_hash"],
                "response": str(sample["filtered_resps"][0]) if sample["filtered_resps"] else None,
                "metrics": {key: float(sample[key]) for key in higher if isinstance(sample.get(key), int | float)},
                "higher": higher,
            }


@contextlib.contextmanager
def _plain(model: Any, tokenizer: Any) -> Iterator[None]:
    """The model under a neutral generation config, and safe from HFLM's `tie_weights()`, which fails on some adapters."""
    model.tie_weights = lambda *_, **__: None
    try:
        with neutral(model, greedy_settings(model, tokenizer, 256)):
            yield
    finally:
        del model.tie_weights


def _draw(items: int, limit: int) -> list[int]:
    return sorted(random.Random(SEED).sample(range(items), min(items, limit)))


def _with_absolute_files(task: dict[str, Any], file: Path) -> dict[str, Any]:
    """lm-eval takes `data_files` as relative to the working directory; here they are relative to the task's file."""
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        resolved = {split: str((file.parent / path).resolve()) for split, path in files.items()}
        task = {**task, "dataset_kwargs": {**task["dataset_kwargs"], "data_files": resolved}}
    return task
