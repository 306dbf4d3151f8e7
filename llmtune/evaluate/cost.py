"""What each arm costs to serve: latency, throughput, memory, size. Measured apart from the scores, and never gating.

The arms answer the same prompts in turn, prompt by prompt, so that a machine that is busy with something else slows both alike:
the ratio between them holds where the seconds do not.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
import torch
from transformers import StoppingCriteria

from llmtune import stats
from llmtune.config.eval import CostConfig
from llmtune.data.tokens import encode_prompt
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.evaluate.subjects import Memory, Subject
from llmtune.evaluate.suites import Item, Suite
from llmtune.model import infer, load
from llmtune.progress import Progress, say

SEED = 0
CONFIDENCE = 0.90
ROUNDS = 3  # of all batches: one batch alone tells what else the machine was doing
LOOK_EVERY_S = 0.002
PERCENTILES = (50, 90, 99)
PEAK_IS = {
    "cuda": "weights, and what torch allocated beside them while a batch was answered (torch.cuda.max_memory_allocated)",
    "cpu": "weights, and what the process's resident set grew by while a batch was answered (looked at every 2 ms)",
}


@dataclass
class _Bench:
    """One arm with its prompts as tokens, and what was measured: `spent` a prompt, the seconds at which each token was there."""

    subject: Subject
    memory: Memory
    prompts: list[list[int]]
    new_tokens: int
    spent: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    grown: int = 0

    def alone(self, number: int, *, counts: bool) -> None:
        with self.memory.active(self.subject) as model:
            stamps = self._answer(model, [self.prompts[number]])
        if counts:
            self.spent.append(stamps)

    def together(self, numbers: Sequence[int]) -> None:
        with self.memory.active(self.subject) as model:
            at_once = 1 if infer.has_virtual_tokens(model) else len(numbers)  # PEFT mistakes padded rows there
            with _Growth(model.device) as growth:
                for start in range(0, len(numbers), at_once):
                    rows = [self.prompts[n] for n in numbers[start : start + at_once]]
                    self.seconds += self._answer(model, rows)[-1]
        self.grown = max(self.grown, growth.bytes)

    def _answer(self, model: Any, rows: list[list[int]]) -> list[float]:
        """Seconds from the start to each token of the batch. No stop token ends it: as many for every arm."""
        tokenizer = self.memory.tokenizer(self.subject)
        settings = infer.greedy_settings(model, tokenizer, self.new_tokens)
        settings.eos_token_id = None
        width = max(map(len, rows))
        ids = torch.tensor([[settings.pad_token_id] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        clock = _Clock(model.device)
        with torch.inference_mode(), infer.neutral(model, settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=[clock])
        return [stamp - clock.began for stamp in clock.stamps]


def check(settings: CostConfig, arms: dict[str, Subject], suites: Iterable[Suite], place: object) -> None:
    """Raise ConfigError where there is nothing to measure, or less than is asked for."""
    if remote := [subject.name for subject in arms.values() if subject.source is None]:
        raise ConfigError(
            place, f"cost: {remote[0]} is an endpoint, whose seconds are those of its network; leave cost out"
        )
    asked = sum(_asks(item) for suite in suites for item in suite.items)
    if asked < settings.prompts:
        raise ConfigError(
            place, f"cost.prompts: {settings.prompts} are asked for, and the suites' own items hold {asked}; lower it"
        )


def _asks(item: Item) -> bool:
    return bool(item.turns) and not item.prefill


def measure(
    settings: CostConfig, arms: dict[str, Subject], items: Iterable[Item], memory: Memory, batch_size: int
) -> dict[str, dict[str, Any]]:
    """arm -> its figures, what `cost.json` holds; an arm but the first also has its ratios to the first.

    Two models that are not an adapter and its base are both in memory meanwhile. Raises LlmtuneError where no prompt fits.
    """
    benches = _benches(settings, arms, items, memory)
    names, first = list(benches), next(iter(benches.values()))
    numbers = range(len(first.prompts))
    batches = ROUNDS * [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    with Progress(f"cost of {' and '.join(names)}", 1 + len(numbers) + len(batches)) as bar:
        for turn, number in enumerate([0, *numbers]):  # the first one twice: what is set up on first use is not counted
            for name in names if turn % 2 else reversed(names):
                benches[name].alone(number, counts=turn > 0)
            bar.advance()
        for turn, batch in enumerate(batches):
            for name in names if turn % 2 else reversed(names):
                benches[name].together(batch)
            bar.advance()
    figures = {name: _figures(bench, min(batch_size, len(numbers))) for name, bench in benches.items()}
    for name in names[1:]:
        figures[name]["ratio"] = ratios = _ratios(benches[name], first)
        told = [f"{what.removesuffix('_s').replace('_', ' ')} {one['value']:.2f} x" for what, one in ratios.items()]
        say(f"  cost of {name}: {', '.join(told)} the seconds of {names[0]}")
    return figures


def _benches(
    settings: CostConfig, arms: dict[str, Subject], items: Iterable[Item], memory: Memory
) -> dict[str, _Bench]:
    """The same drawn prompts for every arm: those that each has room for."""
    if not memory.one_model():
        memory.release()
    memories = {
        name: memory if memory.one_model() else Memory([subject], memory.dtype, memory.device)
        for name, subject in arms.items()
    }
    asked = [item for item in items if _asks(item)]
    benches = {name: _Bench(subject, memories[name], [], settings.new_tokens) for name, subject in arms.items()}
    limits = {}
    for name, bench in benches.items():
        with bench.memory.active(bench.subject) as model:
            limits[name] = infer.context_length(model) or float("inf")
    for item in random.Random(SEED).sample(asked, len(asked)):
        tokens = {
            name: encode_prompt(bench.memory.tokenizer(bench.subject), item.turns, item.tools)
            for name, bench in benches.items()
        }
        if all(len(tokens[name]) + settings.new_tokens <= limits[name] for name in benches):
            for name, bench in benches.items():
                bench.prompts.append(tokens[name])
        if len(next(iter(benches.values())).prompts) == settings.prompts:
            break
    if not all(bench.prompts for bench in benches.values()):
        raise LlmtuneError(
            f"cost: no suite has a prompt that leaves room for cost.new_tokens ({settings.new_tokens}); lower it, or leave cost out"
        )
    return benches


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing: writes down when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stamps = device, list[float]()
        self.began = self._now()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.stamps.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Growth:
    """`with _Growth(device) as growth:` `growth.bytes` is by how much memory rose at most within."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self._done = device, 0, threading.Event()
        self._process = psutil.Process()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # memory that glibc keeps for later use would hide what is needed
            self._before = self._process.memory_info().rss
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._done.set()
            self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)


