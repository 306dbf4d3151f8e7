"""`llmtune judge validate`: how often a judge is right, by labels that people gave."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llmtune import artifact, config
from llmtune.config.judges import JudgeConfig
from llmtune.errors import ConfigError
from llmtune.progress import say


def validate(arguments: argparse.Namespace) -> int:
    from llmtune.evaluate.judges import labelled
    from llmtune.evaluate.judges import validate as validation

    file = arguments.output
    if file.exists() and not _is_card(file):
        raise ConfigError("--output", f"{file} exists and is no card of a judge; name another file")
    judge = _judge(arguments.judge)
    card = validation.validate(judge, labelled.load(arguments.set, arguments.data))
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    with artifact.out_of_space_explained(file):
        artifact.write_atomically(file, text)
    sys.stdout.write(text if arguments.json else validation.render(card) + "\n")
    say(f"the card is in {file}; name it as 'card' where the judge is named")
    return 0


def _judge(given: str) -> Any:
    """From a file with the keys of a `judge` section, or from a kind that needs no more."""
    from llmtune.evaluate import judges

    named = given.endswith((".yaml", ".yml"))
    if not named:
        judges.judge_class(given)
    raw = config.read_yaml(Path(given)) if named else {"kind": given}
    if isinstance(raw, dict):
        raw.pop("card", None)  # an earlier card says nothing here
    settings = config.validate(JudgeConfig, raw, given)
    return judges.load(settings, given)


def _is_card(file: Path) -> bool:
    try:
        return "judge" in json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, OSError):
        return False
