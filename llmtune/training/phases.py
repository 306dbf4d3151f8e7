"""One training or two: an adapter or a few weights first, then upper layers at a lower rate, and the better of the two kept."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config import Recorded
from llmtune.config.sft import SftConfig
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.interruption import Interruption
from llmtune.model import adapters, freeze, load
from llmtune.progress import say
from llmtune.training import callbacks, checkpoints, group, loop, rows, setup, smoke
from llmtune.training.rows import Split
from llmtune.training.watch import RefusalWatch, Watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTE = "phase.json"


@dataclass(frozen=True)
class Tuned:
    """What a training made."""

    model: Callable[[], Any]
    """The adapter on its base, or the whole model in float32; made when it is asked for, since it may have to be read."""
    facts: dict[str, Any]
    """What the manifest says of it: `metrics`, `trained` where it is a part of the weights, `phases` where there were two."""


@dataclass(frozen=True)
class Given:
    """What the phases of a run share."""

    tokenizer: PreTrainedTokenizerBase
    train: Split
    validation: Split | None
    folder: Path
    device: str
    stop: Interruption
    place: object
    callbacks: Sequence[Any] = ()
    watched: Watched | None = None


def check(config: SftConfig, place: object) -> None:
    """Raise ConfigError where two phases are asked for and the launch allows one."""
    if config.second_phase is not None and (spread := group.sharded()):
        raise ConfigError(
            place,
            f"second_phase: phase 1's weights are put together in one process, which was not tried under {spread}; train "
            "with a copy of the model in each process (--processes N), or leave it out",
        )


def train(views: list[Recorded], base: load.Source, given: Given) -> Tuned:
    """Train the run's one phase, or both. An interrupted run goes on in the phase it was in.

    Of two phases the first ends with its best weights as a whole model, an adapter merged in float32; the second begins with
    them, and its own best are the result if their validation loss is below what it began with and below the first's best.
    """
    if len(views) == 1:
        return _phase(views[0], base, given, given.folder)
    first, second = given.folder / "phase-1", given.folder / "phase-2"
    if not checkpoints.whole(first / "model"):
        say("  phase 1")
        tuned = _phase(views[0], base, given, first, 1)
        group.from_first(lambda: _keep(tuned, given.tokenizer, first / "model"))
        del tuned
        gc.collect()  # a trainer holds itself, and with it the weights and the state of its optimizer
    start = _kept(first / "model")
    facts = json.loads((start.folder / NOTE).read_text(encoding="utf-8"))
    say(f"  phase 2, from phase 1's step {facts['metrics']['best_step']}")
    after = _phase(views[1], start, given, second, 2, before=facts["metrics"]["steps"])
    began = group.from_first(lambda: _began(given.folder))
    least, reached = min(began, facts["metrics"]["validation_loss"]), after.facts["metrics"]["validation_loss"]
    better = reached < least
    what = "lowers" if better else "does not lower"
    say(
        f"  phase 2 {what} the validation loss: {least:.4f} before it, {reached:.4f} at its best"
        + ("" if better else ("; the weights of phase 1 are the result"))
    )
    both = [facts, after.facts]
    kept = both[better]
    result = {"metrics": _together(both, kept) | {"kept_phase": 1 + better}, "phases": both}
    trained = {"trained": kept["trained"]} if "trained" in kept else {}
    remote = views[0].model.trust_remote_code
    return Tuned(
        after.model if better else lambda: load.load_model(start, "float32", "cpu", trust_remote_code=remote),
        result | trained,
    )


def _phase(
    view: Recorded, base: load.Source, given: Given, folder: Path, number: int | None = None, before: int = 0
) -> Tuned:
    """Build the model with what is trained of it and its trainer, and train."""
    model = setup.build_model(view, base, given.train, given.device, given.place)
    if number is not None and view.adapter is not None and (why := adapters.no_merge(model)):
        reason = f"a {view.adapter.method} adapter cannot be merged: {why}; choose another method"
        raise ConfigError(given.place, f"second_phase: {reason}")
    splits = given.train, given.validation
    trainer = setup.build_trainer(view, model, given.tokenizer, *splits, folder, given.device, given.place)
    rows.assert_nothing_lost(trainer.train_dataset, given.train.counts, trainer.blanks)
    view.require_all_read(given.place)
    log, more = given.folder / "metrics.jsonl", list(given.callbacks)
    if given.watched is not None:
        more.insert(0, RefusalWatch(trainer, given.watched, folder, log, before))
    metrics = loop.train(trainer, folder, given.stop, log, number, before, more)
    facts: dict[str, Any] = {"metrics": metrics | smoke.run(trainer, given.train.rows, given.tokenizer)}
    if view.trainable is not None:
        facts["trained"] = freeze.trained(trainer.model)
    remote = view.model.trust_remote_code
    tuned = setup.whole_model(view, trainer.model, base, given.train, given.place)
    if view.adapter is None:
        return Tuned(lambda: freeze.whole(tuned, base, trust_remote_code=remote), facts)
    if number is None:
        return Tuned(lambda: tuned, facts)
    facts["adapter"] = view.adapter.whole().model_dump(mode="json")
    return Tuned(lambda: adapters.merged(tuned, base, trust_remote_code=remote), facts)


def _keep(tuned: Tuned, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a finished phase, sealed last; what it could have been resumed from is of no more use."""
    shutil.rmtree(folder, ignore_errors=True)  # half-written
    tuned.model().save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / NOTE).write_text(json.dumps(tuned.facts), encoding="utf-8")
    checkpoints.seal(folder)
    for checkpoint in folder.parent.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _kept(folder: Path) -> load.Source:
    if not checkpoints.whole(folder):
        raise LlmtuneError(
            f"{folder}: is not on this machine; two phases on several need an output_dir that they share"
        )
    return load.find(str(folder))


def _began(folder: Path) -> float:
    """The validation loss that the second phase began with."""
    lines = callbacks.read_metrics(folder / "metrics.jsonl")
    return float(next(line["validation_loss"] for line in lines if line["phase"] == 2))


def _together(both: list[dict[str, Any]], kept: dict[str, Any]) -> dict[str, Any]:
    """The metrics of the whole run: what is counted is summed, what is reached is that of the phase that is kept."""
    every = [facts["metrics"] for facts in both]
    sums = {key: sum(metrics[key] for metrics in every) for key in ("steps", "seconds", "tokens")}
    return {
        **kept["metrics"],
        **sums,
        "seconds": round(sums["seconds"], 1),
        "tokens_per_s": round(sums["tokens"] / max(sums["seconds"], 1e-9), 1),
        "peak_memory_gb": max(metrics["peak_memory_gb"] for metrics in every),
    }
