"""A run of two phases is two runs, the second on the merged first; resumed in either it is the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_partial import (
    LORA,
    WITH_VALIDATION,
    assert_equal,
    build,
    curve,
    dropout_folder,
    interrupted,
    lines,
    place,
    weights,
)

from llmtune import config, runs, scores
from llmtune.errors import ArtifactError, ConfigError
from llmtune.evaluate import arms
from llmtune.export import merge
from llmtune.model import load
from llmtune.stages import sft
from llmtune.training import checkpoints, phases

__all__ = ["dropout_folder", "place"]  # fixtures
DROPPED = LORA | {"lora_dropout": 0.2}
TRAIN = {"batch_size": 4, "micro_batch_size": 4, "eval_steps": 2, "learning_rate": 1e-2, "max_steps": 4}
SECOND = {"trainable": {"top_blocks": 1, "head": True}, "max_steps": 4}


def phased(place: Path, base: Path, name: str, *, train: dict | None = None, second: dict | None = None, **sections):
    sections = {"adapter": DROPPED, **sections}
    return build(
        place, base, name, data=WITH_VALIDATION, train={**TRAIN, **(train or {})}, second_phase={**SECOND, **(second or {})}, **sections
    )  # fmt: skip


def test_two_phases_are_two_runs(place: Path, tiny_folder: Path) -> None:
    made = sft.run(phased(place, tiny_folder, "both"))
    first = sft.run(build(place, tiny_folder, "first", data=WITH_VALIDATION, train=TRAIN, adapter=DROPPED))
    source = load.find(str(tiny_folder))
    adapted = PeftModel.from_pretrained(load.load_model(source, "float32"), first.path)
    adapted.merge_and_unload(safe_merge=True).save_pretrained(place / "merged")
    load.load_tokenizer(source).save_pretrained(place / "merged")
    rest = {"learning_rate": 1e-2 * 0.1, "early_stopping": {"patience": 3}}
    second = sft.run(
        build(
            place, place / "merged", "second", data=WITH_VALIDATION, train=TRAIN | rest, trainable=SECOND["trainable"]
        )
    )
    assert made.kind == "model"
    assert curve(made) == curve(first) + curve(second)
    ours, theirs = weights(made), weights(second)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_both_phases_are_told(place: Path, tiny_folder: Path, capsys) -> None:
    made = sft.run(phased(place, tiny_folder, "run"))
    facts, metrics = made.manifest, made.manifest["metrics"]
    assert metrics["steps"] == 8 and metrics["kept_phase"] == 2 and metrics["best_step"] in (6, 8)
    assert [phase["metrics"]["steps"] for phase in facts["phases"]] == [4, 4]
    assert facts["phases"][0]["adapter"]["method"] == "lora" and facts["trained"] == facts["phases"][1]["trained"]
    assert all(name.startswith(("model.layers.1.", "model.embed_tokens.")) for name in facts["trained"])
    seen = lines(made)
    assert [(line["phase"], line["step"]) for line in seen if "loss" in line] == [
        (1 + (step > 4), step) for step in range(1, 9)
    ]
    validated = [(line["phase"], line["step"]) for line in seen if "validation_loss" in line]
    assert validated == [(1, 2), (1, 4), (2, 4), (2, 6), (2, 8)]
    assert "phase 2 lowers the validation loss" in capsys.readouterr().err
    assert "phase 2" in (made.path / "curves.svg").read_text()
    assert not (place / "run" / "checkpoints").exists()
    (listed,) = runs.find(place / "run")
    assert (listed.method, listed.steps) == ("lora, then partial", 8)


def test_resumed_in_either_phase_equals_uninterrupted_to_the_bit(place, dropout_folder, monkeypatch) -> None:
    whole = sft.run(phased(place, dropout_folder, "whole"))
    cut = phased(place, dropout_folder, "cut")
    for phases_done in (0, 1):
        interrupted(cut, monkeypatch, 3, after=phases_done)
        assert (place / "cut" / "checkpoints" / f"phase-{1 + phases_done}" / "checkpoint-3").is_dir()
    assert_equal(whole, sft.run(cut))


def test_a_run_cut_between_its_phases_goes_on_with_the_second(place: Path, tiny_folder: Path, monkeypatch) -> None:
    whole = sft.run(phased(place, tiny_folder, "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(phases, "_kept", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sft.run(phased(place, tiny_folder, "cut"))
    first = place / "cut" / "checkpoints" / "phase-1"
    assert checkpoints.whole(first / "model") and not list(first.glob("checkpoint-*"))
    with pytest.raises(ConfigError, match=r"second_phase\.learning_rate_factor was 0\.1 and is 0\.5"):
        sft.run(phased(place, tiny_folder, "cut", second={"learning_rate_factor": 0.5}))
    assert_equal(whole, sft.run(phased(place, tiny_folder, "cut")))


def test_a_second_phase_that_does_not_help_is_not_kept(place: Path, tiny_folder: Path, capsys) -> None:
    harmful = {"learning_rate_factor": 1.0}
    made = sft.run(
        phased(place, tiny_folder, "run", train={"learning_rate": 0.5, "scheduler": "constant"}, second=harmful)
    )
    metrics, both = made.manifest["metrics"], made.manifest["phases"]
    assert metrics["kept_phase"] == 1 and metrics["validation_loss"] == both[0]["metrics"]["validation_loss"]
    assert metrics["best_step"] == both[0]["metrics"]["best_step"] <= 4
    assert "phase 2 does not lower the validation loss" in (said := capsys.readouterr().err)
    assert "the weights of phase 1 are the result" in said
    assert "trained" not in made.manifest and made.kind == "model"
    first = sft.run(
        build(place, tiny_folder, "first", data=WITH_VALIDATION, train=TRAIN | {"learning_rate": 0.5, "scheduler": "constant"}, adapter=DROPPED)
    )  # fmt: skip
    assert metrics["validation_loss"] == first.manifest["metrics"]["validation_loss"]


def test_a_first_phase_may_train_a_part_of_the_weights(place: Path, tiny_folder: Path) -> None:
    made = sft.run(
        phased(place, tiny_folder, "run", adapter=None, trainable={"norms": True}, train={"layer_decay": 0.5}, second={"trainable": {"top_blocks": 2}})
    )  # fmt: skip
    assert all("norm" in name for name in made.manifest["phases"][0]["trained"])
    assert len(made.manifest["phases"][1]["trained"]) == 18


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"train": "./train.jsonl"}, "train": {"eval_steps": None}}, r"second_phase: needs data\.validation"),
        ({"adapter": None}, "the first phase trains every weight already"),
        ({"adapter": {"method": "prompt_tuning", "num_virtual_tokens": 2}}, "cannot be merged into the weights"),
        ({"second": {"epochs": 1.0}}, "set exactly one of 'epochs' and 'max_steps'"),
        ({"second": {"learning_rate_factor": 2.0}}, "less than or equal to 1"),
        ({"model": {"name": "x/y", "quantize": "nf4"}}, "the weights of a quantised base cannot be trained"),
    ],
)
def test_phases_that_cannot_follow_each_other_are_refused(place, tiny_folder, changes, reason) -> None:
    raw = json.loads(phased(place, tiny_folder, "run").model_dump_json(exclude_unset=True))
    for key, value in changes.items():
        section = "second_phase" if key == "second" else key
        raw[section] = value if key in ("adapter", "data", "model") else raw[section] | value
    with pytest.raises(ConfigError, match=reason):
        config.build({key: value for key, value in raw.items() if value is not None}, place / "sft.yaml")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"second": {"trainable": {"top_blocks": 3}}}, "top_blocks: 3 is more than the 2 blocks"),
        ({"second": {"trainable": {"top_blocks": 1}}, "train": {"layer_decay": 0.5}}, "layer_decay: has no effect"),
        ({"second": {"trainable": {"pattern": "nothing"}}}, "is found in no parameter's name"),
    ],
)
def test_what_the_second_phase_cannot_train_is_told_before_the_first(place, tiny_folder, monkeypatch, changes, reason):
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=reason):
        sft.run(phased(place, tiny_folder, "run", **changes))
    assert not (place / "run").exists()


def test_a_whole_model_is_evaluated_against_its_base_and_not_merged(place: Path, tiny_folder: Path) -> None:
    sft.run(phased(place, tiny_folder, "run"))
    suite = {
        "suite": "answers", "description": "answers", "licence": "own", "items": "./items.jsonl",
        "metrics": ["loss"], "gate": {"loss": {"margin": 5.0}},
    }  # fmt: skip
    (place / "answers.yaml").write_text(json.dumps(suite))
    items = [{"id": f"i{n}", "prompt": f"train {'x' * n}", "answer": "y" * (8 - n) + "!"} for n in range(8)]
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = {"stage": "eval", "run": "./run", "suites": ["./answers.yaml"], "batch_size": 4}
    made = arms.run(config.build(settings, place / "eval.yaml"), place / "eval.yaml")
    records = scores.read(made.path / scores.FILE)
    means = {arm: sum(r.value for r in records if r.arm == arm) / 8 for arm in ("base", "tuned")}
    assert means["tuned"] < means["base"] - 0.5  # the very rows it was trained on
    with pytest.raises(ArtifactError, match="is a whole model already; there is nothing to merge"):
        merge.run(place / "run")


def test_an_adapter_that_has_no_merge_is_told_before_its_training(place: Path, tiny_folder: Path) -> None:
    lily = {"method": "lily", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(ConfigError, match="second_phase: a lily adapter cannot be merged: it mixes its experts anew"):
        sft.run(phased(place, tiny_folder, "run", adapter=lily))


def test_two_phases_are_not_spread_over_processes(place: Path, tiny_folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"second_phase: .* was not tried under FSDP"):
        sft.run(phased(place, tiny_folder, "spread"))
