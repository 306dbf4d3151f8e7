"""What the libraries below say while they work: all of it reaches the user, once, but for known lines about themselves.

Nothing is silenced wholesale: each line that is left out stands here with its reason, and can go when that library changes.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from llmtune import ranks
from llmtune.progress import say

KNOWN_LOGS = (
    (
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
    ),  # 0.50: an optional kernel, not used here
    (
        "bitsandbytes.autograd._functions",
        "MatMul8bitLt: inputs will be cast from",
    ),  # 0.50: how each 8-bit product is computed
    (
        "transformers.trainer",
        "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
    ),  # 5.23: tied
    ("transformers.integrations.bitsandbytes", "The modules are dequantized in"),  # 5.23: what a merge asks for
    (
        "lm_eval.models.huggingface",
        "`pretrained` model kwarg is not of type `str`",
    ),  # 0.4.13: the model is loaded by us,
    ("lm_eval.models.huggingface", "Passed an already-initialized model through"),  # in one process
)
"""Logger, and what its line begins with. Version and reason beside it."""
KNOWN_WARNINGS = (
    r"`(is_)?gradient_checkpointing",  # peft 0.21 and trl 1.16 read names that transformers 5.23 deprecates
    r"Position ids are not supported for parameter efficient",  # peft 0.21: virtual tokens move them all alike
)
"""How a Python warning begins."""


def listen() -> None:
    """From now on warnings and log lines of libraries are told as notes. Called before any of them is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    for logger, text in KNOWN_LOGS:
        logging.getLogger(logger).addFilter(_all_but(text))
    for pattern in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    if ranks.rank() > 0:
        warnings.simplefilter("ignore")  # the first process says it for all
    warnings.showwarning = _show  # type: ignore[assignment]
    root = logging.getLogger()
    if not any(isinstance(handler, Notes) for handler in root.handlers):
        root.addHandler(Notes(logging.WARNING))


def _all_but(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(text)


class Notes(logging.Handler):
    """Log lines as notes, each once."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        _tell(record.name.partition(".")[0], record.getMessage(), self.told)


_told: set[str] = set()


def _show(message: Warning | str, _: type[Warning], filename: str, *__: object) -> None:
    library = re.search(r"-packages/([^/.]+)", Path(filename).as_posix())
    _tell(library[1] if library else Path(filename).stem, str(message), _told)


def _tell(library: str, text: str, told: set[str]) -> None:
    line = f"  note: {library}: {' '.join(text.split())}"
    if line not in told:
        told.add(line)
        say(line)
