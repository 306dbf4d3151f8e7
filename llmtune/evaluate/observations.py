"""What a model did with an item, kept as it comes: an interrupted evaluation goes on from it, and a judge can be run again.

The unit of work is a batch whose items are fixed beforehand: whatever the number of processes, and however often it was
interrupted, an item is answered beside the same others, so that its numbers are the same to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmtune import ranks
from llmtune.errors import ArtifactError, ConfigError

FILE = "observations.jsonl"


@dataclass(frozen=True)
class Observation:
    """One item, one arm, one probe (see `config.metrics`; "lm_eval" for its tasks).

    text, tokens, ended, latency_s: an answer, its length, whether it ended by itself, its share of the batch's time. loss:
    nats per token. logprobs: of each choice as a whole, or of each opener. measured, higher: lm-eval's metrics and which
    direction is better; item: what its task says of the item; table: with the first item of a task, lm-eval's own row of
    the whole. error: why there is nothing of these.
    """

    arm: str
    suite: str
    item_id: str
    probe: str
    prompt_sha256: str
    text: str | None = None
    tokens: int | None = None
    ended: bool | None = None
    latency_s: float | None = None
    loss: float | None = None
    logprobs: list[float] | None = None
    measured: dict[str, float | None] | None = None
    higher: dict[str, bool] | None = None
    error: str | None = None
    item: dict[str, Any] | None = None
    table: dict[str, float | None] | None = None

    def line(self) -> str:
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(facts, ensure_ascii=False) + "\n"


def read(file: Path) -> list[Observation]:
    """Every observation in `file`. Raises ArtifactError naming the line that is none."""
    found = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found.append(Observation(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ArtifactError(f"{file}:{number}: not an observation ({error})") from None
    return found


@contextlib.contextmanager
def alone(folder: Path, place: object) -> Iterator[None]:
    """Make `folder` and hold it. Raises ConfigError when another evaluation is going on in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        if ranks.rank() == 0:
            lock.acquire()
    except Timeout:
        raise ConfigError(
            place, f"another evaluation is going on in {folder}; wait for it, or name another output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


class Store:
    """Finished units of work in a folder, by what they depend on; each process appends to a file of its own.

    A unit that was being written when the process was killed is not there, and is done again; so is one that failed, but for a
    store opened with `failed`, which is for reading what all processes came to.
    """

    def __init__(self, folder: Path, *, failed: bool = False) -> None:
        self._done: dict[str, list[Observation]] = {}
        for unit, made in _units(sorted(folder.glob("*.jsonl"))):
            whole = not any(one.error for one in made)
            if whole or (failed and unit not in self._done):  # what failed once may have been asked again since
                self._done[unit] = made
        earlier = len(list(folder.glob(f"{ranks.rank()}-*.jsonl")))  # never appended to: its last line may be cut short
        self._file = folder / f"{ranks.rank()}-{earlier}.jsonl"

    def __contains__(self, unit: str) -> bool:
        return unit in self._done

    def __getitem__(self, unit: str) -> list[Observation]:
        return self._done[unit]

    def put(self, unit: str, observations: Iterable[Observation]) -> None:
        made = list(observations)
        line = {"unit": unit, "observations": [asdict(one) for one in made]}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._done[unit] = made


def _units(files: list[Path]) -> Iterator[tuple[str, list[Observation]]]:
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    found: dict[str, Any] = json.loads(line)
                    unit = str(found["unit"]), [Observation(**one) for one in found["observations"]]
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a kill, or of another version: it is done again
                yield unit
