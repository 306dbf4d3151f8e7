"""The stage whole, on a tiny random Llama: what it writes, what it keeps, how it stops and goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune import artifact, config
from llmtune.errors import ConfigError, DataError, LlmtuneError, Preempted
from llmtune.stages import sft
from llmtune.training import callbacks, setup, trainer

ROWS = 16


@pytest.fixture
def run_file(tmp_path: Path, tiny_folder: Path):
    """Writes a run file with what is given on top of a small float32 LoRA run; returns its loaded config."""

    def write(name: str = "run", **changes: object) -> config.Section:
        for split, number in (("train", ROWS), ("validation", 4)):
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": f"{split} {i} plus {i}?"},
                        {"role": "assistant", "content": str(2 * i) + "!" * i},
                    ]
                }
                for i in range(number)
            ]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw = {
            "stage": "sft",
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
            "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1},
            "train": {"max_steps": 8, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "eval_steps": 2},
            "output_dir": f"./{name}",
        }
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            if not leaf and value is None:
                del raw[section]
            elif leaf:
                raw[section][leaf] = value
            else:
                raw[section] = value
        return config.build(raw, tmp_path / "sft.yaml")

    return write


def weights(made: artifact.Artifact) -> dict[str, torch.Tensor]:
    return load_file(next(made.path.glob("*.safetensors")))


def test_an_adapter_run_leaves_what_a_peft_user_and_a_reader_need(run_file, tmp_path: Path) -> None:
    made = sft.run(run_file())
    names = {file.name for file in made.path.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "curves.svg",
        "chat_template.jinja",
    } <= names
    facts = made.manifest
    assert facts["data"]["train"]["rows"] == ROWS
    assert facts["data"]["train"]["sources"][0]["sha256"] == artifact.sha256_file(tmp_path / "train.jsonl")
    assert facts["base"]["licence"] and facts["seeds"] == {"seed": 0} and facts["metrics"]["steps"] == 8
    assert not (tmp_path / "run" / "checkpoints").exists()
    lines = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4, 6, 8]


def test_training_lowers_the_loss_on_what_it_saw(run_file) -> None:
    made = sft.run(run_file(train__max_steps=20, train__eval_steps=20))
    losses = [
        entry["loss"]
        for line in (made.path / "metrics.jsonl").read_text().splitlines()
        if "loss" in (entry := json.loads(line))
    ]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_finished_run_is_not_overwritten(run_file) -> None:
    sft.run(run_file())
    with pytest.raises(ConfigError, match="finished already"):
        sft.run(run_file())


def test_the_best_checkpoint_is_kept_and_a_worsening_run_stops_early(run_file) -> None:
    # a rate that soon destroys the model: the first validations are the best ones
    made = sft.run(
        run_file(
            train__max_steps=40,
            train__learning_rate=1.0,
            train__scheduler="constant",
            train__early_stopping={"patience": 2},
        )
    )
    lines = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    metrics = made.manifest["metrics"]
    assert metrics["best_step"] == min(losses, key=losses.get) and metrics["validation_loss"] == min(losses.values())
    assert metrics["steps"] < 40


def test_full_fine_tuning_leaves_a_whole_model(run_file, tiny_folder: Path) -> None:
    made = sft.run(run_file(adapter=None, train__learning_rate=1e-3))
    assert made.kind == "model" and made.path.name == "model"
    before, after = load_file(tiny_folder / "model.safetensors"), weights(made)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name].float(), after[name].float()) for name in after if "q_proj" in name)
    assert made.manifest["metrics"]["trainable_parameters"] == made.manifest["metrics"]["total_parameters"]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
def test_resumed_equals_uninterrupted_to_the_bit(run_file, monkeypatch, number, raised) -> None:
    whole = sft.run(run_file("whole"))

    def interrupt(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        with pytest.raises(raised):
            sft.run(run_file("cut"))
    assert not (Path(whole.path).parent.parent / "cut" / "adapter").exists()
    resumed = sft.run(run_file("cut"))
    before, after = weights(whole), weights(resumed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    logged = [
        (line["step"], line.get("loss"))
        for line in map(json.loads, (resumed.path / "metrics.jsonl").read_text().splitlines())
    ]
    assert logged == [
        (line["step"], line.get("loss"))
        for line in map(json.loads, (whole.path / "metrics.jsonl").read_text().splitlines())
    ]


def test_a_resumed_bfloat16_adapter_stays_bfloat16_and_equal(run_file, monkeypatch) -> None:
    changes = {"model__dtype": "bfloat16", "train__adapter_dtype": "bfloat16"}
    whole = sft.run(run_file("whole", **changes))

    def interrupt(self, args, state, control, **_):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sft.run(run_file("cut", **changes))
    resumed = sft.run(run_file("cut", **changes))
    before, after = weights(whole), weights(resumed)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_changed_setting_is_not_resumed_into(run_file, monkeypatch) -> None:
    def interrupt(self, args, state, control, **_):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sft.run(run_file())
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0\.01 and is 0\.02"):
        sft.run(run_file(train__learning_rate=2e-2))


def test_rows_that_the_trainer_lost_are_noticed(run_file, monkeypatch) -> None:
    prepare = trainer.SupervisedTrainer._prepare_dataset
    monkeypatch.setattr(
        trainer.SupervisedTrainer,
        "_prepare_dataset",
        lambda self, dataset, *rest: prepare(self, dataset.select(range(3)), *rest),
    )
    with pytest.raises(LlmtuneError, match="TRL holds 3 rows"):
        sft.run(run_file())


def test_a_setting_without_effect_is_named(run_file, monkeypatch) -> None:
    monkeypatch.setattr(setup.arguments, "to_trl", _deaf_to("weight_decay", setup.arguments.to_trl))
    with pytest.raises(ConfigError, match=r"train\.weight_decay: has no effect"):
        sft.run(run_file(train__weight_decay=0.1))


def _deaf_to(name: str, function):
    """`function` as it would be if it never read `train.<name>`."""

    def deaf(view, **rest):
        seen = set(view._seen)
        words = function(view, **rest)
        view._seen.discard(f"train.{name}") if f"train.{name}" not in seen else None
        return words

    return deaf


def test_no_supervised_token_is_an_error_before_training(run_file, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token of its answer is left"):
        sft.run(run_file(data__max_length=8, data__overlong="truncate"))
    assert not (tmp_path / "run" / "adapter").exists()


def test_peft_names_its_own_problem(run_file) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no_such_layer.*Linear layers of this model: .*q_proj"):
        sft.run(run_file(adapter={"method": "lora", "target_modules": ["no_such_layer"]}))


def test_a_nan_loss_ends_the_run(run_file, monkeypatch) -> None:
    monkeypatch.setattr(trainer.SupervisedTrainer, "compute_loss", lambda self, model, inputs, **_: _nan(model))
    with pytest.raises(LlmtuneError, match="not a number at step 1"):
        sft.run(run_file())


def _nan(model) -> torch.Tensor:
    return next(p for p in model.parameters() if p.requires_grad).sum() * float("nan")


def test_tracking_writes_what_tensorboard_reads(run_file, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sft.run(run_file(tracking=["tensorboard"]))
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_validation_loss_does_not_depend_on_the_batch(run_file) -> None:
    frozen = {"train__max_steps": 1, "train__eval_steps": 1, "train__learning_rate": 1e-12, "train__batch_size": 4}
    losses = [
        sft.run(run_file(f"micro-{size}", **frozen, train__micro_batch_size=size)).manifest["metrics"][
            "validation_loss"
        ]
        for size in (1, 4)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_early_stopping_keeps_its_patience_over_an_interruption(run_file, monkeypatch) -> None:
    changes = {
        "train__max_steps": 40,
        "train__learning_rate": 1.0,
        "train__scheduler": "constant",
        "train__early_stopping": {"patience": 3},
    }
    whole = sft.run(run_file("whole", **changes))
    steps = whole.manifest["metrics"]["steps"]

    def interrupt(self, args, state, control, **_):
        if state.global_step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sft.run(run_file("cut", **changes))
    resumed = sft.run(run_file("cut", **changes)).manifest["metrics"]
    assert resumed["steps"] == steps
    assert resumed["tokens"] == whole.manifest["metrics"]["tokens"]
    assert resumed["train_loss"] == whole.manifest["metrics"]["train_loss"]


def test_fields_that_change_the_base_are_refused(run_file) -> None:
    kasa = {"method": "lora", "r": 4, "kasa_config": {}, "target_modules": "all-linear"}
    with pytest.raises(ConfigError, match="change the base's own weights"):
        sft.run(run_file(adapter=kasa))


def test_pissa_is_stored_as_an_adapter_of_the_base_as_it_was(run_file) -> None:
    pissa = {"method": "lora", "r": 4, "init_lora_weights": "pissa", "target_modules": "all-linear"}
    made = sft.run(run_file(adapter=pissa))
    stored = json.loads((made.path / "adapter_config.json").read_text())
    assert stored["r"] == 8 and stored["init_lora_weights"] is True


def test_rows_longer_than_the_model_has_positions_for_are_refused(run_file) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length: 1000000 is more than the \d+ positions"):
        sft.run(run_file(data__max_length=1_000_000))


def test_a_validation_row_that_is_trained_on_is_refused(run_file) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation: 16 of its rows are training rows too"):
        sft.run(run_file(data__validation="./train.jsonl"))


def test_a_tracker_that_is_not_installed_is_named(run_file, monkeypatch) -> None:
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(ConfigError, match="wandb"):
        sft.run(run_file(tracking=["wandb"]))