def _figures(bench: _Bench, batch_size: int) -> dict[str, Any]:
    stamps, subject = np.array(bench.spent), bench.subject
    assert subject.source is not None
    with bench.memory.active(subject) as model:
        names, device = set(getattr(model, "peft_config", ())), model.device.type
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        of_adapter = {name for name in tensors if names & set(name.split("."))}
        # without those of an adapter that is beside the base and switched off
        used = tensors.keys() - (of_adapter if subject.adapter is None else set())
        weights = sum(tensors[name].nbytes for name in used)
        added = sum(weight.numel() for name, weight in model.named_parameters() if name in of_adapter & used)
    size = sum(file.stat().st_size for file in subject.source.folder.glob("*.safetensors"))
    own = sum(file.stat().st_size for file in subject.adapter.path.glob("*.safetensors")) if subject.adapter else None
    count = sum(weight.numel() for weight in load.skeleton(subject.source).parameters())
    tokens = bench.new_tokens * len(stamps)
    return {
        "size_bytes": size + (own or 0),
        "adapter_bytes": own,
        "parameters": count + added,
        "weights_bytes": weights,
        "peak_bytes": weights + bench.grown,
        "peak_is": PEAK_IS[device],
        "first_token_s": _percentiles(stamps[:, 0]),
        "per_token_s": _percentiles(np.diff(stamps, axis=1)),
        "tokens_per_s": round(ROUNDS * tokens / bench.seconds, 2),
        "tokens_per_s_alone": round(tokens / float(stamps[:, -1].sum()), 2),
        "batch_size": batch_size,
        "prompts": len(stamps),
        "new_tokens": bench.new_tokens,
    }


def _percentiles(seconds: stats.Floats) -> dict[str, float] | None:
    if not seconds.size:
        return None
    return {f"p{p}": round(float(np.percentile(seconds, p)), 6) for p in PERCENTILES}


def _ratios(bench: _Bench, first: _Bench) -> dict[str, dict[str, float]]:
    """Of seconds, to those of the first arm on the same prompt: the geometric mean over prompts, with its 90 % interval."""
    mine, theirs = np.array(bench.spent), np.array(first.spent)
    taken = {"first_token_s": (mine[:, 0], theirs[:, 0])}
    if bench.new_tokens > 1:
        taken["per_token_s"] = (mine[:, -1] - mine[:, 0], theirs[:, -1] - theirs[:, 0])
    found = {}
    for name, (a, b) in taken.items():
        logs, prompts = np.log(a / b), [str(n) for n in range(len(a))]
        low, high = stats.cluster_bootstrap_interval(logs, prompts, CONFIDENCE)
        found[name] = {"value": float(np.exp(logs.mean())), "low": float(np.exp(low)), "high": float(np.exp(high))}
    return found
