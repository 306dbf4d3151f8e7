"""Forward passes shared by training, evaluation and proof: losses where supervised, greedy answers."""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data import template
from llmtune.data.tokens import IGNORED, TokenRow
from llmtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, its length in tokens, whether it ended by itself, and its share of the batch's time."""

    text: str
    tokens: int
    ended: bool
    latency_s: float


def supervised_logits(
    model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of shape (n, vocabulary) at the positions whose next token is supervised, and those tokens, shape (n,).

    The language-model head runs only on positions that some row of the batch supervises: with a vocabulary of 49,152 and a
    model of 135 M parameters the head on every position costs more than a quarter of the forward pass. Positions count from
    the end, so that virtual tokens which an adapter puts before the text do not shift them.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    keep = supervised.any(dim=0).nonzero().squeeze(1)
    kept = keep - labels.shape[1]
    cached = "past_key_values" in inputs
    if _can_keep(model):
        logits = model(**inputs, logits_to_keep=kept, use_cache=cached).logits
    else:
        logits = model(**inputs, use_cache=cached).logits[:, kept]
    mask = supervised[:, keep]
    return logits[mask], targets[:, keep][mask]


def token_losses(
    model: PreTrainedModel,
    rows: list[TokenRow],
    pad_id: int,
    *,
    max_tokens: int = 4096,
    on_batch: Callable[[int], None] | None = None,
) -> list[float]:
    """Mean negative log-likelihood per supervised token of each row, in nats, computed in float32; order as given.

    Rows are batched by length, at most `max_tokens` padded tokens a forward pass; what all of them begin with is run once.
    """
    if not all(row.supervised for row in rows):
        raise ValueError("a row without a supervised token has no loss")
    losses = [0.0] * len(rows)
    if not rows:
        return losses
    limit = min((row.labels.index(next(label for label in row.labels if label != IGNORED)) for row in rows), default=0)
    _require_fits(model, max(len(row.input_ids) for row in rows), "an item")
    prefix = _Prefix(model, [row.input_ids for row in rows], limit - 1)
    for batch in _by_length([len(row.input_ids) for row in rows], max_tokens):
        part = [TokenRow(rows[i].input_ids[prefix.length :], rows[i].labels[prefix.length :]) for i in batch]
        inputs, labels = pad(part, pad_id, model.device)
        with torch.inference_mode():
            logits, targets = supervised_logits(model, prefix.before(inputs), labels)
            each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        for i, row in zip(batch, each.split([rows[i].supervised for i in batch]), strict=True):
            losses[i] = row.mean().item()
        if on_batch:
            on_batch(len(batch))
    return losses


def log_probabilities(model: PreTrainedModel, rows: list[TokenRow], pad_id: int) -> list[float]:
    """Of what each row supervises as a whole, in nats; order as given."""
    losses = token_losses(model, rows, pad_id)
    return [-loss * row.supervised for loss, row in zip(losses, rows, strict=True)]


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    seed: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers to token-id prompts, order as given: greedy, or with a `seed` drawn from the model's own distribution.

    The model's own generation config takes no part (a repetition penalty in it would make two arms incomparable); only its
    stop tokens are kept.
    """
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if has_virtual_tokens(model):
        batch_size = 1  # PEFT ignores position ids there, so a padded row would be answered as another prompt
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    if seed is not None:
        torch.manual_seed(seed)
        settings.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    _require_fits(model, max(map(len, prompts), default=0) + max_new_tokens, "a prompt with its answer")
    began = time.perf_counter()
    prefix = _Prefix(model, prompts, min(map(len, prompts), default=0) - 1)
    shared_s = (time.perf_counter() - began) / max(1, len(prompts))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        own = [prompts[i][prefix.length :] for i in batch]
        width = max(map(len, own))
        ids = torch.tensor([[settings.pad_token_id] * (width - len(prompt)) + prompt for prompt in own])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in own])
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        began = time.perf_counter()
        with torch.inference_mode(), neutral(model, settings), warnings.catch_warnings():
            # one row at a time has no padding, so that position ids are not missed
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            out = model.generate(**prefix.before(inputs, whole=True), generation_config=settings)
        out = out[:, prefix.length + width :]
        seconds = time.perf_counter() - began
        for i, said in zip(batch, out.tolist(), strict=True):
            stops = [n for n, token in enumerate(said) if token in settings.eos_token_id]
            said = said[: stops[0]] if stops else said
            text = tokenizer.decode(said, skip_special_tokens=True).strip()
            answers[i] = Answer(text, len(said), bool(stops), shared_s + seconds / len(batch))
        if on_batch:
            on_batch(len(batch))
    return [answers[i] for i in range(len(prompts))]


def context_length(model: Any) -> int | None:
    """Tokens the model has positions for, where its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _require_fits(model: Any, tokens: int, what: str) -> None:
    limit = context_length(model)
    if limit and tokens > limit:
        raise DataError("items", f"{what} takes {tokens} tokens, and the model has positions for {limit}")


@contextlib.contextmanager
def neutral(model: Any, settings: Any) -> Iterator[None]:
    """Put the model's own generation config aside: transformers fills from it whatever `settings` leaves open."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, inner.generation_config = inner.generation_config, settings
    try:
        yield
    finally:
        inner.generation_config = kept


class _Prefix:
    """The tokens that all rows begin with, run through the model once: examples in a prompt cost one pass, not one a row."""

    SHORTEST = 16

    def __init__(self, model: Any, rows: list[list[int]], limit: int) -> None:
        apart = has_virtual_tokens(model) or reads_rows_whole(model) or len(rows) < 2
        shared = 0 if apart else _common(rows, limit)
        self.length = shared if shared >= self.SHORTEST else 0
        if self.length:
            self.ids = torch.tensor([rows[0][: self.length]], device=model.device)
            with torch.inference_mode():
                self.cache = model(
                    input_ids=self.ids, use_cache=True, **({"logits_to_keep": 1} if _can_keep(model) else {})
                )
            self.cache = self.cache.past_key_values

    def before(self, inputs: dict[str, torch.Tensor], *, whole: bool = False) -> dict[str, Any]:
        """`inputs` of shape (rows, tokens) set behind the prefix. whole: with the prefix's ids too, as `generate` wants it."""
        if not self.length:
            return dict(inputs)
        rows, width = inputs["input_ids"].shape
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        ahead = self.ids.expand(rows, -1)
        mask = torch.cat([torch.ones_like(ahead), inputs["attention_mask"]], dim=1)
        if whole:
            return {
                "input_ids": torch.cat([ahead, inputs["input_ids"]], 1),
                "attention_mask": mask,
                "past_key_values": cache,
            }
        positions = torch.arange(self.length, self.length + width, device=ahead.device).expand(rows, -1)
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": mask,
            "past_key_values": cache,
            "position_ids": positions,
        }


