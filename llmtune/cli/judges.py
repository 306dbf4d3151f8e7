"""`llmtune judge validate` and `llmtune judge again`: how often a judge is right, and what another one says of the same answers."""

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
    earlier = _judged_by(file)
    judge = _judge(arguments.judge)
    if earlier not in (None, judge.id):
        raise ConfigError("--output", f"{file} is the card of another judge, {earlier}; name another file")
    card = validation.validate(judge, labelled.load(arguments.set, arguments.data))
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    with artifact.out_of_space_explained(file):
        artifact.write_atomically(file, text)
    sys.stdout.write(text if arguments.json else validation.render(card) + "\n")
    say(f"the card is in {file}; name it as 'card' where the judge is named")
    return 0


def again(arguments: argparse.Namespace) -> int:
    """Stored answers by another judge, as new scores."""
    from llmtune.evaluate import rejudge

    settings = _settings(arguments.judge)
    artifact.require_no_run(arguments.output, "--output")
    folder = artifact.scores_folder(arguments.scores)
    made, changes = rejudge.again(folder, settings, arguments.output / "scores", arguments.judge)
    told = json.dumps(rejudge.as_json(made, changes), indent=1) if arguments.json else rejudge.render(made, changes)
    sys.stdout.write(told + "\n")
    say(f"\nnext: llmtune gate {arguments.output}")
    return 0


def _judge(given: str) -> Any:
    from llmtune.evaluate import judges

    return judges.load(_settings(given).model_copy(update={"card": None}), given)  # an earlier card says nothing here


def _settings(given: str) -> JudgeConfig:
    """From a file with the keys of a `judge` section, or from a kind that needs no more."""
    from llmtune.evaluate import judges

    named = given.endswith((".yaml", ".yml"))
    if not named:
        judges.judge_class(given)
    return config.validate(JudgeConfig, config.read_yaml(Path(given)) if named else {"kind": given}, given)


def _judged_by(file: Path) -> str | None:
    """The judge whose card `file` is; None where there is no such file. Raises ConfigError when it is something else."""
    if not file.exists():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["judge"]["id"])
    except (ValueError, TypeError, KeyError, OSError):
        raise ConfigError("--output", f"{file} exists and is no card of a judge; name another file") from None
