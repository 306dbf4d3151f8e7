"""What may stand in a run file of `llmtune eval`, and in a suite."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from llmtune.config import LocalPath, PathOrHub, Section
from llmtune.config.data import ColumnMap

Metric = Literal["loss", "rouge_l", "exact_match", "one_sentence", "answer_tokens", "complied", "refused"]
GENERATED = {"rouge_l", "exact_match", "one_sentence", "answer_tokens", "complied", "refused"}
"""Metrics of the model's own answer; `loss` needs none."""


class Rule(Section):
    """What a metric must show for the gate to pass."""

    margin: float | None = Field(None, ge=0, description="the tuned model is not worse than the base by this much")
    improves_by: float | None = Field(
        None, ge=0, description="the tuned model is better than the base by more than this"
    )

    @model_validator(mode="after")
    def _one(self) -> Rule:
        if (self.margin is None) == (self.improves_by is None):
            raise ValueError("a gate rule has exactly one of 'margin' and 'improves_by'")
        return self


class SuiteConfig(Section):
    """Items and what is measured on them: our own items, or tasks of lm-eval."""

    suite: str
    description: str
    licence: str
    items: PathOrHub | None = Field(None, description="rows with a prompt and, for loss and overlap, an answer")
    columns: ColumnMap | None = None
    metrics: list[Metric] = Field(default_factory=list)
    max_new_tokens: PositiveInt | None = Field(None, description="length limit of an answer")
    generate_items: PositiveInt | None = Field(None, description="answer only so many items, drawn by a fixed seed")
    few_shot: bool = Field(False, description="also measure the base with examples in its prompt")
    hidden: bool = Field(False, description="collapse prompts and answers in the report")
    lm_eval: list[str] = Field(default_factory=list, description="tasks of lm-eval, shipped (evals/tasks) or its own")
    limit: PositiveInt | None = Field(None, description="lm-eval: so many items a task, drawn by a fixed seed")
    gate: dict[str, Rule] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rules(self) -> SuiteConfig:
        if bool(self.lm_eval) == (self.items is not None):
            raise ValueError("a suite has either 'items' with 'metrics', or 'lm_eval' tasks")
        ours = {"metrics", "columns", "max_new_tokens", "generate_items", "few_shot", "hidden"}
        without = (ours if self.lm_eval else {"limit"}) & self.model_fields_set
        if without:
            raise ValueError(f"{min(without)}: has no effect {'with lm_eval tasks' if self.lm_eval else 'with items'}")
        if self.items is not None:
            if not self.metrics:
                raise ValueError("metrics: required with 'items'")
            if (self.max_new_tokens is not None) != bool(GENERATED & set(self.metrics)):
                raise ValueError("max_new_tokens: required with, and only with, a metric of the model's own answer")
            if unknown := set(self.gate) - set(self.metrics):
                raise ValueError(f"gate.{min(unknown)}: is not among this suite's metrics")
        return self


class FewShotConfig(Section):
    """The rung below any tuning: the base with examples in its prompt."""

    examples: PathOrHub = Field(description="rows to draw the examples from, such as the training file")
    k: PositiveInt = 3
    seed: int = Field(0, ge=0)


class EvalConfig(Section):
    """Base and tuned on the same items, in one process."""

    stage: Literal["eval"]
    run: LocalPath = Field(description="a finished run: the folder that holds adapter/")
    suites: list[str] = Field(min_length=1, description="names of shipped suites, or ./paths of your own")
    few_shot: FewShotConfig | None = None
    batch_size: PositiveInt = Field(16, description="items per forward pass, the same for every arm")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: what the base ran in when it was tuned"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
