"""The command line: what can be typed, and how a command ends. A verb's module is imported when it is called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from llmtune import __version__, notes, ranks
from llmtune.errors import LlmtuneError, ending

EPILOG = """\
exit codes: 0 done; 1 failed; 2 the config, the data or a path is wrong; 3 gate FAIL; 4 gate INCONCLUSIVE; 75 stopped by
SIGTERM after a checkpoint; 130 Ctrl-C (the same command goes on from there)
"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(number) for number in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns its exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word[0] == "-" or "=" not in word for word in rest)):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]  # argparse takes none that stand behind an option
    if not getattr(arguments, "run", None):
        _parser().print_help()
        return 2
    _quiet()
    module, function = arguments.run.split(":")
    if function in COMPUTING:
        _share_processors()
    if ranks.world_size() == 1:
        return _run(f"{module}:{function}", arguments)
    try:
        code = _run(f"{module}:{function}", arguments)
    except BaseException:  # nothing may leave by another door: Python's own way out hangs while processes are connected
        traceback.print_exc()
        code = 1
    ranks.leave(code)
    return code


def _run(target: str, arguments: argparse.Namespace) -> int:
    module, function = target.split(":")
    try:
        code = getattr(importlib.import_module(module), function)(arguments)
        return int(code or 0)
    except ranks.ToldElsewhere as told:
        return told.code
    except BrokenPipeError:  # the reader of our output has gone, as in `llmtune schema sft | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LlmtuneError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        known = ending(error)
        if arguments.debug or known is None:
            raise
        code, message = known
        if ranks.rank() == 0 or getattr(error, "told", False):
            print(f"llmtune: {message}", file=sys.stderr)
        return code


def _quiet() -> None:
    """No telemetry, and what libraries say as notes of ours; set before any of them is imported."""
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if ranks.world_size() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice on what it cannot know
    notes.listen()


