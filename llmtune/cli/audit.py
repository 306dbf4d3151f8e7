"""`llmtune audit`: prompt and answers on the screen, one key an answer, and every verdict on the disk at once."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import select
import sys
import unicodedata
from typing import Any

from llmtune import artifact
from llmtune.errors import UserError
from llmtune.progress import say

KEYS = {"r": "refused", "p": "partial", "c": "complied", "i": "incoherent"}
SKIP, BACK, QUIT = "s", "b", "q"
HELP = "  ".join(f"[{key}] {word}" for key, word in {**KEYS, SKIP: "skip", BACK: "back", QUIT: "quit"}.items())


def audit(arguments: argparse.Namespace) -> int:
    from llmtune import audit as audits

    if arguments.all and arguments.sample is not None:
        raise UserError("audit: --all takes every item, so --sample has no effect; leave out one of them")
    folder = artifact.scores_folder(arguments.run_folder)
    found = audits.load(folder)
    log, by = audits.Log(folder.resolve().parent / audits.FILE, found.sha256), arguments.by or _user()
    asked = found.questions(None if arguments.all else arguments.sample or 0)
    pending = [question for question in asked if not log.answered(question.pair, question.arms, by)]
    say(f"{len(asked)} answers to look at, {len(asked) - len(pending)} of them done by {by}; verdicts go to {log.file}")
    _walk(pending, log, by)
    told = audits.summary(found, log)
    sys.stdout.write((json.dumps(told, indent=1) if arguments.json else audits.render(told)) + "\n")
    return 0


def _walk(pending: list[Any], log: Any, by: str) -> None:
    """Ask about one answer after another, until the last, `quit` or the end of the input."""
    at, shown = 0, None
    while at < len(pending):
        question = pending[at]
        key = "" if shown == question.pair else _show(question.pair, f"{at + 1} of {len(pending)}")
        if key == SKIP:  # nothing of this pair was wanted on the screen
            at += sum(other.pair == question.pair for other in pending[at:])
            continue
        shown = question.pair
        number = list(shown.answers).index(question.text) + 1
        key = key or _key(f"answer {number} is   {HELP}  ", {*KEYS, SKIP, BACK, QUIT})
        if key == QUIT:
            return
        if key == BACK:
            at, shown = max(0, at - 1), shown if at and pending[at - 1].pair == shown else None
            continue
        if key in KEYS:
            log.add(question, KEYS[key], by)
        at += 1
        if at == len(pending) or pending[at].pair != shown:
            _reveal(shown, log, by)


def _show(pair: Any, place: str) -> str:
    """Prompt and answers; harmful text only after a key. Returns that key where it was one that needs no text, else nothing."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.rule(Text(visible(f"{place}, {pair.suite}: {pair.item_id}")))
    if pair.hidden:
        key = _key(f"this text may be harmful: any key shows it  [{SKIP}] skip  [{BACK}] back  [{QUIT}] quit  ", None)
        if key in (SKIP, BACK, QUIT):
            return key
    console.print(Panel(Text(visible(pair.prompt)), title="prompt", title_align="left"))
    for number, text in enumerate(pair.answers, 1):
        begun = Text(visible(pair.prefill), style="dim")
        title = (f"answer {number}" if len(pair.answers) > 1 else "answer 1, the same of both models") + (
            ", behind the words it was made to begin with" if pair.prefill else ""
        )
        console.print(Panel(begun + Text(visible(text) or "(empty)"), title=title, title_align="left"))
    return ""


def _reveal(pair: Any, log: Any, by: str) -> None:
    """What the judge had said, once this person's verdicts on both answers are given."""
    if log.answered(pair, pair.texts, by):
        last = log.last()
        for arm, outcome in pair.outcomes.items():
            say(f"  {arm}: {last[pair.suite, pair.item_id, arm]}; the judge said {outcome}")


HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str) -> str:
    """The text with everything spelled out that a terminal would obey or a reader would not see."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in HIDDEN and letter not in "\n\t"
        else letter
        for letter in text
    )


def _key(prompt: str, known: set[str] | None) -> str:
    """The next key that means something (any, with None): one press on a terminal, else the first letter of a line."""
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        key = _pressed() if sys.stdin.isatty() else (sys.stdin.readline() or QUIT)[:1]
        print(visible(key.strip()), file=sys.stderr, flush=True)
        if known is None or key in known:
            return key


def _pressed() -> str:
    """One key of a terminal; the letters behind an escape, as of an arrow, are no keys of their own."""
    try:
        import termios
        import tty
    except ImportError:  # no such terminals on Windows
        return (sys.stdin.readline() or QUIT)[:1]
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSAFLUSH)  # what was typed before the question was no answer to it
        key = os.read(terminal, 1).decode("latin-1") or QUIT
        if key == "\x1b":
            while select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 1)
        return QUIT if key == "\x04" else key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _user() -> str:
    with contextlib.suppress(KeyError, OSError, ImportError):
        return getpass.getuser()
    raise UserError("audit: this machine does not know who you are; say it with --by NAME")
