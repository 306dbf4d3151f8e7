"""`llmtune sft CONFIG --seeds N`: the same run with N seeds, and how far they lie apart. One training seed is not a recipe."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

from llmtune import artifact, ranks
from llmtune.artifact import Artifact
from llmtune.errors import ConfigError
from llmtune.progress import say

SUMMARY = "seeds.json"
PER_RUN = {"output_dir", "tracking"}


def run(settings: Any, arguments: argparse.Namespace) -> int:
    """Train `settings` with the seeds from train.seed on, each into `output_dir/seed-N`, and write `output_dir/seeds.json`.

    A seed that is finished is not trained again, an interrupted one goes on. Raises ConfigError for a finished one of other
    settings.
    """
    if arguments.seeds < 2:
        raise ConfigError("command line", "--seeds 1 shows no spread; use 2 or more, or leave it out")
    if arguments.processes or ranks.launched():
        raise ConfigError("command line", "--seeds trains in one process; leave out --processes and the launcher")
    output, first = Path(settings.output_dir), settings.train.seed
    if artifact.complete(output / "adapter") or artifact.complete(output / "model"):
        raise ConfigError(
            arguments.config, f"output_dir: {output} holds a single finished run; choose another output_dir"
        )
    made: dict[int, Artifact] = {}
    for seed in range(first, first + arguments.seeds):
        own = settings.model_copy(
            update={
                "output_dir": str(output / f"seed-{seed}"),
                "train": settings.train.model_copy(update={"seed": seed}),
            }
        )
        made[seed] = _finished(own, arguments.config) or _train(own, arguments)
    summary = summarise({seed: one.manifest["metrics"] for seed, one in made.items()})
    artifact.write_atomically(output / SUMMARY, json.dumps(summary, indent=1))
    say(render(summary, output))
    print(json.dumps(summary, indent=1) if arguments.json else output / SUMMARY)
    return 0


def _finished(own: Any, place: object) -> Artifact | None:
    folder = Path(own.output_dir, own.makes)
    if not artifact.complete(folder):
        return None
    before, now = artifact.read(folder), own.model_dump(mode="json", exclude_none=True)
    was = before.manifest["config"]
    changed = sorted(key for key in (was.keys() | now.keys()) - PER_RUN if was.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            place, f"{folder} was trained with other settings ({', '.join(changed)}); choose another output_dir"
        )
    say(f"\nseed {own.train.seed}: finished already")
    return before


def _train(own: Any, arguments: argparse.Namespace) -> Artifact:
    from llmtune.interruption import Interruption

    say(f"\nseed {own.train.seed}")
    with ranks.telling(Path(own.output_dir)), Interruption():
        from llmtune.stages import sft as stage

        made = stage.run(own, arguments.config, other_versions=arguments.other_versions)
    gc.collect()  # the trainer and its model refer to each other
    return made


def summarise(metrics: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Each seed's figures, and of each loss the mean, the standard deviation (n - 1), the lowest and the highest.

    median: the seed whose validation loss (without validation: train loss) is the middle one, of an even number the lower.
    """
    keys = [key for key in ("validation_loss", "train_loss") if all(one[key] is not None for one in metrics.values())]
    ordered = sorted(metrics, key=lambda seed: metrics[seed][keys[0]])
    spread = {}
    for key in keys:
        values = [one[key] for one in metrics.values()]
        spread[key] = {
            "mean": statistics.fmean(values),
            "standard_deviation": statistics.stdev(values),
            "lowest": min(values),
            "highest": max(values),
        }
    figures = ("steps", "best_step", "train_loss", "validation_loss", "tokens_per_s")
    return {
        "seeds": [{"seed": seed, **{key: one[key] for key in figures}} for seed, one in metrics.items()],
        "spread": spread,
        "median": ordered[(len(ordered) - 1) // 2],
    }


def render(summary: dict[str, Any], output: Path) -> str:
    lines = ["", "seed    steps  best step  train loss  validation loss"]
    for one in summary["seeds"]:
        loss = "-" if one["validation_loss"] is None else f"{one['validation_loss']:.4f}"
        lines.append(f"{one['seed']:<6}{one['steps']:>7}{one['best_step']:>11}{one['train_loss']:>12.4f}{loss:>17}")
    number = len(summary["seeds"])
    for key, spread in summary["spread"].items():
        lines.append(
            f"{key.replace('_', ' ')}: mean {spread['mean']:.4f}, standard deviation {spread['standard_deviation']:.4f}, "
            f"from {spread['lowest']:.4f} to {spread['highest']:.4f} over {number} seeds"
        )
    lines += [
        f"the median run is {output}/seed-{summary['median']}",
        "One seed is not a recipe: a difference between two recipes that is smaller than this spread may be the seed's.",
    ]
    return "\n".join(lines)
