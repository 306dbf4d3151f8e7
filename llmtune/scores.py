"""The per-item score record: the one interface between what measures and what decides."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmtune.errors import ArtifactError

FILE = "scores.jsonl"
LINE = re.compile(r"(:| row )\d+$")


@dataclass(frozen=True)
class Score:
    """One item, one arm, one metric.

    value: the metric in its own unit (nats per token, a rate's 0 or 1, tokens); None when it could not be scored, which is
    never counted as good. cluster_id: items that share a source vary together and are resampled together.
    prompt_sha256: hash of what the model was asked, before its chat template wrote it, so that unlike questions are not compared.
    outcome: refused, partial, complied, incoherent or unscored, where a judge spoke. excluded: why the item may not count, such
    as that it stands in the training rows; it is shown and decides nothing. slices: field -> value, to report by.
    """

    suite: str
    suite_sha256: str
    metric: str
    higher_is_better: bool
    item_id: str
    cluster_id: str
    prompt_sha256: str
    arm: str
    value: float | None
    artifact_sha256: str
    outcome: str | None = None
    response: str | None = None
    slices: dict[str, str] = field(default_factory=dict)
    judge: dict[str, str] | None = None
    latency_s: float | None = None
    tokens: int | None = None
    excluded: str | None = None


def dump(scores: Iterable[Score]) -> str:
    return "".join(json.dumps(asdict(score), ensure_ascii=False) + "\n" for score in scores)


def read(file: Path) -> list[Score]:
    """Every record of `file`. Raises ArtifactError naming the line that is not a score record."""
    records = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                records.append(Score(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ArtifactError(f"{file}:{number}: not a score record ({error})") from None
    return records


def why_excluded(excluded: str) -> str:
    """Why an item is excluded, without the line of the file: each item has another, and that is no reason of its own."""
    return LINE.sub("", excluded)
