"""One run in several processes: which of them this one is, who speaks, and what they leave when one of them fails.

Launchers swallow a process's exit code and print their own traceback (torchrun and accelerate end with 1), so the first
error of a launched run goes into `exit.json` in its output folder: {code, message, rank}. The others keep quiet.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from llmtune.errors import ConfigError, LlmtuneError, ending

EXIT = "exit.json"
LOST = "the connection to another process of this run is lost: it ended without a word (killed, or out of memory?)"
TOLD_BY_PARENT = "LLMTUNE_TOLD_BY_PARENT"
"""Set by `--processes N` in the processes it starts: it tells the user itself what is in exit.json."""
TIMEOUT = "LLMTUNE_TIMEOUT_S"


class ToldElsewhere(Exception):
    """This process ends because of an error that another one tells the user about."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def world_size() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them; 0 writes the result and speaks."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The number of this process on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched() -> bool:
    """Whether torchrun, accelerate or `--processes` started this process; whoever did will swallow its exit code."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


@contextlib.contextmanager
def telling(output: Path) -> Iterator[None]:
    """Of a launched run: leave its first error in `output`; raise ToldElsewhere in place of every other one."""
    clear(output)
    try:
        yield
    except BaseException as raised:  # whatever ends the run, Ctrl-C included, is what the launcher will not say
        error = _meaning(raised)
        if not tell(output, raised):
            raise ToldElsewhere((ending(error) or (1, ""))[0]) from raised
        error.__dict__["told"] = launched()
        raise error from raised.__cause__
    if rank() == 0:
        clear(output, whoever=True)  # of an earlier attempt under the same launcher


def tell(output: Path, error: BaseException) -> bool:
    """Write into `output` how a launched run ends, if this is the first to say so. Returns whether the user is to read it from here."""
    if not launched():
        return True
    if "told" not in error.__dict__:
        known = ending(_meaning(error))
        first = note(output, *(known or (1, f"{type(error).__name__}: {error}")), rank())
        error.__dict__["told"] = first and not (known and TOLD_BY_PARENT in os.environ)
    return bool(error.__dict__["told"])


def note(output: Path, code: int, message: str, rank: int) -> bool:
    """Write exit.json; False where there is one already."""
    with contextlib.suppress(OSError):  # a folder that cannot be written to is the error itself, most likely
        output.mkdir(parents=True, exist_ok=True)
        try:
            with (output / EXIT).open("x", encoding="utf-8") as stream:
                stream.write(json.dumps({"code": code, "message": message, "rank": rank}))
        except FileExistsError:
            return False
    return True


def clear(output: Path, *, whoever: bool = False) -> None:
    """Remove the exit.json of a run before this one. One that a process of this very launch wrote already stays."""
    file = output / EXIT
    with contextlib.suppress(OSError):
        if whoever or not launched() or file.stat().st_mtime < launch_time():
            file.unlink()


def read(output: Path) -> tuple[int, str] | None:
    """Exit code and message that a process left in `output`."""
    try:
        found = json.loads((output / EXIT).read_text(encoding="utf-8"))
        return int(found["code"]), str(found["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def launch() -> str:
    """A name that the processes of this launch share, on every machine, and no other run that is going on has."""
    import socket

    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    where = socket.gethostname() if address in ("", "localhost", "127.0.0.1", "::1") else address
    attempt = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    return ":".join([where, port, *attempt])


def timeout_s() -> int:
    """How long a process waits for the others before it takes them for dead."""
    given = os.environ.get(TIMEOUT, "1800")
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError("environment", f"{TIMEOUT}: {given!r} is not a positive number of seconds")
    return int(given)


def leave(code: int) -> None:
    """End this process now. A process group is not torn down: that was seen to hang for minutes while DDP is alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch_time() -> float:
    """When the launcher was started: before any of the processes of this run."""
    import psutil

    try:
        return float(psutil.Process(os.getppid() or os.getpid()).create_time())
    except psutil.Error:
        return float(psutil.Process().create_time())


def _meaning(error: BaseException) -> BaseException:
    """The error, or what gloo's and NCCL's words for it mean: another process is gone, or does not answer."""
    text = str(error)
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return error
    if "Timed out waiting" in text or "timed out" in text:
        limit = f"it hangs, or is slower than {TIMEOUT} allows"
        return LlmtuneError(f"another process of this run did not answer for {timeout_s()} s: {limit}")
    return LlmtuneError(LOST) if "onnection" in text or "ncclRemoteError" in text else error
