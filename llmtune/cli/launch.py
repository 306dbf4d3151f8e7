"""`--processes N`: the same command in N processes on this machine, with one voice and one exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune import ranks
from llmtune.errors import INTERRUPTED_EXIT, ConfigError, Preempted
from llmtune.interruption import SIGNALS

GRACE_S = 10
"""How long a process may take to end once another one has failed; then it is killed."""


def run(processes: int, words: list[str], output: Path) -> int:
    """Run `llmtune WORDS` in `processes` processes. Returns the exit code of the first that failed, its message told once.

    SIGTERM and Ctrl-C are passed on to every process; they stop together, with a checkpoint.
    """
    if ranks.launched():
        raise ConfigError("command line", "--processes is for a plain command; under a launcher, leave it out")
    ranks.clear(output)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as logs:
        children = start_processes(
            "llmtune",
            sys.executable,
            args=dict.fromkeys(range(processes), ("-m", "llmtune", *words)),
            envs=_places(processes),
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        with _passing_on(children) as received:
            while not any(child.proc.poll() for child in children.subprocess_handlers.values()):
                if children.wait(timeout=0.1, period=0.1):
                    return 0
            children.close(timeout=GRACE_S)
            result = children.wait(timeout=0)
    return _ending({rank: failure.exitcode for rank, failure in result.failures.items()}, received, output)


def _places(processes: int) -> dict[int, dict[str, str]]:
    """What tells each process its number and where to find the others, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes)),
        ranks.TOLD_BY_PARENT: "1",
    }
    return {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)}


@contextlib.contextmanager
def _passing_on(children: Any) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the processes, which have a session of their own. Yields the signals that came."""
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        for process in children.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending(codes: dict[int, int], received: list[int], output: Path) -> int:
    """One exit code for all, the reason on stderr: what a process said of itself, unless another was killed before."""
    if not codes:
        return 0
    told = ranks.read(output)
    killed = next((rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM), None)
    if killed is not None and (told is None or told[1] == ranks.LOST):
        name = signal.Signals(-codes[killed]).name
        hint = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
        told = (
            1,
            f"process {killed} of {len(codes)} was ended by {name}{hint}. The same command goes on from the last checkpoint",
        )
        ranks.clear(output)
        ranks.note(output, *told, killed)
    if told is None and received:  # before there was anything to save
        stopped = "stopped before the first step"
        told = (INTERRUPTED_EXIT if received[0] == signal.SIGINT else Preempted.exit_code, stopped)
    code, message = told or (max(codes.values()), f"a process ended with exit code {max(codes.values())}; see above")
    print(f"llmtune: {message}", file=sys.stderr)
    return code
