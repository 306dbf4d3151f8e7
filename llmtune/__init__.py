"""llmtune: tune a language model, and prove that the result is better before anyone ships it.

    import llmtune
    config = llmtune.load_config("sft.yaml", ["train.seed=1"])
    adapter = llmtune.sft(config)                             # <output_dir>/adapter
    scores = llmtune.evaluate(llmtune.load_config("eval.yaml"), "eval.yaml")
    verdict = llmtune.gate(scores.path)                       # its manifest says PASS, FAIL or INCONCLUSIVE
    merged = llmtune.merge(adapter.path.parent)               # proven equal to its adapter, or not written
    page = llmtune.report(adapter.path.parent)

Importing this module imports nothing else; each name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "Artifact": "llmtune.artifact:Artifact",
    "LlmtuneError": "llmtune.errors:LlmtuneError",
    "evaluate": "llmtune.evaluate.arms:run",
    "gate": "llmtune.gate:run",
    "load_config": "llmtune.config:load",
    "merge": "llmtune.export.merge:run",
    "read_artifact": "llmtune.artifact:read",
    "report": "llmtune.report:build",
    "sft": "llmtune.stages.sft:run",
}
__all__ = [
    "Artifact",
    "LlmtuneError",
    "__version__",
    "evaluate",
    "gate",
    "load_config",
    "merge",
    "read_artifact",
    "report",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'llmtune' has no attribute {name!r}")
    module, attribute = _API[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
