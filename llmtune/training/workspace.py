"""A run's own folder while it trains: held by one run at a time, TensorBoard's files in it, a full disk explained."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from llmtune.artifact import out_of_space_explained
from llmtune.errors import ConfigError


@contextlib.contextmanager
def hold(output: Path, place: object) -> Iterator[None]:
    """Make `output` and hold it: a second run in it at the same time is refused with a ConfigError."""
    with out_of_space_explained(output), _alone(output, place), _boards(output):
        yield


@contextlib.contextmanager
def _alone(output: Path, place: object) -> Iterator[None]:
    if output.exists() and not output.is_dir():
        raise ConfigError(place, f"output_dir: {output} is a file, and a folder is needed")
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".llmtune.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            place, f"output_dir: another run is writing into {output}; wait for it, or choose another"
        ) from None
    try:
        yield
    finally:
        lock.release()
        (output / ".llmtune.lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            output.rmdir()  # when nothing came of it


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
