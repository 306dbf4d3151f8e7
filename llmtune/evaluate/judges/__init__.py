"""Judges: what an answer is, said by something whose own errors were measured.

A judge is a class with `id`, `version` and `judge(cases)`; its card says how often it is right. Knowing one is knowing all:
they are made from a `JudgeConfig`, and none is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from llmtune.config.judges import JudgeConfig
from llmtune.errors import ConfigError, LlmtuneError, did_you_mean

JUDGES = {
    "refusal_pattern": "llmtune.evaluate.judges.pattern:RefusalPattern",
    "openers": "llmtune.evaluate.judges.openers:Openers",
    "guard": "llmtune.evaluate.judges.guard:Guard",
    "endpoint": "llmtune.evaluate.judges.endpoint:EndpointJudge",
}
Outcome = Literal["refused", "partial", "complied", "incoherent", "unscored"]
OUTCOMES = ("refused", "partial", "complied", "incoherent", "unscored")
CARD_FIGURES = ("accuracy", "kappa", "sensitivity", "specificity")


@dataclass(frozen=True)
class Case:
    """An answer to judge. fields: what else is known of it, such as the model's own `refusal_margin`."""

    prompt: str
    response: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one case. harm: 0 to 1, None from a judge that does not know harm. reason: why it is unscored.

    `unscored` is the judge's failure and `incoherent` the model's; neither ever counts as safe.
    """

    outcome: Outcome
    harm: float | None = None
    reason: str | None = None


class Judge(Protocol):
    """id and version name what was measured: a card belongs to one version of one judge."""

    id: str
    version: str

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement a case, in the order given. A case that makes the judge fail is `unscored`, and the others are not."""
        ...


def load(config: JudgeConfig, place: Path | str) -> Judge:
    """The judge that `config` names, ready to judge; a guard's weights are read when it first judges.

    place: the file the section stands in, for messages. Raises ConfigError for what can be known before judging: an unknown
    kind, a model that is not there, a card of another judge or version.
    """
    made: Judge = judge_class(config.kind)(config, place)
    if config.card is not None:
        measured = _read_card(Path(config.card), place)["judge"]
        if measured != {"id": made.id, "version": made.version}:
            raise ConfigError(
                place,
                f"judge.card: {config.card} was measured of {measured['id']} {measured['version']}, and this judge is "
                f"{made.id} {made.version}; measure it with 'llmtune judge validate'",
            )
    return made


def judge_class(kind: str) -> Any:
    """The class that judges as `kind`. Raises ConfigError that names the nearest kind."""
    if kind not in JUDGES:
        raise ConfigError("judge", f"there is no judge '{kind}'{did_you_mean(kind, JUDGES)}")
    module, name = JUDGES[kind].split(":")
    return getattr(importlib.import_module(module), name)


def card(config: JudgeConfig) -> dict[str, Any] | None:
    """What was measured of the judge: the file `config` names, else the card shipped with it; None when nothing was."""
    if config.card is not None:
        return _read_card(Path(config.card), "judge")
    return _shipped_card(config.kind)


@functools.cache
def _shipped_card(kind: str) -> dict[str, Any] | None:
    file = resources.files("llmtune.evaluate.judges") / "cards" / f"{kind}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _read_card(file: Path, place: Path | str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = {"id", "version"} == found["judge"].keys() and all("value" in found[name] for name in CARD_FIGURES)
    except FileNotFoundError:
        raise ConfigError(place, f"judge.card: no such file: {file}; 'llmtune judge validate' writes one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ConfigError(place, f"judge.card: {file} is no card; 'llmtune judge validate' writes one")
    return dict(found)


def one_by_one(judge: Callable[[Case], Judgement], cases: Sequence[Case]) -> list[Judgement]:
    """`judge` on each case; one that fails is `unscored` with the reason. What is said to the user (LlmtuneError) goes on."""
    judgements = []
    for case in cases:
        try:
            judgements.append(judge(case))
        except LlmtuneError:
            raise
        except Exception as error:  # whatever it is, the other cases are judged, and this one counted and named
            judgements.append(Judgement("unscored", reason=f"the judge failed: {error!r}"[:300]))
    return judgements
