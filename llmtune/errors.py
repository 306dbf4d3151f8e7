"""Every error a user can meet, and the exit code it ends the command with.

    LlmtuneError                 1   everything else that failed: the machine, the network, upstream
    |-- UserError                2   something the user wrote or pointed at is wrong
    |   |-- ConfigError              a run file, an override, a suite
    |   |-- DataError                a row, a file of rows, a chat template
    |   `-- ArtifactError            a folder that is unfinished, changed, or belongs to another base
    |-- MachineError             1   disk full, no GPU where one is asked for, out of memory
    |-- ProofError               1   a merge that does not equal its adapter
    `-- Preempted               75   SIGTERM came, and a checkpoint was written: run the same command again

A verdict is not an error: `gate` exits with 0 (PASS), 3 (FAIL) or 4 (INCONCLUSIVE). Ctrl-C ends with 130.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

VERDICT_EXIT = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}
INTERRUPTED_EXIT = 130


class LlmtuneError(Exception):
    """A failure with a message written for the user: what was set, why it fails, what to do."""

    exit_code = 1


class UserError(LlmtuneError):
    exit_code = 2


class Problems(UserError):
    """One place (a file) and everything wrong with it, reported together."""

    def __init__(self, place: object, problems: Iterable[str] | str, *, most: int = 20) -> None:
        lines = [problems] if isinstance(problems, str) else list(problems)
        self.place, self.problems = str(place), lines
        if len(lines) == 1:
            text = f"{place}: {lines[0]}"
        else:
            more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
            text = "\n  ".join([f"{place}: {len(lines)} problems", *lines[:most], *more])
        super().__init__(text)


class ConfigError(Problems):
    pass


class DataError(Problems):
    pass


class ArtifactError(UserError):
    pass


class MachineError(LlmtuneError):
    pass


class ProofError(LlmtuneError):
    pass


class Preempted(LlmtuneError):
    exit_code = 75


class Stopped(BaseException):
    """Leaves whatever is being done after a signal. No Exception, so that no library takes it for a failure of its own; a
    stage turns it into Preempted, or into KeyboardInterrupt after Ctrl-C (see interruption.py)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known word, or the list when nothing is near and it is short."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""


def ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the message a command ends with; None for an error that nobody foresaw."""
    if isinstance(error, LlmtuneError | Stopped):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_EXIT, "interrupted; the same command goes on from where it was"
    if isinstance(error, MemoryError | RuntimeError) and (
        isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)
    ):
        return (
            1,
            "out of memory; lower micro_batch_size or max_length, or set train.activation_checkpointing to true; of an evaluation, lower batch_size",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return 1, f"{error.filename or 'the machine'}: {error.strerror}"
    return None
