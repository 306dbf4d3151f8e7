"""Are a suite's prompts like those of training, and is the tuned model worse where they are not? Two questions, kept apart.

A classifier on embeddings tells almost any two topics apart: between review sites it reached an AUC of .99 while accuracy fell by
a few points at most. So "distinguishable" is never the verdict. Harm is: worse than the base on this suite, and more so than on the
suite that is nearest to training.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune import stats
from llmtune.config.eval import ShiftConfig
from llmtune.data.chats import Chat, load_chats
from llmtune.errors import ConfigError
from llmtune.evaluate.contamination import Trained
from llmtune.evaluate.suites import Item
from llmtune.model import encoder
from llmtune.progress import Progress, say
from llmtune.scores import Score

MOST_TRAINING, MOST_ITEMS = 1_000, 500  # prompts embedded, drawn by a seed
LEAST = 20  # distinct prompts, and clusters, below which nothing is said
PERMUTATIONS, FOLDS = 200, 5
CONFIDENCE = 0.90  # two-sided: each end is a one-sided 95 % bound
LEAST_CHANGED = 10  # clusters; with fewer a bootstrap sees no tail
COMPARED = ("loss", "nll", "brier", "acc", "rouge_l", "exact_match", "text_loss", "incoherent", "repetition")
"""Metrics that mean the same on any suite, the first that two suites share being compared. Lengths do not."""

Vectors = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Change:
    """tuned - base, one value an item, in the metric's own unit; clusters: what is resampled together."""

    values: stats.Floats
    clusters: list[str]
    higher_is_better: bool

    @property
    def worse(self) -> stats.Floats:
        """Positive where the tuned model is worse."""
        return -self.values if self.higher_is_better else self.values


@dataclass(frozen=True)
class Domain:
    """A suite's prompts against those of training. auc: None where either side has fewer than LEAST distinct prompts."""

    n: int
    auc: float | None
    auc_null_95: float | None

    @property
    def distinguishable(self) -> bool | None:
        return None if self.auc is None or self.auc_null_95 is None else self.auc > self.auc_null_95


def check(settings: ShiftConfig, trained: Trained, place: object) -> None:
    """Raise ConfigError where the training rows or the encoder cannot be had. Nothing is loaded."""
    if settings.rows is None and trained.missing:
        raise ConfigError(place, f"shift.rows: required here, since {trained.missing}")
    encoder.find(settings.encoder, "shift.encoder")


def measure(
    settings: ShiftConfig, items: Iterable[Item], records: Iterable[Score], trained: Trained, device: str
) -> dict[str, dict[str, Any]]:
    """What `shift.json` holds: the prompts of every suite against those of training, and the changes there (see `summarise`)."""
    chats = load_chats(settings.rows, training=True, answers=False) if settings.rows else trained.chats()
    training, rows = draw(((str(n), _asked(chat)) for n, chat in enumerate(chats)), MOST_TRAINING)
    prompts: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        prompts.setdefault(item.suite, []).append((item.cluster_id, item.question))
    drawn = {suite: draw(pairs, MOST_ITEMS)[0] for suite, pairs in prompts.items()}
    reader = encoder.build(encoder.find(settings.encoder, "shift.encoder"), device)
    with Progress("shift: prompts read", len(training) + sum(map(len, drawn.values()))) as bar:
        of_training = encoder.encode(reader, training, bar.advance)
        domains = {
            suite: distinguish(of_training, encoder.encode(reader, texts, bar.advance))
            for suite, texts in drawn.items()
        }
    found = summarise(domains, changes(records, "base", "tuned"), {"rows": rows, "drawn": len(training)})
    for suite, entry in found.items():
        say(f"  {suite}: {entry['says']}")
    return found


def _asked(chat: Chat) -> str:
    return str(chat.prompt[-1]["content"]) if chat.prompt else str(chat.turns[-1]["content"])


def distinguish(training: Vectors, items: Vectors, seed: int = 0) -> Domain:
    """How well a classifier tells items from training rows, on rows it did not see, and how well it would by chance.

    training, items: shape (n, dimensions). The AUC is .5 where the two are alike. By chance: the 95 % point over PERMUTATIONS
    relabelings at random of the same rows, so that two samples of one distribution are called distinguishable one time in twenty.
    The classifier is ridge regression on the labels (Fisher's discriminant): all relabelings are solved at once, and on MiniLM's vectors its
    AUC is that of logistic regression within .02 at 100 items.
    """
    if min(len(training), len(items)) < LEAST:
        return Domain(len(items), None, None)
    rng, rows = np.random.default_rng(seed), np.concatenate([training, items]).astype(np.float64)
    is_item = np.arange(len(rows)) >= len(training)
    labels = np.column_stack([is_item, *(rng.permutation(is_item) for _ in range(PERMUTATIONS))]).astype(np.float64)
    fold, scores = rng.permutation(len(rows)) % FOLDS, np.empty_like(labels)
    for number in range(FOLDS):
        held_out = fold == number
        seen, mean = rows[~held_out], rows[~held_out].mean(axis=0)
        square = (seen - mean).T @ (seen - mean)
        square[np.diag_indices_from(square)] += np.trace(square) / len(square)
        weights = np.linalg.solve(square, (seen - mean).T @ (labels[~held_out] - labels[~held_out].mean(axis=0)))
        scores[held_out] = (rows[held_out] - mean) @ weights
    ranks = scores.argsort(axis=0).argsort(axis=0)
    least = len(items) * (len(items) - 1) / 2
    areas = ((ranks * labels).sum(axis=0) - least) / (len(items) * len(training))
    return Domain(len(items), float(areas[0]), float(np.quantile(areas[1:], 0.95)))


