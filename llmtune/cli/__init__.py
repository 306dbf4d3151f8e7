"""The command line: what can be typed, and how a command ends. A verb's module is imported when it is called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path

from llmtune import __version__
from llmtune.errors import INTERRUPTED_EXIT, LlmtuneError, UserError

EPILOG = """\
exit codes: 0 done; 1 failed; 2 the config, the data or a path is wrong; 3 gate FAIL; 4 gate INCONCLUSIVE; 75 stopped by
SIGTERM after a checkpoint; 130 Ctrl-C (the same command goes on from there)
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns its exit code."""
    arguments = _parser().parse_args(argv)
    if not getattr(arguments, "run", None):
        _parser().print_help()
        return 2
    _quiet()
    module, function = arguments.run.split(":")
    try:
        code = getattr(importlib.import_module(module), function)(arguments)
        return int(code or 0)
    except LlmtuneError as error:
        if arguments.debug:
            raise
        print(f"llmtune: {error}", file=sys.stderr)
        _leave_exit_note(error.exit_code, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print("llmtune: interrupted; the same command goes on from where it was", file=sys.stderr)
        return INTERRUPTED_EXIT
    except BrokenPipeError:  # the reader of our output has gone, as in `llmtune schema sft | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, OSError, RuntimeError) as error:
        if arguments.debug or not (message := _machine_failure(error)):
            raise
        print(f"llmtune: {message}", file=sys.stderr)
        _leave_exit_note(1, message)
        return 1


def _quiet() -> None:
    """No telemetry, and no chatter of libraries about themselves; set before any of them is imported."""
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torch's threads spin while they wait; on a machine that others keep busy that costs a factor of five (docs/log.md)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 4:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # TRL 1.16 still reads names that transformers 5.23 deprecates; bitsandbytes tells of an optional package at import
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
    for talkative in ("bitsandbytes", "lm_eval", "accelerate"):
        logging.getLogger(talkative).setLevel(logging.ERROR)


def _machine_failure(error: BaseException) -> str | None:
    """A sentence for what the machine, not the code, ran out of."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; lower micro_batch_size or max_length, or set train.activation_checkpointing to true"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the machine'}: {error.strerror}"
    return None


def _leave_exit_note(code: int, message: str) -> None:
    """Under a launcher, which swallows a child's exit code, the first failing rank leaves `exit.json` where it was asked to."""
    folder = os.environ.get("LLMTUNE_EXIT_FOLDER")
    if folder:
        with contextlib.suppress(OSError), Path(folder, "exit.json").open("x", encoding="utf-8") as stream:
            json.dump({"code": code, "message": message, "rank": int(os.environ.get("RANK", "0"))}, stream)


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

    def verb(name: str, run: str, text: str, parent: object = verbs) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text, allow_abbrev=False)  # type: ignore[attr-defined]
        made.set_defaults(run=run)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    def run_file(made: argparse.ArgumentParser) -> None:
        made.add_argument("config", type=Path, metavar="CONFIG", help="a run file (YAML)")
        made.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file"
        )

    quickstart = verb(
        "quickstart", "llmtune.cli.project:quickstart", "the main job end to end on a small real model, on a laptop CPU"
    )
    quickstart.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="default: runs/quickstart"
    )
    quickstart.add_argument("--smoke", action="store_true", help="a few steps and items, to see that everything works")
    quickstart.add_argument(
        "--no-replay", action="store_true", help="leave out the replayed general answers, for contrast"
    )

    init = verb("init", "llmtune.cli.project:init", "write a commented run file to start from")
    init.add_argument("stage", metavar="STAGE", help="sft or eval")
    init.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="DIR", help="default: here")

    data = verbs.add_parser("data", help="look at rows before anything is trained")
    check = verb(
        "check",
        "llmtune.cli.tune:data_check",
        "read and encode every row; name every bad one",
        data.add_subparsers(metavar="COMMAND", required=True),
    )
    run_file(check)
    check.add_argument("--json", action="store_true", help="print the counts as JSON")

    run_file(verb("sft", "llmtune.cli.tune:sft", "fine-tune on chats: LoRA, any other PEFT method, or the whole model"))

    evaluate = verb("eval", "llmtune.cli.judge:evaluate", "base and tuned on the same items, in one process")
    run_file(evaluate)

    gate = verb("gate", "llmtune.cli.judge:gate", "PASS, FAIL or INCONCLUSIVE, from scores and margins")
    gate.add_argument("scores", type=Path, metavar="SCORES", help="the scores folder of a run, or the run")
    gate.add_argument(
        "--margin", action="append", default=[], metavar="SUITE.METRIC=X", help="another margin than the suite's"
    )
    gate.add_argument("--json", action="store_true", help="print the verdict as JSON")

    merge = verb("merge", "llmtune.cli.deploy:merge", "the adapter into its base, with proof that nothing changed")
    merge.add_argument("run_folder", type=Path, metavar="RUN", help="the folder that holds adapter/")
    merge.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="of the stored weights; auto: what the base ran in when it was tuned",
    )

    chat = verb("chat", "llmtune.cli.deploy:chat", "talk to the tuned model, side by side with its base")
    chat.add_argument("run_folder", type=Path, metavar="RUN", help="the folder that holds adapter/ or merged/")
    chat.add_argument(
        "--arm",
        choices=["both", "base", "tuned", "merged"],
        default="both",
        help="who answers; default: base and tuned",
    )
    chat.add_argument(
        "--instruction", metavar="TEXT", help="put before every message, as in the rows the run was trained on"
    )
    chat.add_argument("--file", type=Path, metavar="FILE", help="ask about this file's text once, and end")
    chat.add_argument("--max-new-tokens", type=int, default=256, metavar="N")

    report = verb(
        "report",
        "llmtune.cli.judge:report",
        "one HTML page of a run: verdict, before and after, curves, costs, provenance",
    )
    report.add_argument("run_folder", type=Path, metavar="RUN")

    schema = verb("schema", "llmtune.cli.project:schema", "the JSON Schema of a run file, for editors")
    schema.add_argument("stage", metavar="STAGE", help="sft, eval or suite")
    verb("doctor", "llmtune.cli.project:doctor", "what this machine can do").add_argument("--json", action="store_true")
    return parser


__all__ = ["UserError", "main"]
