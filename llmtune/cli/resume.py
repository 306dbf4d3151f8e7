"""`llmtune verify-resume`: a run that is killed and goes on ends as one that is not, shown on the user's own run."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmtune import config, ranks
from llmtune.errors import ConfigError, LlmtuneError, ending
from llmtune.progress import say

SHOWN = 10


def verify(arguments: argparse.Namespace) -> int:
    """Train the first steps twice, once without and once with a SIGKILL, and compare. Returns 0 when equal to the bit, else 1."""
    settings, steps = config.load(arguments.config, arguments.overrides, "sft"), arguments.steps
    if ranks.world_size() > 1:
        raise ConfigError(arguments.config, "verify-resume runs in one process; start it without a launcher")
    _require_two(steps, arguments.config)
    if len(settings.phases()) > 1:
        say("  of the two phases the first is looked at")
    beside = Path(settings.output_dir).parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=beside) as scratch:
        whole, cut = Path(scratch, "uninterrupted"), Path(scratch, "killed")
        say(f"the first {steps} steps, uninterrupted")
        _live(settings, arguments.config, whole, steps, None, 0)
        done = int(_last(whole).name.removeprefix("checkpoint-"))  # a short run has fewer steps
        _require_two(done, arguments.config)
        kill = _instant(done, settings.train.batch_size // settings.train.micro_batch_size)
        say(f"again, killed before micro batch {kill[1]} of step {kill[0]}")
        _live(settings, arguments.config, cut, steps, kill, -signal.SIGKILL)
        say("and resumed")
        _live(settings, arguments.config, cut, steps, None, 0)
        return _told(whole, cut)


def _require_two(steps: int, place: Path) -> None:
    if steps < 2:
        raise ConfigError(
            place, "a run killed in its only step begins anew, which proves nothing; take 2 steps or more"
        )


def _instant(steps: int, accumulated: int) -> tuple[int, int]:
    """A random step, with one before it and one after it where there are so many, and a random micro batch of it."""
    draw = random.SystemRandom()
    return draw.randint(2, steps - 1) if steps > 2 else steps, draw.randint(1, accumulated)


def _live(settings: Any, place: Path, output: Path, steps: int, kill: tuple[int, int] | None, wanted: int) -> None:
    """One life of the run in a process of its own. Raises LlmtuneError where it does not end as `wanted`."""
    every_step = settings.train.model_copy(update={"log_steps": 1})
    changed: dict[str, Any] = {"output_dir": str(output), "train": every_step, "tracking": []}
    target = (settings.model_copy(update=changed), place, steps, kill)
    process = multiprocessing.get_context("spawn").Process(target=_rehearse, args=target)
    process.start()
    process.join()
    if process.exitcode == ConfigError.exit_code:
        raise ConfigError(place, "is not a run that can be trained; its message is above")
    if process.exitcode != wanted:
        raise LlmtuneError(f"this part of the run ended with {process.exitcode}, not {wanted}; its message is above")


def _rehearse(settings: Any, place: Path, steps: int, kill: tuple[int, int] | None) -> None:
    from llmtune import cli

    cli._quiet()
    from llmtune.stages import sft
    from llmtune.training.rehearsal import Rehearsal, Rehearsed

    try:
        sft.run(settings, place, callbacks=[Rehearsal(steps, kill)])
    except Rehearsed:
        return
    except (LlmtuneError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        if (known := ending(error)) is None:
            raise
        say(f"  {known[1]}")
        sys.exit(known[0])
    raise AssertionError(f"{place}: ended before step {steps}")


def _told(whole: Path, cut: Path) -> int:
    from llmtune.training.callbacks import read_metrics
    from llmtune.training.rehearsal import differences

    first, second = _last(whole), _last(cut)
    number, different = differences(first, second)
    files = (folder / "checkpoints" / "metrics.jsonl" for folder in (whole, cut))
    lines, others = ([_said(line) for line in read_metrics(file)] for file in files)
    if lines != others:
        different.append("metrics.jsonl: losses")
    if not different:
        print(f"equal: {number} tensors and values of {first.name}, and {len(lines)} lines of metrics, to the bit")
        return 0
    for name in different[:SHOWN]:
        say(f"  differs: {name}")
    print(f"NOT equal: {len(different)} of {number} tensors and values of {first.name} differ")
    return 1


def _last(folder: Path) -> Path:
    """The newest of a rehearsal's checkpoints."""
    found = (folder / "checkpoints").glob("**/checkpoint-*")
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _said(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what a clock and the memory gave."""
    return {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s", "memory_gb")}
