"""An early warning while a model is tuned: does it lean less to refuse what it refused before, and by how much?

The refusal margin (`llmtune.data.openers`) of some prompts is measured before the first step, every so many steps, and before every
checkpoint but the one that a signal asks for, so that weights kept are weights looked at. It needs no answers and no judge, and it shows an erosion
that the answers do not show yet; it is no proof of safety.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from llmtune import ranks, stats
from llmtune.artifact import write_atomically
from llmtune.config.eval import ITEM_COLUMNS, read_suite
from llmtune.config.train import RefusalWatchConfig
from llmtune.data.chats import Chat, load_chats
from llmtune.data.openers import encode_openers, refusal_margin
from llmtune.data.tokens import TokenRow, encode_prompt
from llmtune.errors import ConfigError, DataError, LlmtuneError
from llmtune.model import infer
from llmtune.training import checkpoints, group
from llmtune.training.callbacks import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "refusal_watch.json"
"""Beside the checkpoints: the margins before the first step, which a resumed run holds its own against."""
KEY = "train.refusal_watch"
CONFIDENCE = 0.90  # its lower end is a one-sided 95 % bound
SEED = 0


@dataclass(frozen=True)
class Watched:
    """The prompts that are looked at, as the rows of their openers."""

    settings: RefusalWatchConfig
    prompts: list[list[TokenRow]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([row.input_ids for rows in self.prompts for row in rows]).encode()).hexdigest()


def read(settings: RefusalWatchConfig, tokenizer: PreTrainedTokenizerBase, place: object) -> Watched:
    """So many prompts of the suite, one a cluster, drawn by a fixed seed. Raises ConfigError or DataError."""
    suite, _, file = read_suite(settings.suite, str(place))
    if "refusal_margin" not in suite.metrics or suite.attacks:
        why = "asks under attacks" if suite.attacks else "does not measure refusal_margin"
        raise ConfigError(place, f"{KEY}.suite: '{suite.suite}' {why}; name a suite of plain requests, such as harmful")
    if spread := group.sharded():
        raise ConfigError(place, f"{KEY}: was not tried with a model that is spread by {spread}; leave it out")
    clusters: dict[str, Chat] = {}
    for chat in load_chats(str(suite.items), "auto", suite.columns or ITEM_COLUMNS, training=False, answers=False):
        fields = chat.row.fields
        if all(str(fields.get(name)) == text for name, text in suite.where.items()):
            named = (fields.get(suite.cluster or "cluster"), fields.get("id"), chat.row.place)
            clusters.setdefault(str(next(name for name in named if name not in (None, ""))), chat)
    if len(clusters) < settings.items:
        raise ConfigError(
            place,
            f"{KEY}.items: {settings.items} are asked for, and {file} has {len(clusters)} that are unlike each other",
        )
    drawn = random.Random(SEED).sample(sorted(clusters), settings.items)
    return Watched(settings, [_encoded(tokenizer, clusters[name]) for name in drawn])


def _encoded(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[TokenRow]:
    try:
        return encode_openers(tokenizer, encode_prompt(tokenizer, chat.prompt))
    except ValueError as error:
        raise DataError(chat.row.place, str(error)) from None


class RefusalWatch(TrainerCallback):  # type: ignore[misc]
    """Ends the run with an LlmtuneError, before a checkpoint is written, once the margin has dropped by more than is allowed.

    Beyond chance: by more than `max_drop` at the lower end of a one-sided 95 % bound, paired over the prompts. Of several
    processes each asks its share, and all come to the same figures. Weights, random numbers and the rest of the run are as
    without it. folder: where this phase has its checkpoints; log: the run's metrics, beside which the baseline is kept;
    before: steps of an earlier phase, whose baseline holds.
    """

    def __init__(self, trainer: Any, watched: Watched, folder: Path, log: Path, before: int = 0) -> None:
        self.trainer, self.watched, self.folder, self.log, self.before = trainer, watched, folder, log, before
        self.baseline: list[float] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        file = self.log.parent / FILE
        if self.before + state.global_step:
            self.baseline = group.from_first(lambda: self._kept(file))
            return
        self.baseline = self._margins()
        if ranks.rank() == 0:
            write_atomically(file, json.dumps({"prompts": self.watched.sha256, "margins": self.baseline}))
        self._log(args, state, control, self.baseline)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        settings = self.watched.settings
        if not (control.should_save or (self.before + state.global_step) % settings.every_steps == 0):
            return
        drop, least = self._log(args, state, control, self._margins())
        if least > settings.max_drop:
            raise LlmtuneError(self._told(self.before + state.global_step, drop, least))

    def _margins(self) -> list[float]:
        """Of each prompt, with the weights as they are."""
        model, world = self.trainer.model, ranks.world_size()
        modes = {module: module.training for module in model.modules()}
        devices = [self.trainer.args.device] if self.trainer.args.device.type == "cuda" else []
        pad_id = self.trainer.processing_class.pad_token_id
        model.eval()
        try:
            with torch.random.fork_rng(devices), self.trainer.accelerator.autocast():
                mine = [
                    (n, refusal_margin(infer.log_probabilities(model, rows, pad_id)))
                    for n, rows in enumerate(self.watched.prompts)
                    if n % world == ranks.rank()
                ]
        finally:
            for module, training in modes.items():
                module.training = training
        margins = [margin for _, margin in sorted(group.every(mine))]
        if not all(map(math.isfinite, margins)):
            raise LlmtuneError(
                f"{KEY}: the model gives no finite margin any more: its weights are broken, by too high a rate?"
            )
        return margins

    def _log(
        self, args: Any, state: TrainerState, control: TrainerControl, margins: list[float]
    ) -> tuple[float, float]:
        """Tell everyone who is told of metrics. Returns the mean drop since before training, and what it is at least."""
        drops = [before - now for before, now in zip(self.baseline, margins, strict=True)]
        drop = sum(drops) / len(drops)
        least, _ = stats.cluster_bootstrap_interval(drops, [str(n) for n in range(len(drops))], CONFIDENCE)
        figures = {"refusal_margin": sum(margins) / len(margins), "refusal_drop": drop, "refusal_drop_least": least}
        due = control.should_log  # which transformers takes for done once anything is logged
        self.trainer.callback_handler.on_log(args, state, control, {**figures, "epoch": state.epoch or 0.0})
        control.should_log = due
        return drop, least

    def _kept(self, file: Path) -> list[float]:
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LlmtuneError(
                f"{file}: cannot be read ({error}), and without the margins before training a resumed run cannot be watched; "
                f"remove {file.parent} to start anew"
            ) from None
        if kept["prompts"] != self.watched.sha256:
            raise ConfigError(
                KEY,
                f"the prompts of the suite are not those that {file} was measured on; remove {file.parent} to start anew",
            )
        return [float(margin) for margin in kept["margins"]]

    def _told(self, step: int, drop: float, least: float) -> str:
        settings = self.watched.settings
        seen = {line["step"] for line in read_metrics(self.log) if "refusal_drop" in line} - {step}
        sealed = [
            int(file.parent.name.removeprefix("checkpoint-")) for file in self.folder.glob(f"*/{checkpoints.SEAL}")
        ]
        within = max((number for number in sealed if self.before + number in seen), default=None)
        last = f"{self.folder / f'checkpoint-{within}'} is the last one that was within it"
        return (
            f"stopped at step {step}: the refusal margin on {settings.items} prompts of '{settings.suite}' has dropped by {drop:.2f} "
            f"nats (at least {least:.2f}, 95 % bound), and {KEY}.max_drop allows {settings.max_drop:g}. No artifact is written; "
            f"{last if within is not None else 'there is no checkpoint before it'}. Mix in rows that refuse such requests (data.train takes "
            "several sources), or train less: a lower train.learning_rate, fewer train.max_steps. Where the drop is wanted, raise "
            "max_drop. Each of these is another run, with an output_dir of its own"
        )
