"""What a user sees while waiting: a live bar on a terminal, plain lines in a log. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from llmtune import ranks

PLAIN_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for the user; of several processes the first speaks for all."""
    if ranks.rank() > 0:
        return
    print(text, file=sys.stderr, flush=True)


class Progress:
    """`with Progress("base: answers", 48) as bar: bar.advance(16)`; the note is shown as it stands.

    In a log it prints a line at most every PLAIN_EVERY_S seconds and one at the end, so that a log stays readable.
    done: steps of an earlier process, which say nothing about the speed of this one.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done, self.note = title, total, done, ""
        self._before = done
        self._began = self._printed = time.monotonic()
        self._rich: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and ranks.rank() == 0:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._rich = RichProgress(
                TextColumn("  {task.description:<34}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._rich.start()
            self._task = self._rich.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + steps, note
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S and self.done < self.total:
            self._line()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif kind is None:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        seconds, done = self._printed - self._began, self.done - self._before
        left = f", {_clock(seconds / done * (self.total - self.done))} left" if done and self.done < self.total else ""
        say(f"  {self.title}: {self.done}/{self.total}, {_clock(seconds)}{left}{'  ' + self.note if self.note else ''}")


def _clock(seconds: float) -> str:
    """`42 s`, `3:05 min`, `2:07 h`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 7200 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"
