"""Optimizers and schedules by transformers' names: each works, or says before any weight is loaded what it lacks."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from llmtune.config import transformers_names, validate
from llmtune.config.train import TrainConfig
from llmtune.errors import ConfigError
from llmtune.training import optim

PACKAGES = {  # start of a name -> the module it needs, and what its message names
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu": ("torch_npu", "torch_npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "lomo": ("lomo_optim", "lomo_optim"),
    "adalomo": ("lomo_optim", "lomo_optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
BITSANDBYTES = ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "rmsprop_bnb", "paged")


def check(**train: object) -> None:
    optim.check(validate(TrainConfig, {"max_steps": 10, **train}, "sft.yaml"), "cpu", "sft.yaml")


@pytest.mark.parametrize("name", transformers_names.names("optimizer"))
def test_every_optimizer_works_or_says_what_it_lacks(name) -> None:
    module, said = next((need for start, need in PACKAGES.items() if name.startswith(start)), (None, ""))
    if name.startswith(BITSANDBYTES):
        module, said = "bitsandbytes", "bitsandbytes"
    scheduler = "constant" if name.startswith("schedule_free") else "linear"

    def attempt() -> None:
        check(optimizer=name, scheduler=scheduler)

    if name.startswith("paged_"):
        with pytest.raises(ConfigError, match=rf"{name} moves pages between a GPU .*; use (\w+)") as refused:
            attempt()
        check(optimizer=str(refused.value).rpartition("use ")[2])
    elif module and importlib.util.find_spec(module) is None:
        with pytest.raises(ConfigError, match=said):
            attempt()
    elif name.startswith(("lomo", "adalomo", "galore", "apollo", "grokadamw")):
        reasons = r"steps inside the backward pass|does not save all of its state|cannot be used here"
        with pytest.raises(ConfigError, match=reasons):
            attempt()
    else:
        attempt()


@pytest.mark.parametrize("name", transformers_names.names("scheduler"))
def test_every_schedule_works_or_says_what_it_lacks(name) -> None:
    needs = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 3},
        "greedy": {"min_lr": 1e-6},
    }
    if name in needs:
        word = {"greedy": "min_lr", "warmup_stable_decay": "num_decay_steps"}.get(name, "min_lr_rate")
        with pytest.raises(ConfigError, match=rf"train.scheduler.*{word}"):
            check(scheduler=name)
    check(scheduler=name, scheduler_options=needs.get(name, {}))


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"optimizer": "adamw_torc"}, "optimizer: transformers has no optimizer .*did you mean 'adamw_torch'"),
        ({"scheduler": "cosin"}, "scheduler: transformers has no scheduler .*did you mean 'cosine'"),
        ({"layer_decay": 0.0}, "layer_decay: input should be greater than 0"),
        ({"layer_decay": 1.5}, "layer_decay: input should be less than or equal to 1"),
        ({"lora_plus_ratio": 1.0}, "lora_plus_ratio: input should be greater than 1"),
        ({"neftune_alpha": 0.0}, "neftune_alpha: input should be greater than 0"),
    ],
)
def test_a_run_file_is_checked_without_torch(train, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate(TrainConfig, {"max_steps": 1, **train}, "sft.yaml")


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"optimizer_options": {"betta": [0.9, 0.95]}}, "betta: is no option of adamw_torch_fused; did you mean 'betas'"),
        ({"optimizer_options": {"lr": 1.0}}, "lr: is decided by train.learning_rate"),
        ({"optimizer_options": {"betas": [0.9, 2.0]}}, "adamw_torch_fused cannot be used here: Invalid beta"),
        ({"optimizer_options": {"target_modules": "all-linear"}}, "target_modules: is no option of adamw_torch_fused"),
        ({"optimizer": "sgd", "optimizer_options": {"eps": 1e-8}}, "eps: is no option of sgd"),
        ({"scheduler": "linear", "scheduler_options": {"num_cycles": 2}}, "num_cycles: is no option of linear, which has none"),
        ({"scheduler": "constant", "scheduler_options": {"min_lr": 1e-6}}, "min_lr: is no option of constant"),
        ({"scheduler": "cosine", "scheduler_options": {"num_cycle": 1}}, "num_cycle: is no option of cosine; did you mean"),
        ({"scheduler": "reduce_lr_on_plateau", "scheduler_options": {"factr": 0.5}}, "unexpected keyword argument 'factr'"),
        ({"scheduler": "constant", "warmup_steps": 5}, "warmup_steps: has no effect with constant, .*constant_with_warmup"),
        ({"scheduler": "greedy"}, r"min_lr \(0.001\) is not below the learning rate \(0.0002\)"),
    ],
)  # fmt: skip
def test_an_option_is_effective_or_refused(train, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(**train)


def test_options_reach_the_optimizer() -> None:
    args = pytest.importorskip("transformers").TrainingArguments(output_dir="x", report_to="none", use_cpu=True)
    model = torch.nn.Linear(2, 2)
    kind, words = optim.chosen(args, model, {"betas": [0.8, 0.9], "amsgrad": True}, "x")
    made = kind(model.parameters(), **words)
    assert made.defaults["betas"] == (0.8, 0.9) and made.defaults["amsgrad"] and made.defaults["fused"]
    args.optim = "rmsprop"
    kind, words = optim.chosen(args, model, {"momentum": 0.9, "centered": True}, "x")
    assert words["momentum"] == 0.9 and words["centered"] is True


def test_an_optimizer_that_would_not_resume_is_refused(monkeypatch) -> None:
    class Forgetful(torch.optim.SGD):
        """Its steps grow, and its state does not say how often it has stepped."""

        steps = 0

        def step(self, closure=None):
            self.steps += 1
            for group in self.param_groups:
                group["lr"] = 0.1 * self.steps
            return super().step(closure)

    named = optim.Trainer.get_optimizer_cls_and_kwargs

    def get(args, model):
        return (Forgetful, {"lr": 0.1}) if args.optim == "sgd" else named(args, model)

    monkeypatch.setattr(optim.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(get))
    with pytest.raises(ConfigError, match="sgd does not save all of its state, so a run that is interrupted"):
        check(optimizer="sgd")
    check(optimizer="adamw_torch")
