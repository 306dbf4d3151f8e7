"""`llmtune eval`, `llmtune gate` and `llmtune report`: measure, decide, show."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmtune import config
from llmtune.errors import VERDICT_EXIT, ArtifactError, ConfigError
from llmtune.progress import say


def evaluate(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config, arguments.overrides, "eval")
    from llmtune.evaluate import arms

    made = arms.run(settings, arguments.config)
    say(f"\nnext: llmtune gate {made.path}")
    print(made.path)
    return 0


def gate(arguments: argparse.Namespace) -> int:
    from llmtune import gate as gates

    folder = arguments.scores / "scores" if (arguments.scores / "scores").is_dir() else arguments.scores
    if folder == arguments.scores and any((folder / step).is_dir() for step in ("adapter", "model")):
        raise ArtifactError(f"{folder}: holds no scores; 'llmtune eval' makes them")
    made = gates.run(folder, margins=_margins(arguments.margin))
    verdict = gates.read(made)
    sys.stdout.write(
        (made.path / "verdict.json").read_text(encoding="utf-8") + "\n"
        if arguments.json
        else gates.render_text(verdict) + "\n"
    )
    return VERDICT_EXIT[verdict.verdict]


def report(arguments: argparse.Namespace) -> int:
    from llmtune import report as reports

    made = reports.build(arguments.run_folder)
    print(made.path / "report.html")
    return 0


def _margins(given: list[str]) -> dict[str, float]:
    margins = {}
    for entry in given:
        name, _, value = entry.partition("=")
        try:
            margins[name] = float(value)
        except ValueError:
            raise ConfigError("--margin", f"{entry!r} is not SUITE.METRIC=NUMBER, such as general.loss=0.1") from None
    return margins


__all__ = ["Path", "evaluate", "gate", "report"]
