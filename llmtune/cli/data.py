"""`llmtune data check` and `llmtune data preview`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from llmtune import config
from llmtune.errors import ConfigError, DataError
from llmtune.progress import say

if TYPE_CHECKING:
    from llmtune.config.sft import SftConfig

VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters of a row would move the terminal's cursor; they are shown as pictures of themselves."""


def check(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config, arguments.overrides, "sft")
    from llmtune.data.chats import load_chats
    from llmtune.data.tokens import Counts, encode_chats

    tokenizer = _tokenizer(settings)
    table: dict[str, dict[str, Any]] = {}
    for split in ("train", "validation"):
        sources = getattr(settings.data, split)
        if sources is None:
            continue
        counts, data = Counts(), settings.data
        chats = load_chats(sources, data.format, data.columns, training=True)
        for _ in encode_chats(chats, tokenizer, data.max_length, data.overlong, counts, data.train_on):
            pass
        share = counts.supervised_tokens / counts.tokens
        table[split] = {**counts.facts(), "supervised_share": round(share, 4)}
    if arguments.json:
        print(json.dumps(table, indent=1))
        return 0
    for split, facts in table.items():
        print(split)
        for name, value in facts.items():
            shown = f"{value:.1%}" if isinstance(value, float) else f"{value:,}"
            print(f"  {name.replace('_', ' '):<20}{shown:>12}")
    return 0


def preview(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config, arguments.overrides, "sft")
    sources, data = getattr(settings.data, arguments.split), settings.data
    if sources is None:
        raise ConfigError(arguments.config, f"data.{arguments.split}: is not set, so there is nothing to show")
    from llmtune.data.chats import load_chats
    from llmtune.data.preview import preview as look

    tokenizer = _tokenizer(settings)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    say(f"  what carries loss is {'in colour' if coloured else 'between ⟦ and ⟧'}; the rest is only read")
    chats = load_chats(sources, data.format, data.columns, training=True)
    for chat in itertools.islice(chats, arguments.rows):
        try:
            whole = look(tokenizer, chat, data.train_on, None)
        except ValueError as error:
            raise DataError(chat.row.place, str(error)) from None
        found, fate = whole, ""
        if whole.tokens > data.max_length:
            fate = f", longer than data.max_length ({data.max_length}): {_FATE[data.overlong]}"
            if data.overlong == "truncate":
                found = look(tokenizer, chat, data.train_on, data.max_length)
        _show(f"{chat.row.place}: {whole.tokens} tokens, {found.supervised} supervised{fate}", found.pieces, coloured)
    return 0


_FATE = {"error": "an error in training", "drop": "left out of training", "truncate": "the end is cut off, as here"}


def _show(title: str, pieces: list[tuple[str, float]], coloured: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    shown = Text()
    for text, weight in pieces:
        visible = text.translate(VISIBLE)
        factor = "" if weight in (0, 1) else f"×{weight:g}"
        if coloured:
            shown.append(visible, "black on green" if weight else "")
            shown.append(factor, "bold magenta")
        else:
            shown.append(f"⟦{visible}⟧{factor}" if weight else visible)
    console = Console(file=sys.stdout, no_color=not coloured, highlight=False, soft_wrap=True)
    console.print(Text(title, "bold" if coloured else ""))
    console.print(shown)
    console.print()


def _tokenizer(settings: SftConfig) -> Any:
    from llmtune.model import load

    base = load.find(settings.model.name, trust_remote_code=settings.model.trust_remote_code)
    return load.load_tokenizer(base, trust_remote_code=settings.model.trust_remote_code)