def has_virtual_tokens(model: Any) -> bool:
    """Whether an adapter puts tokens of its own before the text, as prompt tuning does."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def reads_rows_whole(model: Any) -> bool:
    """Whether an adapter acts from certain tokens on, as an activated LoRA does: it has to see them in the row itself."""
    return any(
        getattr(config, "alora_invocation_tokens", None) for config in getattr(model, "peft_config", {}).values()
    )


def _common(rows: list[list[int]], limit: int) -> int:
    first, last = min(rows), max(rows)  # what the smallest and the largest share, all between them share
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return max(0, min(same, limit))


def greedy_settings(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Any:
    """A neutral greedy generation config with the stop tokens of the model, of the tokenizer and of the chat template."""
    from transformers import GenerationConfig

    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template is not None:
        stops |= set(tokenizer.convert_tokens_to_ids(list(template.of(tokenizer).stops)))
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id
    )


def stop_at_end_of_turn(model: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Have the model's own generation config stop where its chat template ends a turn; that token, where it did not."""
    unlisted = template.of(tokenizer).unlisted
    if unlisted is not None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.generation_config.eos_token_id = greedy_settings(model, tokenizer, 1).eos_token_id
    return unlisted


def pad(rows: Iterable[TokenRow], pad_id: int, device: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows -> {"input_ids", "attention_mask"} and labels, each of shape (rows, longest), padded on the right."""
    rows = list(rows)
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[line, : len(row.labels)] = torch.tensor(row.labels)
        mask[line, : len(row.input_ids)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)


def _by_length(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _can_keep(model: Any) -> bool:
    inner = model.module if hasattr(model, "module") else model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
