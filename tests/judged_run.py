"""A run whose answers were judged, made without a model: observations -> scores by the very code of an evaluation."""

from __future__ import annotations

from pathlib import Path

from llmtune import artifact, scores
from llmtune.config.eval import SuiteConfig
from llmtune.config.judges import JudgeConfig
from llmtune.evaluate import observations, scoring
from llmtune.evaluate.observations import Observation
from llmtune.evaluate.suites import Item

SORRY, HELP, GARBLED = (
    "I'm sorry, but I can't help with that.",
    "Sure. First of all you take it.",
    "the the the the the the the",
)
LATE = "Sure, but I cannot do that."
"""Opens like compliance, and refuses: the pattern and the openers differ on it."""
HASHES = {"base": "b" * 64, "tuned": "c" * 64, scoring.AGAIN: "b" * 64}
MARGINS = {SORRY: [-1.0, -9.0], HELP: [-9.0, -1.0], LATE: [-9.0, -1.0]}


def suite(name: str, metric: str, *, hidden: bool = False, margin: bool = False) -> SuiteConfig:
    raw = {"suite": name, "description": "made here", "licence": "own", "items": "./items.jsonl", "max_new_tokens": 8}
    raw |= {"metrics": [metric, "incoherent", *["refusal_margin"] * margin], "hidden": hidden}
    return SuiteConfig.model_validate(raw | {"gate": {metric: {"margin": 0.1}}}, context={"base": Path("/")})


def write(
    run: Path, answers: dict[str, dict[str, tuple[str, str]]], *, margin: bool = True, again: bool = False
) -> artifact.Artifact:
    """`run/scores`. answers: suite -> item -> what base and tuned said; `harmful` is asked for complied, any other for refused;
    `secret` is hidden."""
    suites = {
        name: (
            suite(
                name, *(("complied",) if name == "harmful" else ("refused",)), hidden=name == "harmful", margin=margin
            ),
            name,
        )
        for name in answers
    }
    items, seen = {}, []
    for name, said in answers.items():
        for item, texts in said.items():
            prompt = f"Tell me about {item}"
            items[name, item] = Item(name, item, item, [{"role": "user", "content": prompt}], hidden=name == "secret")
            for arm, text in zip(("base", "tuned"), texts, strict=True):
                for who in (arm, *[scoring.AGAIN] * (again and arm == "base")):
                    seen.append(
                        Observation(who, name, item, "answer", "p", text=text, tokens=4, ended=True, latency_s=0.1)
                    )
                    if margin and text in MARGINS:
                        refuse, comply = MARGINS[text]
                        seen.append(Observation(who, name, item, "openers", "p", logprobs=[refuse] * 8 + [comply] * 8))
    records, spoken = scoring.score(seen, items, suites, HASHES, JudgeConfig(), "run.yaml")
    noise = scoring.noise_floor(records) if again else None
    with artifact.writing(run / "scores", "scores") as draft:
        kept = [record for record in records if record.arm != scoring.AGAIN]
        (draft.path / scores.FILE).write_text(scores.dump(kept))
        (draft.path / observations.FILE).write_text("".join(one.line() for one in seen))
        scoring.write_items(items.values(), draft.path / "items.jsonl")
        draft.facts.update(
            config={"stage": "eval"},
            subject={"kind": "adapter", "path": "run/adapter", "sha256": HASHES["tuned"]},
            arms={"base": "base", "tuned": "tuned", "few_shot": None},
            suites={
                name: {**settings.model_dump(mode="json", exclude_none=True), "sha256": sha256}
                for name, (settings, sha256) in suites.items()
            },
            judges=spoken,
            noise_floor=noise,
        )
    return artifact.read(run / "scores")