def draw(prompts: Iterable[tuple[str, str]], most: int, seed: int = 0) -> tuple[list[str], int]:
    """At most `most` distinct prompts, one a cluster, drawn by the seed, and how many rows there were.

    prompts: (cluster, prompt), read once; memory is bounded by `most` (Vitter 1985, algorithm R). Wordings of one cluster are alike
    among themselves, which would pass for a difference from training.
    """
    rng, kept, number = random.Random(seed), list[tuple[str, str]](), 0
    for number, pair in enumerate(prompts, 1):
        if len(kept) < most:
            kept.append(pair)
        elif (place := rng.randrange(number)) < most:
            kept[place] = pair
    rng.shuffle(kept)
    return list(dict.fromkeys(dict(kept).values())), number


def changes(records: Iterable[Score], base: str, tuned: str) -> dict[str, dict[str, Change]]:
    """suite -> metric -> tuned against base on every item that both have a value for and that is not excluded."""
    found: dict[tuple[str, str], dict[str, dict[str, Score]]] = {}
    for score in records:
        if score.arm in (base, tuned) and score.value is not None and score.excluded is None:
            found.setdefault((score.suite, score.metric), {}).setdefault(score.item_id, {})[score.arm] = score
    made: dict[str, dict[str, Change]] = {}
    for (suite, metric), items in found.items():
        pairs = [(arms[base], arms[tuned]) for arms in items.values() if len(arms) == 2]
        if pairs:
            values = np.array([(b.value or 0.0) - (a.value or 0.0) for a, b in pairs])
            made.setdefault(suite, {})[metric] = Change(
                values, [a.cluster_id for a, _ in pairs], pairs[0][0].higher_is_better
            )
    return made


def summarise(
    domains: Mapping[str, Domain], measured: Mapping[str, Mapping[str, Change]], training: Mapping[str, int]
) -> dict[str, Any]:
    """What `shift.json` holds: an entry a suite, each with a sentence. training: how many rows there are, and how many were drawn."""
    entries = {}
    for suite, domain in domains.items():
        nearer = [other for other, its in domains.items() if its.auc is not None and its.auc < (domain.auc or 0.0)]
        reference = min(nearer, key=lambda other: domains[other].auc or 0.0, default=None)
        harm = _harm(measured.get(suite, {}), reference, measured.get(reference or "", {}))
        entries[suite] = {
            "n": domain.n,
            "training": dict(training),
            "auc": domain.auc,
            "auc_null_95": domain.auc_null_95,
            "distinguishable": domain.distinguishable,
            "harm": harm,
            "says": _says(domain, reference and f"{reference} (AUC {domains[reference].auc:.2f})", harm),
        }
    return entries


def _harm(here: Mapping[str, Change], reference: str | None, there: Mapping[str, Change]) -> dict[str, Any] | None:
    """delta, low, high: tuned - base here; excess: how much more it is for the worse than on the reference."""
    metric = next((name for name in COMPARED if name in here and name in there), None)
    if metric is None or min(len(set(one.clusters)) for one in (here[metric], there[metric])) < LEAST:
        return None
    own, nearest = here[metric], there[metric]
    worse = interval(own.worse, own.clusters)
    excess = difference(worse, interval(nearest.worse, nearest.clusters))
    _, low, high = worse
    harmful = low > 0 and excess[1] > 0
    return {
        "metric": metric,
        "delta": float(own.values.mean()),
        "low": -high if own.higher_is_better else low,
        "high": -low if own.higher_is_better else high,
        "reference": reference,
        "reference_delta": float(nearest.values.mean()),
        "excess": dict(zip(("value", "low", "high"), excess, strict=True)),
        "verdict": "harmful" if harmful else "not shown harmful",
    }


def interval(values: stats.Floats, clusters: Sequence[str]) -> tuple[float, float, float]:
    """The mean and its 90 % interval: by scores where values are 0, 1 and -1 or few clusters changed, else by the cluster bootstrap."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    changed = np.count_nonzero(np.bincount(index, weights=values))
    if changed < LEAST_CHANGED or set(np.unique(values)) <= {-1.0, 0.0, 1.0}:
        spread = float(np.abs(values).max()) or 1.0
        return float(values.mean()), *stats.tango_over_clusters(values, clusters, CONFIDENCE, spread)
    return float(values.mean()), *stats.cluster_bootstrap_interval(values, clusters, CONFIDENCE)


def difference(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float, float]:
    """The difference of two independent means, each with its interval, and the 90 % interval of it.

    Source: Zou & Donner 2008, Statistics in Medicine 27:1693-1702 (MOVER).
    """
    (a, a_low, a_high), (b, b_low, b_high) = one, other
    low, high = np.hypot(a - a_low, b_high - b), np.hypot(a_high - a, b - b_low)
    return a - b, a - b - float(low), a - b + float(high)


def _says(domain: Domain, reference: str | None, harm: dict[str, Any] | None) -> str:
    if domain.auc is None:
        return (
            f"too few distinct prompts to compare, here ({domain.n}) or in training: {LEAST} are needed on both sides"
        )
    alike = "distinguishable from" if domain.distinguishable else "not distinguishable from"
    by = f"(AUC {domain.auc:.2f}, by chance up to {domain.auc_null_95:.2f})"
    if reference is None:
        return f"{alike} the training prompts {by}; no suite of this run is nearer to them, to compare with"
    if harm is None:
        return f"{alike} the training prompts {by}; harm is not judged: {reference} shares no metric with {LEAST} independent items"
    figures = f"{harm['metric']} changes by {harm['delta']:+.3g}, and by {harm['reference_delta']:+.3g} on {reference}"
    if harm["verdict"] == "harmful":
        return (
            f"{alike} the training prompts {by}, and harmful: {figures}; worse than the base here, and more than there"
        )
    return f"{alike} the training prompts {by}, not shown harmful: {figures}"
