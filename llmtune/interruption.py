"""SIGTERM and Ctrl-C: a command ends at once where nothing is lost by that, and training at its next safe instant.

SIGUSR1 and SIGUSR2, which batch systems send ahead of time on request, count as SIGTERM. A signal that was ignored when the
command started (nohup, a job in the background) stays ignored. A second signal ends the command whatever it is doing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from llmtune.errors import INTERRUPTED_EXIT, Preempted, Stopped
from llmtune.progress import say

SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if name in dir(signal)]


class Interruption:
    """`with Interruption() as stop:` leaves its block at once on a signal: by Preempted, or by KeyboardInterrupt after Ctrl-C.

    said: what the user is told of what is there to go on from.
    """

    def __init__(
        self, said: str = "stopped; there was nothing new to save, and the same command starts from where it did"
    ) -> None:
        self.said = said
        self.received: int | None = None
        self._gently = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in taken}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if isinstance(error, Stopped):
            ctrl_c = error.exit_code == INTERRUPTED_EXIT
            if ctrl_c:
                say(f"  {error}")
            ended = KeyboardInterrupt() if ctrl_c else Preempted(str(error))
            ended.__dict__.update({key: value for key, value in vars(error).items() if key == "told"})
            raise ended from None

    @contextlib.contextmanager
    def gently(self) -> Iterator[None]:
        """In this block a signal is only noted in `received`, and the block calls `check` where it is ready to end."""
        self._gently = True
        try:
            yield
        finally:
            self._gently = False
        self.check()

    def check(self) -> None:
        """Raise Stopped after a signal."""
        if self.received is not None:
            raise Stopped(self.said, INTERRUPTED_EXIT if self.received == signal.SIGINT else Preempted.exit_code)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if not self._gently:
            self.check()
        with contextlib.suppress(RuntimeError):  # the signal may have come in the middle of a line being printed
            say("  stopping after this micro batch, with a checkpoint (once more to stop at once)")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
