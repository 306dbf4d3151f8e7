"""`llmtune eval`, `llmtune compare`, `llmtune gate` and `llmtune report`: measure, decide, show."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from llmtune import artifact, config, ranks
from llmtune.cli import launch
from llmtune.errors import VERDICT_EXIT, ArtifactError, ConfigError
from llmtune.interruption import Interruption
from llmtune.progress import say


def evaluate(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config, arguments.overrides, "eval")
    output = Path(settings.output_dir or settings.run)
    if arguments.processes and arguments.processes > 1:
        words = ["eval", str(arguments.config), *arguments.overrides]
        return launch.run(arguments.processes, words + ["--debug"] * arguments.debug, output)
    _measure(settings, arguments.config, output)
    if ranks.rank() == 0:
        say(f"\nnext: llmtune gate {output}")
        print(output / "scores")
    return 0


def _measure(settings: Any, place: Path, output: Path) -> None:
    with ranks.telling(output), Interruption("stopped; the same command goes on with the batch it was at"):
        from llmtune.evaluate import arms

        arms.run(settings, place)


def compare(arguments: argparse.Namespace) -> int:
    """Any two models: measure, decide, and leave the run file that does it again."""
    files = _files(arguments)
    output = arguments.output.resolve()
    first, second = (str(Path(name).resolve()) if Path(name).exists() else name for name in arguments.models)
    suites = [str(Path(name).resolve()) if Path(name).is_file() else name for name in arguments.suites.split(",")]
    raw = {"stage": "eval", "base": first, "tuned": second, "output_dir": str(output), "suites": suites}
    file = output / "compare.yaml"
    _require_own(output, file, (first, second))
    output.mkdir(parents=True, exist_ok=True)
    text = "# llmtune compare: what was compared, to run again with 'llmtune eval'\n"
    artifact.write_atomically(file, text + yaml.safe_dump(raw, sort_keys=False))
    settings = config.load(file, arguments.overrides, "eval")
    whole = settings.model_dump(mode="json", exclude_unset=True)  # with what the command line said
    artifact.write_atomically(file, text + yaml.safe_dump(whole, sort_keys=False))
    if arguments.processes and arguments.processes > 1:
        if code := launch.run(arguments.processes, ["eval", str(file)], output):
            return code
    else:
        _measure(settings, file, output)
    return _decided(output / "scores", {}, files, as_json=arguments.json)


def _require_own(output: Path, file: Path, models: tuple[str, str]) -> None:
    """Raises ArtifactError where a comparison of these models would replace another, or mix with what it does not know."""
    if output.exists() and not output.is_dir():
        raise ArtifactError(f"{output}: is a file; choose another --output")
    artifact.require_no_run(output, "--output")
    if not file.is_file() and output.exists() and any(output.iterdir()):
        raise ArtifactError(f"{output}: holds other files, and no {file.name}; choose another --output")
    if file.is_file() and (output / "scores").exists():
        old = config.read_yaml(file)
        if (earlier := (old["base"], old["tuned"])) != models:
            raise ArtifactError(f"{output}: compares {' with '.join(earlier)} already; choose another --output")


def gate(arguments: argparse.Namespace) -> int:
    files = _files(arguments)
    folder = artifact.scores_folder(arguments.scores)
    return _decided(folder, _margins(arguments.margin), files, as_json=arguments.json)


def _decided(folder: Path, margins: dict[str, float], files: dict[str, Path], *, as_json: bool) -> int:
    from llmtune import gate as gates
    from llmtune import verdict as verdicts

    made = gates.run(folder, margins=margins)
    verdict = gates.read(made)
    say(f"the verdict is in {made.path}")
    renderings = {"junit": verdicts.render_junit, "markdown": verdicts.render_markdown}
    for name, file in files.items():
        artifact.write_atomically(file, renderings[name](verdict))
    stored = made.path / verdicts.FILE
    text = stored.read_text(encoding="utf-8") if as_json else verdicts.render_text(verdict)
    sys.stdout.write(text + "\n")
    return VERDICT_EXIT[verdict.verdict]


def report(arguments: argparse.Namespace) -> int:
    from llmtune import report as reports

    made = reports.build(arguments.run_folder)
    print(made.path / "report.html")
    return 0


def _files(arguments: argparse.Namespace) -> dict[str, Path]:
    """What else is to be written. Refuses, before anything is measured, what could not be or would spoil a finished step.

    A file of an earlier call is removed: after a refusal it would speak for a run that it never saw.
    """
    files = {name: file for name in ("junit", "markdown") if (file := getattr(arguments, name))}
    for name, file in files.items():
        if file.is_dir() or not file.parent.is_dir():
            why = "is a folder" if file.is_dir() else "lies in no folder that exists"
            raise ConfigError(f"--{name}", f"{file}: {why}")
        if file.exists() and not _ours(name, file):
            raise ConfigError(f"--{name}", f"{file}: exists and was not written by llmtune gate; name another file")
        if spoiled := next((folder for folder in file.resolve().parents if artifact.complete(folder)), None):
            raise ConfigError(f"--{name}", f"{file}: would change the finished step {spoiled}; write it elsewhere")
    for file in files.values():
        file.unlink(missing_ok=True)
    return files


def _ours(name: str, file: Path) -> bool:
    """Whether a file may be replaced: it begins as the renderings of a verdict do, or is empty."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        head = stream.read(200).decode("utf-8", "replace")
    return not head or (
        head.startswith("## llmtune gate") if name == "markdown" else '<testsuites name="llmtune gate"' in head
    )


def _margins(given: list[str]) -> dict[str, float]:
    margins = {}
    for entry in given:
        name, _, value = entry.partition("=")
        try:
            margins[name] = float(value)
        except ValueError:
            raise ConfigError("--margin", f"{entry!r} is not SUITE.METRIC=NUMBER, such as general.loss=0.1") from None
    return margins
