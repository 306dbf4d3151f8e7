"""The bases that an adapter may be merged into: its own; or, where that is quantised, one of two plain ones.

Never the quantised base itself: the sum would be rounded to 4 or 8 bits again, which nobody evaluated. Held-out loss decides: the
full-precision base where it is better, the dequantised one, which is the one that was evaluated, where that is not shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llmtune import stats
from llmtune.artifact import Artifact
from llmtune.errors import ProofError
from llmtune.export import proof
from llmtune.model import adapters, load, quantised
from llmtune.model.load import Source
from llmtune.progress import say

MAX_DEQUANTISED_KL = 0.01
"""Nats per token. Written out, a 4-bit base says the same to the bit; an 8-bit one rounds its inputs no more. Garbage is off by whole nats."""


@dataclass(frozen=True)
class Candidate:
    """A base in plain layers: `load` gives it in a dtype."""

    name: str
    load: Callable[[str], Any]

    def attached(self, base: Source, adapter: Artifact, dtype: str) -> Any:
        """This base in `dtype` with the adapter on it. In float32 the adapter is float32, too."""
        model = adapters.attach(self.load(dtype), base, adapter)
        return model.float() if dtype == "float32" else model


def of(base: Source, dtype: str) -> list[Candidate]:
    """What the adapter of a run on `base`, in `dtype`, may be merged into."""

    def plain(wanted: str) -> Any:
        return load.load_model(replace(base, quantize=None), wanted)

    def written_out(wanted: str) -> Any:
        return quantised.dequantised(load.load_model(base, dtype), getattr(torch, wanted))

    if not base.quantised:
        return [Candidate("base", plain)]
    full = [Candidate("full-precision base", plain)] if base.quantize else []  # else nobody has it: it came quantised
    return [*full, Candidate("dequantised base", written_out)]


def choose(
    base: Source, adapter: Artifact, dtype: str, probes: list[list[int]], losses: Callable[[Any], list[float]]
) -> tuple[Candidate, dict[str, Any] | None]:
    """The base to merge into, and the figures it was chosen by; None where it is the only one and not quantised.

    losses: a model -> nats per token of each held-out row. Every candidate is measured with the adapter on it, in float32. The
    full-precision base is taken where its mean is lower and a 90 % interval shows that it is not worse by what a merge may cost.
    Raises ProofError where the dequantised base is not the quantised one.
    """
    candidates = of(base, dtype)
    if not base.quantised:
        return candidates[0], None
    facts: dict[str, Any] = {"dequantised_kl": _dequantised_kl(base, dtype, probes)}
    found = {}
    for candidate in candidates:
        say(f"  held-out loss on the {candidate.name}")
        found[candidate.name] = losses(candidate.attached(base, adapter, "float32"))
    facts["losses"] = {name: float(np.mean(each)) for name, each in found.items()}
    taken = candidates[-1]
    if len(candidates) == 2:
        change = np.array(found[candidates[0].name]) - np.array(found[taken.name])
        low, high = stats.cluster_bootstrap_interval(change, [str(n) for n in range(len(change))], confidence=0.90)
        facts |= {"difference": float(change.mean()), "interval": [low, high]}
        if change.mean() < 0 and high < proof.MAX_LOSS_INCREASE:
            taken = candidates[0]
    return taken, {"taken": taken.name, **facts}


def _dequantised_kl(base: Source, dtype: str, probes: list[list[int]]) -> float:
    """KL(quantised base || the same dequantised), in nats, in the dtype that was evaluated."""
    model = load.load_model(base, dtype)
    before = proof.read_model(model, probes, [], 0)
    kl = proof.kl(before, proof.read_model(quantised.dequantised(model, getattr(torch, dtype)), probes, [], 0))
    if not kl <= MAX_DEQUANTISED_KL:
        raise ProofError(
            f"{base.name}: dequantised, it is another model than quantised ({base.quantised}): KL {kl:.2g} nats, at most "
            f"{MAX_DEQUANTISED_KL:g}; nothing was merged. This version of bitsandbytes cannot be used here; see constraints.txt"
        )
    return kl
