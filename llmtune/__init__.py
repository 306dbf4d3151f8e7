"""llmtune: tune a language model, and prove that the result is better before anyone ships it.

    import llmtune
    config = llmtune.load_config("sft.yaml", ["train.seed=1"])
    adapter = llmtune.run_sft(config)                             # <output_dir>/adapter
    scores = llmtune.run_eval(llmtune.load_config("eval.yaml"), "eval.yaml")
    verdict = llmtune.run_gate(scores.path)                       # its manifest says PASS, FAIL or INCONCLUSIVE
    merged = llmtune.run_merge(adapter.path.parent)               # proven equal to its adapter, or not written
    page = llmtune.build_report(adapter.path.parent)

Importing this module imports nothing else; each name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_API = {
    "Artifact": "llmtune.artifact:Artifact",
    "LlmtuneError": "llmtune.errors:LlmtuneError",
    "run_eval": "llmtune.evaluate.arms:run",
    "run_gate": "llmtune.gate:run",
    "load_config": "llmtune.config:load",
    "run_merge": "llmtune.export.merge:run",
    "read_artifact": "llmtune.artifact:read",
    "build_report": "llmtune.report:build",
    "run_sft": "llmtune.stages.sft:run",
}
__all__ = [
    "Artifact",
    "LlmtuneError",
    "__version__",
    "build_report",
    "load_config",
    "read_artifact",
    "run_eval",
    "run_gate",
    "run_merge",
    "run_sft",
]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'llmtune' has no attribute {name!r}")
    module, attribute = _API[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