def _share_processors() -> None:
    """Have torch's threads sleep while they wait, where another process keeps a processor busy at this moment.

    They spin otherwise, which is faster alone (by a third) and slower beside others (up to five times, docs/log.md). The load
    average would not do: it still counts the command that ended before this one. Linux only.
    """
    readings = []
    for _ in range(10):
        with contextlib.suppress(OSError, ValueError):
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0]
            readings.append(int(running) - 1)  # this process is one of them
        time.sleep(0.01)
    if readings and sum(readings) > 0.5 * len(readings):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _argument(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


CONFIG = _argument("config", type=Path, metavar="CONFIG", help="a run file (YAML)")
OVERRIDES = _argument(
    "overrides", nargs="*", metavar="key.sub=value", default=[], help="settings that replace those of the file"
)
PROCESSES = _argument(
    "--processes", type=_positive, metavar="N", help="in N processes on this machine: one a GPU, or on the CPU"
)
COMPUTING = {"quickstart", "sft", "verify", "evaluate", "compare", "merge", "chat", "validate", "again"}
RUN = _argument("run_folder", type=Path, metavar="RUN", help="the folder that holds adapter/")
JSON = _argument("--json", action="store_true", help="print the result as JSON")
FILES = [
    _argument("--junit", type=Path, metavar="FILE", help="also write the verdict as JUnit XML, for a CI"),
    _argument("--markdown", type=Path, metavar="FILE", help="also write it as Markdown, for a pull request"),
]

GROUPS = {
    "data": "look at rows before anything is trained",
    "judge": "measure who judges answers, or let another one judge them",
}

VERBS: dict[str, tuple[str, str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "quickstart": (
        "project:quickstart",
        "the main job end to end on a small real model, on a laptop CPU",
        [
            _argument(
                "--output", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="default: runs/quickstart"
            ),
            _argument("--smoke", action="store_true", help="a few steps and items, to see that everything works"),
            _argument("--no-replay", action="store_true", help="leave out the base's own answers, for contrast"),
        ],
    ),
    "init": (
        "project:init",
        "write a commented run file to start from",
        [
            _argument("stage", metavar="STAGE", help="sft or eval"),
            _argument("folder", type=Path, nargs="?", default=Path(), metavar="DIR", help="default: here"),
        ],
    ),
    "data check": ("data:check", "read and encode every row, and name the bad ones", [CONFIG, OVERRIDES, JSON]),
    "data preview": (
        "data:preview",
        "show rows as the model reads them, with what carries loss marked",
        [
            CONFIG,
            OVERRIDES,
            _argument("--rows", type=_positive, default=3, metavar="N", help="how many, from the first; default: 3"),
            _argument("--split", choices=["train", "validation"], default="train", help="default: train"),
        ],
    ),
    "sft": (
        "tune:sft",
        "fine-tune on chats: LoRA, any other PEFT method, or the whole model",
        [
            CONFIG,
            OVERRIDES,
            PROCESSES,
            _argument(
                "--seeds",
                type=_positive,
                metavar="N",
                help="repeat the run with N seeds from train.seed on, and report the spread",
            ),
            _argument("--json", action="store_true", help="with --seeds: print the spread as JSON"),
            _argument(
                "--other-versions",
                action="store_true",
                help="go on with an interrupted run although libraries changed since: its numbers may be others",
            ),
        ],
    ),
    "plan": (
        "plan:plan",
        "no training: tokens, steps, memory by component, time where it was measured, and what would fit",
        [
            _argument("config", type=Path, nargs="?", metavar="CONFIG", help="a run file (YAML)"),
            OVERRIDES,
            _argument(
                "--model", metavar="MODEL", help="instead of a run file: a table of strategies for this model's config"
            ),
            _argument("--gpus", type=_numbers, default=[1, 8, 64], metavar="1,8,64", help="with --model"),
            _argument(
                "--gpu-memory-gb",
                type=_positive,
                default=80,
                metavar="GB",
                help="of one GPU, with --model; default: 80",
            ),
            _argument("--micro-batch-size", type=_positive, default=1, metavar="ROWS", help="with --model; default: 1"),
            _argument("--length", type=_positive, default=2048, metavar="TOKENS", help="with --model; default: 2048"),
            JSON,
        ],
    ),
    "verify-resume": (
        "resume:verify",
        "kill the first steps of a run, resume them, and compare with the same steps uninterrupted, to the bit",
        [
            CONFIG,
            OVERRIDES,
            _argument("--steps", type=_positive, default=6, metavar="N", help="how many steps; default: 6"),
        ],
    ),
    "eval": ("judge:evaluate", "base and tuned on the same items", [CONFIG, OVERRIDES, PROCESSES]),
    "compare": (
        "judge:compare",
        "any two models on the same items, and the verdict: may the second replace the first?",
        [
            _argument(
                "models",
                nargs=2,
                metavar="MODEL",
                help="a run, an adapter, a folder, ./file.gguf, org/name@revision, package:PKG/file.gguf, or http://host:port/v1#model",
            ),
            OVERRIDES,
            _argument("--suites", required=True, metavar="A,B", help="names of shipped suites, or paths of your own"),
            _argument(
                "--output", type=Path, required=True, metavar="DIR", help="for compare.yaml, scores/ and verdict/"
            ),
            PROCESSES,
            *FILES,
            JSON,
        ],
    ),
    "gate": (
        "judge:gate",
        "PASS, FAIL or INCONCLUSIVE, from scores and margins",
        [
            _argument("scores", type=Path, metavar="SCORES", help="the scores folder of a run, or the run"),
            _argument(
                "--margin",
                action="append",
                default=[],
                metavar="SUITE.METRIC=X",
                help="another margin than the suite's",
            ),
            *FILES,
            JSON,
        ],
    ),
    "judge validate": (
        "judges:validate",
        "measure a judge against labels that people gave, and write its card",
        [
            _argument(
                "--judge",
                default="refusal_pattern",
                metavar="FILE.yaml",
                help="the keys of a 'judge' section, or a kind that needs none; default: refusal_pattern",
            ),
            _argument(
                "--set",
                required=True,
                metavar="SET",
                help="xstest_human or jbb_artifacts, or a .jsonl file with prompt, response, label and source",
            ),
            _argument("--data", type=Path, metavar="DIR", help="a copy of what the set is published in"),
            _argument(
                "--output",
                type=Path,
                default=Path("judge_card.json"),
                metavar="FILE",
                help="where the card goes; default: judge_card.json",
            ),
            JSON,
        ],
    ),
    "judge again": (
        "judges:again",
        "let another judge judge the stored answers of an evaluation; no model runs but the judge's own",
        [
            _argument("scores", type=Path, metavar="SCORES", help="the scores folder of a run, or the run"),
            _argument(
                "--judge",
                required=True,
                metavar="FILE.yaml",
                help="the keys of a 'judge' section, or a kind that needs none",
            ),
            _argument("--output", type=Path, required=True, metavar="DIR", help="for the new scores/; DIR is made"),
            JSON,
        ],
    ),
    "audit": (
        "audit:audit",
        "look at the answers whose outcome flipped, and say what they are; how often the judge agrees with you",
        [
            _argument("run_folder", type=Path, metavar="RUN", help="the folder that holds scores/, or the scores"),
            _argument("--all", action="store_true", help="also every item that did not flip"),
            _argument(
                "--sample", type=_positive, metavar="N", help="also N items that did not flip, drawn by a fixed seed"
            ),
            _argument("--by", metavar="NAME", help="whose verdicts these are; default: the user's name"),
            JSON,
        ],
    ),
    "merge": (
        "deploy:merge",
        "the adapter into its base, with proof that nothing changed",
        [
            RUN,
            _argument(
                "--dtype",
                choices=["auto", "bfloat16", "float32"],
                default="auto",
                help="of the stored weights; auto: what the base ran in when it was tuned",
            ),
        ],
    ),
    "chat": (
        "deploy:chat",
        "talk to the tuned model, side by side with its base",
        [
            RUN,
            _argument(
                "--arm",
                choices=["both", "base", "tuned", "merged"],
                default="both",
                help="who answers; default: base and tuned",
            ),
            _argument(
                "--instruction", metavar="TEXT", help="put before every message, as in the rows the run was trained on"
            ),
            _argument("--file", type=Path, metavar="FILE", help="ask about this file's text once, and end"),
            _argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="default: 256"),
        ],
    ),
    "report": ("judge:report", "one HTML page of a run: verdict, before and after, curves, costs, provenance", [RUN]),
    "runs": (
        "runs:runs",
        "list the runs in a folder, or two of them side by side",
        [
            _argument(
                "folders",
                nargs="*",
                metavar="DIR | diff A B",
                default=[],
                help="a folder of runs (default: runs), or 'diff' and two runs",
            ),
            JSON,
        ],
    ),
    "schema": (
        "project:schema",
        "the JSON Schema of a run file, for editors",
        [_argument("stage", metavar="STAGE", help="sft, eval or suite")],
    ),
    "doctor": ("project:doctor", "what this machine can do", [JSON]),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmtune",
        description="Tune a language model and prove that the result is better before anyone ships it.",
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llmtune {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    groups: dict[str, Any] = {}
    for name, (function, text, arguments) in VERBS.items():
        group, _, leaf = name.rpartition(" ")
        if group and group not in groups:
            about = verbs.add_parser(group, help=GROUPS[group], allow_abbrev=False)
            groups[group] = about.add_subparsers(metavar="COMMAND", required=True)
        made = groups.get(group, verbs).add_parser(leaf, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=f"llmtune.cli.{function}")
        for names, settings in arguments:
            made.add_argument(*names, **settings)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
