"""A loss or a gradient that is not a number: at which rows it began.

Looked for before the optimizer steps, while the weights are those of the step before: each row of the step is then tried alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import LlmtuneError
from llmtune.training import group

MOST = 5
"""So many rows are named."""


LOWER = "lower train.learning_rate, or set model.dtype to float32"
SO = LOWER[0].upper() + LOWER[1:]
ANEW = "and start anew in another output_dir"


def training(trainer: Any, batches: Iterable[dict[str, Any]], since: int) -> LlmtuneError:
    """The error for a step whose gradient is not finite, from the micro batches of this process's part of it.

    since: the last step of which it is known that its gradient was finite. Every process has to call this.
    """
    step = trainer.state.global_step + 1
    return _weights(trainer, since, step - 1) or _rows_at_fault(
        trainer, batches, trainer.train_dataset, "train", f"the loss or its gradient is not a number at step {step}"
    )


def validation(trainer: Any, batches: Iterable[dict[str, Any]], since: int) -> LlmtuneError:
    """The error for a validation loss that is not finite. Every process has to call this."""
    step = trainer.state.global_step
    return _weights(trainer, since, step) or _rows_at_fault(
        trainer, batches, trainer.eval_dataset, "validation", f"the validation loss is not a number after step {step}"
    )


def _weights(trainer: Any, since: int, last: int) -> LlmtuneError | None:
    """The error where the weights that are trained are not finite any more, after step `last`."""
    finite = all(bool(weight.isfinite().all()) for weight in trainer.model.parameters() if weight.requires_grad)
    if not group.largest(not finite):  # of a model that is spread, each process sees a part
        return None
    if since == last:
        return LlmtuneError(f"the weights are not a number after step {last}, whose gradient was one: {LOWER}, {ANEW}")
    return LlmtuneError(
        f"the weights are not a number since one of the steps {since + 1} to {last}. With train.log_steps=1 the same command "
        f"goes on from the last checkpoint and names the rows; or {LOWER}, {ANEW}"
    )


def _rows_at_fault(trainer: Any, batches: Iterable[dict[str, Any]], rows: Any, split: str, what: str) -> LlmtuneError:
    tried = [row for batch in batches for row in _rows(batch)]
    turns = int(
        group.largest(len(tried))
    )  # on a GPU, and of a model that is spread, a loss takes all processes at once
    found = [_alone(trainer, tried[n % len(tried)]) for n in range(turns)]
    alone = {n: wrong for n, wrong in enumerate(found[: len(tried)]) if wrong}
    named = _places(Path(rows.cache_files[0]["filename"]).with_name(f"{split}.arrow"), tried)
    guilty = group.every([f"{named[n]} ({wrong})" for n, wrong in alone.items()])
    if not guilty:
        every = _listed(group.every(list(named.values())))
        return LlmtuneError(f"{what}, although it is for each of its rows alone: {every}. {SO}, {ANEW}")
    if len(guilty) == (number := int(group.total([len(tried)])[0])) > 1:
        return LlmtuneError(f"{what}, for each of its {number} rows alone, so it is not the rows. {SO}, {ANEW}")
    those = "that row" if len(guilty) == 1 else "those rows"
    return LlmtuneError(f"{what}, already for {_listed(guilty)} alone. Correct or remove {those}, or {LOWER}, {ANEW}")


def _rows(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a micro batch as the dataset has them, without padding, whether they are packed or not."""
    columns = [name for name in ("input_ids", "labels", "weights") if name in batch]
    if "attention_mask" in batch:
        for n, mask in enumerate(batch["attention_mask"]):
            yield {name: batch[name][n][mask.bool()].tolist() for name in columns}
    else:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            yield {name: batch[name][0][start:end].tolist() for name in columns}


def _alone(trainer: Any, row: dict[str, Any]) -> str | None:
    """What is not finite of a row's loss and gradient, without dropout."""
    trainer.model.eval()
    inputs = trainer._prepare_inputs(trainer.data_collator([{**row, "seq_lengths": [len(row["input_ids"])]}]))
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)
    if not math.isfinite(said := loss.item()):
        return f"loss {said:.3g}"
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)  # not backward(): DDP would wait for the others
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
    return None if finite else f"loss {said:.3g}, its gradient not finite"


def _places(file: Path, rows: list[dict[str, Any]]) -> dict[int, str]:
    """Where each of `rows` stands in the user's files, found by its tokens; equal rows are named together."""
    import datasets

    wanted: dict[tuple[int, ...], list[str]] = {tuple(row["input_ids"]): [] for row in rows}
    with file.with_suffix(".places").open(encoding="utf-8") as places:
        for batch in datasets.Dataset.from_file(str(file)).select_columns("input_ids").iter(1000):
            for ids in batch["input_ids"]:
                place = places.readline().rstrip("\n")
                if tuple(ids) in wanted:
                    wanted[tuple(ids)].append(place)
    return {n: " = ".join(wanted[tuple(row["input_ids"])]) or "a blank row" for n, row in enumerate(rows)}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(dict.fromkeys(names[:MOST])) + more
