"""Does the merged model equal its adapter? Two questions, because storage in bfloat16 moves a correct merge.

Algebra: merged in float32, the logits must equal those of base + adapter in float32 (max difference <= 5e-4, KL <= 1e-6).
Storage: what lies on disk may be as far from the float32 adapter as the live adapter in the same dtype is, times 1.5, and its
held-out loss may not be worse by 0.01 nats. Greedy texts are shown and decide nothing: a correct merge changes 7 of 24.

An adapter that was trained on a quantised base is merged into another base than the one that was evaluated (see candidates), so
a third question is asked of it. Distance: against the live model that was evaluated, held-out loss may not be worse by 0.01 nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from llmtune import stats
from llmtune.data.tokens import TokenRow
from llmtune.model import infer

MAX_LOGIT_DIFFERENCE = 5e-4
MAX_KL = 1e-6
NOISE_RATIO = 1.5
MAX_LOSS_INCREASE = 0.01


@dataclass(frozen=True)
class Readings:
    """One model's view of the probes: log-probabilities per row, shape (tokens, vocabulary), and held-out losses."""

    logits: list[torch.Tensor]
    losses: list[float]


@dataclass(frozen=True)
class Algebra:
    max_logit_difference: float
    kl: float
    tolerance_logit: float
    tolerance_kl: float
    holds: bool


@dataclass(frozen=True)
class Storage:
    kl: float
    noise_floor: float
    ratio: float
    limit: float
    loss_adapter: float
    loss_merged: float
    loss_bound: float
    loss_limit: float
    holds: bool


@dataclass(frozen=True)
class Distance:
    """How far the stored model is from the one that was evaluated."""

    kl: float
    loss_evaluated: float
    loss_stored: float
    loss_bound: float
    loss_limit: float
    holds: bool


def read_model(model: Any, probes: list[list[int]], held_out: list[TokenRow], pad_id: int) -> Readings:
    """Run the probes, one a pass, and the held-out rows."""
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in probes]
    return Readings(logits, infer.token_losses(model, held_out, pad_id))


def algebra(reference: Readings, merged: Readings) -> Algebra:
    """float32 merged against float32 adapter."""
    pairs = list(zip(reference.logits, merged.logits, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    divergence = kl(reference, merged)
    holds = difference <= MAX_LOGIT_DIFFERENCE and divergence <= MAX_KL
    return Algebra(difference, divergence, MAX_LOGIT_DIFFERENCE, MAX_KL, holds)


def storage(reference: Readings, live: Readings, stored: Readings) -> Storage:
    """What lies on disk against the float32 adapter, measured by how far the live adapter in that dtype is from it."""
    divergence, floor, bound = kl(reference, stored), kl(reference, live), _loss_bound(reference, stored)
    limit = NOISE_RATIO * max(floor, MAX_KL)
    return Storage(
        kl=divergence,
        noise_floor=floor,
        ratio=divergence / max(floor, MAX_KL),
        limit=limit,
        loss_adapter=float(np.mean(reference.losses)),
        loss_merged=float(np.mean(stored.losses)),
        loss_bound=bound,
        loss_limit=MAX_LOSS_INCREASE,
        holds=divergence <= limit and bound < MAX_LOSS_INCREASE,
    )


def distance(evaluated: Readings, stored: Readings) -> Distance:
    """What lies on disk against the live adapter on its quantised base, in the dtype that was evaluated."""
    bound = _loss_bound(evaluated, stored)
    losses = float(np.mean(evaluated.losses)), float(np.mean(stored.losses))
    return Distance(kl(evaluated, stored), *losses, bound, MAX_LOSS_INCREASE, bound < MAX_LOSS_INCREASE)


def differing_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of stored tensors that are not, bit for bit, what the float32 merge rounds to; missing and extra ones too."""
    found = dict(_stored(folder))
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is not of this model" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        tensor, want = found[name], expected[name]
        if tensor.shape != want.shape or not torch.equal(tensor, want.to(tensor.dtype).cpu()):
            wrong.append(name)
    return sorted(wrong)


def facts(
    first: Algebra, second: Storage, third: Distance | None, dtype: str, texts: list[dict[str, str]]
) -> dict[str, Any]:
    """The `proof` entry of the manifest."""
    found = {"algebra": asdict(first), "storage": asdict(second), "dtype": dtype, "texts": texts}
    return found if third is None else {**found, "distance": asdict(third)}


def _loss_bound(reference: Readings, other: Readings) -> float:
    """By how much the held-out loss of `other` is worse at most: the upper end of a paired 90 % interval."""
    worse = np.array(other.losses) - np.array(reference.losses)
    return stats.cluster_bootstrap_interval(worse, [str(n) for n in range(len(worse))], confidence=0.90)[1]


def kl(reference: Readings, other: Readings) -> float:
    """Mean KL(reference || other) over all positions, in nats."""
    total, positions = 0.0, 0
    for a, b in zip(reference.logits, other.logits, strict=True):
        p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
        total += float((p.exp() * (p - q)).sum())
        positions += len(a)
    return total / positions


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)
