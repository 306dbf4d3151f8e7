"""Which optimizers and schedulers the installed transformers names, read from its source without importing it (and torch)."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

from llmtune.errors import LlmtuneError, did_you_mean

PLACES = {
    "optimizer": ("training_args.py", "OptimizerNames"),
    "scheduler": ("trainer_utils.py", "SchedulerType"),
}


def known(kind: str, name: str) -> str:
    """`name` when transformers has such an optimizer or scheduler. Raises ValueError naming the nearest one."""
    if name not in names(kind):
        raise ValueError(f"transformers has no {kind} '{name}'{did_you_mean(name, names(kind))}")
    return name


@functools.cache
def names(kind: str) -> list[str]:
    """The values of transformers' own enumeration, in its order. kind: "optimizer" or "scheduler"."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise LlmtuneError("transformers is not installed; 'pip install transformers' brings it")
    file, enumeration = PLACES[kind]
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    members = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == enumeration)
    values = [node.value for node in members if isinstance(node, ast.Assign)]
    return [str(value.value) for value in values if isinstance(value, ast.Constant)]
