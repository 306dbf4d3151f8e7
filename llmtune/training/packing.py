"""Several rows in one sequence: packed without losing one, kept apart in every layer, and proven apart on the model at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llmtune.config import Recorded
from llmtune.errors import ConfigError
from llmtune.model.infer import supervised_logits
from llmtune.progress import say
from llmtune.training.trainer import LengthBuckets

if TYPE_CHECKING:
    from datasets import Dataset

    from llmtune.training.rows import Split

PACKED = ("input_ids", "labels", "weights")
INFLUENCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Nats per token by which a row may change when the row before it changes. Apart, it is 0: the same shapes, a masked weight of 0."""
DRIFT = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Mean nats per token between a row packed and alone. Rounding alone gave 6e-6 and 0.06, rows that see each other 1.9."""
STIR = 0.02
"""Noise on the adapter during the check: many adapters begin as the identity, and then nothing of theirs could show."""


def pack(rows: Dataset, max_length: int, file: Path) -> Dataset:
    """Whole rows in sequences of at most `max_length` tokens (best fit decreasing), in `file`.

    A sequence has `input_ids`, `labels`, `weights` where the rows have them, and `seq_lengths`, the length of each row in it.
    No row may be longer than `max_length`: TRL would cut it without a word.
    """
    import datasets

    columns = [name for name in PACKED if name in rows.column_names]
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        # a fingerprint of ours: that of datasets has the time in it, and the same rows are to make the same file
        into = {"cache_file_name": str(file), "load_from_cache_file": False, "new_fingerprint": file.stem}
        return pack_dataset(rows.select_columns(columns), max_length, "bfd", into)
    finally:
        if shown:
            datasets.enable_progress_bars()


@dataclass
class Collator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """TRL's collator, which pads rows, or with `padding_free` lays them end to end; and the weights of the tokens with them."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        if any("weights" in example for example in examples):
            parts = [torch.tensor(example["weights"], dtype=torch.float32) for example in examples]
            parts = [torch.cat(parts)] if self.padding_free else parts
            batch["weights"] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return batch


def padding_share(lengths: Sequence[int], order: Sequence[int], micro_batch_size: int) -> float:
    """Share of padding in [0, 1] when rows of these lengths are padded to the longest of their micro batch, in this order."""
    taken = [lengths[row] for row in order]
    batches = [taken[n : n + micro_batch_size] for n in range(0, len(taken), micro_batch_size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(taken) / padded


def layout(config: Recorded, train: Split) -> dict[str, Any]:
    """How full the run's batches are; said, and returned for its manifest.

    Unpacked, `padding` is the share of padding in an epoch, exact for the first. Packed, `full` is the share of the sequences
    that holds tokens, and `unpacked_padding` what the same rows would cost grouped by length, as many in a micro batch.
    """
    lengths, micro, seed = train.counts.lengths, config.train.micro_batch_size, config.train.seed
    if not config.data.packing:
        seen = lengths if config.train.group_by_length else [0] * len(lengths)  # as the trainer's own sampler
        padding = padding_share(lengths, list(LengthBuckets(seen, config.train.batch_size, seed)), micro)
        say(f"  padding: {padding:.1%} of the tokens computed, in micro batches of {micro}")
        return {"padding": round(padding, 4)}
    each = len(lengths) / len(train.rows)
    rows = max(1, round(each * micro))
    padding = padding_share(lengths, list(LengthBuckets(lengths, rows, seed)), rows)
    full = sum(lengths) / (len(train.rows) * config.data.max_length)
    say(
        f"  packing: {len(lengths)} rows in {len(train.rows)} sequences, {full:.1%} full (unpacked, by length: {padding:.1%} "
        f"padding at micro batch {rows}); batch_size counts sequences: {config.train.batch_size} of them are about "
        f"{each * config.train.batch_size:.0f} rows a step"
    )
    return {"sequences": len(train.rows), "full": round(full, 4), "unpacked_padding": round(padding, 4)}


def require_isolation(model: Any, packed: Dataset, collate: Collator, place: object, *, mixed_bf16: bool) -> None:
    """Raise ConfigError where this model lets rows of one sequence see each other, or misses their own positions.

    Two short rows of the data are run packed and alone, and packed behind another row of the same length. Which architectures
    keep rows apart on which attention is no matter of belief: Bloom, OPT and Mamba of transformers 5.23 do not.
    """
    pair = _shortest_pair(packed)
    if pair is None:
        return
    first, second = pair
    dtype = torch.bfloat16 if mixed_bf16 else model.dtype
    with _stirred(model), torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_bf16):
        try:
            together = _losses(model, collate, first, second)
            other = _losses(model, collate, first[::-1], second)
            alone = _losses(model, collate, first), _losses(model, collate, second)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                place, f"data.packing: this model cannot be given packed rows ({error}); set it to false"
            ) from None
    split = len(first) - 1
    influence = (together[split:] - other[split:]).abs().max().item()
    drift = max((a - b).abs().mean().item() for a, b in zip((together[:split], together[split:]), alone, strict=True))
    rounding = torch.float32 if dtype == torch.float32 else torch.bfloat16
    if not (influence <= INFLUENCE[rounding] and drift <= DRIFT[rounding]):  # nor where they are no numbers
        what = f"{type(_base(model)).__name__} with {_base(model).config._attn_implementation} attention"
        raise ConfigError(
            place,
            f"data.packing: {what} does not keep packed rows apart: the loss of a row changes by {influence:.2g} nats with the "
            f"row before it, and by {drift:.2g} on average when it is packed; set data.packing to false",
        )


def _shortest_pair(packed: Dataset) -> tuple[list[int], list[int]] | None:
    """The last two rows, which are its shortest, of one of the first sequences: token ids."""
    lengths = packed.select_columns(["seq_lengths"])[:1000]["seq_lengths"]
    several = [n for n, rows in enumerate(lengths) if len(rows) > 1 and min(rows[-2:]) > 1]
    if not several:
        return None
    best = min(several, key=lambda n: sum(lengths[n][-2:]))
    first, second = lengths[best][-2:]
    ids = packed[best]["input_ids"]
    return ids[-first - second : -second], ids[-second:]


def _losses(model: Any, collate: Collator, *rows: list[int]) -> torch.Tensor:
    """Loss of every token of `rows` but the first of each, packed into one sequence."""
    ids = [token for row in rows for token in row]
    batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}])
    batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
    logits, targets = supervised_logits(model, batch, batch.pop("labels"))
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _stirred(model: Any) -> Iterator[None]:
    """In eval mode, with noise on the weights of the adapter where there is one; afterwards as it was, to the bit."""
    adapter = [p for p in model.parameters() if p.requires_grad] if hasattr(model, "peft_config") else []
    kept = [parameter.detach().clone() for parameter in adapter]
    training, noise = model.training, torch.Generator().manual_seed(0)
    model.eval()
    try:
        with torch.no_grad():
            for parameter in adapter:
                drawn = torch.randn(parameter.shape, generator=noise) * STIR
                parameter.add_(drawn.to(parameter.device, parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(adapter, kept, strict=True):
                parameter.copy_(before)
        model.train(training)
