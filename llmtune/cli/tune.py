"""`llmtune sft`."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmtune import config, ranks
from llmtune.config import peft_methods
from llmtune.config.train import require_divisible
from llmtune.errors import ConfigError
from llmtune.interruption import Interruption
from llmtune.progress import say


def sft(arguments: argparse.Namespace) -> int:
    settings = config.load(arguments.config, arguments.overrides, "sft")
    output = Path(settings.output_dir)
    if arguments.seeds:
        from llmtune.cli import seeds

        return seeds.run(settings, arguments)
    if arguments.json:
        raise ConfigError("command line", "--json goes with --seeds; of one run the folder is printed")
    if arguments.processes and arguments.processes > 1:
        require_divisible(settings.train, arguments.processes, arguments.config)
        from llmtune.cli import launch

        words = ["sft", str(arguments.config), *arguments.overrides]
        words += ["--other-versions"] * arguments.other_versions
        return launch.run(arguments.processes, words + ["--debug"] * arguments.debug, output)
    with ranks.telling(output), Interruption():  # from here on: the libraries alone take seconds to load
        from llmtune.stages import sft as stage

        made = stage.run(settings, arguments.config, other_versions=arguments.other_versions)
    if ranks.rank() > 0:
        return 0
    metrics = made.manifest["metrics"]
    loss = metrics["validation_loss"]
    say(
        f"\n{metrics['steps']} steps in {metrics['seconds']} s, {metrics['tokens_per_s']:,.0f} tokens/s, "
        f"{metrics['trainable_parameters']:,} of {metrics['total_parameters']:,} parameters trained"
        + (f"; validation loss {loss:.4f}, best at step {metrics['best_step']}" if loss is not None else "")
    )
    say(
        f"next: llmtune chat {made.path.parent}"
        + f"\n      llmtune merge {made.path.parent}" * (made.kind == "adapter" and _merges(settings.adapter.method))
    )
    print(made.path)
    return 0


def _merges(method: str) -> bool:
    """Whether an adapter can be merged, as far as its method tells."""
    return not (peft_methods.has_virtual_tokens(method) or method in peft_methods.NO_MERGE)
