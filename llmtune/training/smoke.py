"""Does the tuned model end its answers by itself? Two prompts of the training rows, asked once when training is over."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmtune import ranks
from llmtune.data import template
from llmtune.data.tokens import IGNORED
from llmtune.errors import LlmtuneError
from llmtune.model import infer
from llmtune.progress import say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PROMPTS, LOOKED_AT, MOST_TOKENS = 2, 1000, 128


def run(trainer: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """`smoke_prompts` asked and `smoke_ended`, how many answers ended within four times their row's length and 32 tokens.

    Asked are the prompts of the shortest answers, greedily; weights and random state stay as they are. Nothing is asked of a
    model that is spread over several processes, nor where every answer is long. What fails here fails no run.
    """
    found = sorted(_answers(rows, tokenizer), key=lambda pair: pair[1])[:PROMPTS]
    found = [(prompt, length) for prompt, length in found if length <= MOST_TOKENS]
    if not found or ranks.world_size() > 1:
        return {}
    most = min(MOST_TOKENS, 4 * found[-1][1] + 32)
    model = trainer.model
    training = model.training
    model.eval()
    try:
        with trainer.accelerator.autocast():
            answers = infer.generate(model, tokenizer, [prompt for prompt, _ in found], most, PROMPTS)
    except (
        LlmtuneError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
        IndexError,
    ) as error:
        say(
            f"  note: the tuned model could not be asked whether it ends its answers ({' '.join(str(error).split())[:200]})"
        )
        return {}
    finally:
        model.train(training)
    ended = sum(answer.ended for answer in answers)
    if ended < len(answers):
        lengths = " and ".join(str(length) for _, length in found)
        say(
            f"  note: asked {len(answers)} training prompts, the tuned model ended {ended} of its answers within {most} tokens "
            f"(those of the rows have {lengths}); it may not have learnt to stop: see 'llmtune chat', and train longer"
        )
    return {"smoke_prompts": len(answers), "smoke_ended": ended}


def _answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """The prompt and the length of the last answer of each row whose answer is whole."""
    stops = set(tokenizer.convert_tokens_to_ids(list(template.of(tokenizer).stops)))
    found = []
    for ids, labels in _rows(rows):
        end = max((n for n, label in enumerate(labels) if label != IGNORED), default=-1)
        if end < 0 or labels[end] not in stops:
            continue  # it was cut
        start = max((n + 1 for n in range(end) if labels[n] == IGNORED), default=0)
        if start:
            found.append((ids[:start], end - start + 1))
    return found


def _rows(rows: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of each row, whether they are packed or not."""
    for row in rows.select(range(min(len(rows), LOOKED_AT))):
        ends = list(itertools.accumulate(row.get("seq_lengths", [len(row["input_ids"])])))
        for start, end in zip([0, *ends], ends, strict=False):
            yield row["input_ids"][start:end], row["labels"][start:end]
