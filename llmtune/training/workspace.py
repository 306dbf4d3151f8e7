"""A run's own folder while it trains: held by one run at a time, TensorBoard's files in it, a full disk explained.

Several processes of one run share the folder, or have one each on machines that share no disk. The first of them in a
folder holds it, and the first that comes to prepare prepares for all of them there: no process waits for the network.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from llmtune import ranks
from llmtune.artifact import out_of_space_explained, write_atomically
from llmtune.errors import ConfigError, LlmtuneError

LOCK, TURN, LAUNCH = ".llmtune.lock", ".llmtune.turn", ".llmtune.launch"
"""Held while a run lasts; held by one process after another while they prepare; which launch is here, and how far it is."""
BEGUN, PREPARED, FAILED = "begun", "prepared", "failed"


@contextlib.contextmanager
def hold(output: Path, place: object) -> Iterator[None]:
    """Make `output` and hold it: a second run in it at the same time is refused with a ConfigError."""
    with out_of_space_explained(output), _alone(output, place), _boards(output):
        yield


@contextlib.contextmanager
def prepared(output: Path) -> Iterator[bool]:
    """Yields whether this process is the first here, and so has to prepare what the others will find done.

    The others wait, and raise LlmtuneError when the first failed.
    """
    if ranks.world_size() == 1:
        yield True
        return
    with FileLock(output / TURN):
        state = _state(output)
        _require_not_failed(state)
        try:
            yield state != PREPARED
        except BaseException as error:  # the others must not try what failed here; it is told before they learn of it
            ranks.tell(output, error)
            _note(output, FAILED)
            raise
        _note(output, PREPARED)


@contextlib.contextmanager
def _alone(output: Path, place: object) -> Iterator[None]:
    if output.exists() and not output.is_dir():
        raise ConfigError(place, f"output_dir: {output} is a file, and a folder is needed")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            place, f"output_dir: {output} cannot be written to ({error.strerror}); choose another"
        ) from None
    lock, several = FileLock(output / LOCK, timeout=0), ranks.world_size() > 1
    with FileLock(output / TURN) if several else contextlib.nullcontext():
        try:
            lock.acquire()
            if several:
                _require_not_failed(_state(output))
                _note(output, BEGUN)
        except Timeout:
            if not several or _state(output) is None:
                raise ConfigError(
                    place, f"output_dir: another run is writing into {output}; wait for it, or choose another"
                ) from None
    if lock.is_locked:
        for draft in output.glob("*.partial-*"):  # a process killed while it wrote the result cannot tidy up
            shutil.rmtree(draft)
    left: tuple[str, ...] = (LOCK, TURN, LAUNCH)
    try:
        yield
    except BaseException as error:  # told before the others learn of it, or they would tell that they learnt of it
        if several:
            left = (LOCK,)
            ranks.tell(output, error)
            if lock.is_locked:
                _note(output, FAILED)
        raise
    finally:
        if lock.is_locked:
            lock.release()
            for name in left:
                (output / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            output.rmdir()  # when nothing came of it


def _require_not_failed(state: str | None) -> None:
    if state == FAILED:
        raise LlmtuneError("another process of this run failed; its message tells why")


def _note(output: Path, state: str) -> None:
    write_atomically(output / LAUNCH, json.dumps({"launch": ranks.launch(), "state": state}))


def _state(output: Path) -> str | None:
    """How far the processes of this launch are here; None when those in this folder are of another run."""
    file = output / LAUNCH
    try:
        found, written = json.loads(file.read_text(encoding="utf-8")), file.stat().st_mtime
    except (OSError, ValueError):
        return None
    return str(found["state"]) if found.get("launch") == ranks.launch() and written >= ranks.launch_time() else None


@contextlib.contextmanager
def _boards(output: Path) -> Iterator[None]:
    """Keep TensorBoard's files in the run's folder; transformers would put them among the checkpoints."""
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = given or str(output / "tensorboard")
    try:
        yield
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
        if given:
            os.environ["TENSORBOARD_LOGGING_DIR"] = given
