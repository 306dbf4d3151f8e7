"""Full and partial fine-tuning bend nothing: each equals a plain PyTorch loop, and a resumed run an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from llmtune import artifact, config
from llmtune.data.chats import load_chats
from llmtune.data.tokens import Counts, encode_chats
from llmtune.errors import ConfigError
from llmtune.model import adapters, infer, load
from llmtune.stages import sft
from llmtune.training import callbacks, optim, trainer

STEPS, RATE = 6, 2e-3
WITH_VALIDATION = {"train": "./train.jsonl", "validation": "./validation.jsonl"}
TOP = {"trainable": {"top_blocks": 1, "norms": True}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, number in (("train", 8), ("validation", 4)):
        lines = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} " + "x" * i},
                    {"role": "assistant", "content": "y" * (8 - i) + "!"},
                ]
            }
            for i in range(number)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture(scope="session")
def dropout_folder(tmp_path_factory) -> Path:
    """The tiny model with dropout in its attention."""
    folder = tiny.save(tmp_path_factory.mktemp("dropout") / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.2}))
    return folder


def build(place: Path, base: Path, name: str = "run", *, dtype: str = "float32", train: dict | None = None, **sections):
    raw = {
        "stage": "sft",
        "model": {"name": str(base), "dtype": dtype},
        "data": {"train": "./train.jsonl"},
        "train": {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 8, "learning_rate": RATE, **(train or {})},
        "output_dir": f"./{name}",
        **sections,
    }
    return config.build(raw, place / "sft.yaml")


def lines(made: artifact.Artifact) -> list[dict]:
    return [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]


def curve(made: artifact.Artifact) -> list[float]:
    return [line["loss"] for line in lines(made) if "loss" in line]


def weights(made: artifact.Artifact) -> dict[str, torch.Tensor]:
    return load_file(next(made.path.glob("*.safetensors")))


def by_hand(place: Path, base: Path, groups, *, decay: float = 0.0, adapt=lambda model: model) -> list[float]:
    """Losses of a plain loop over the one batch. `groups(name)` is a parameter's share of the rate, 0 where it is frozen."""
    source = load.find(str(base))
    tokenizer = load.load_tokenizer(source)
    encoded = list(
        encode_chats(load_chats(str(place / "train.jsonl"), training=True), tokenizer, 512, "error", Counts())
    )
    model = adapt(load.load_model(source, "float32")).train()
    named = {name: parameter for name, parameter in model.named_parameters() if groups(name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "share": groups(name), "weight_decay": decay * (parameter.ndim > 1)}
            for name, parameter in named.items()
        ],
        lr=RATE,
    )
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["share"] * (1 - step / STEPS)
        inputs, labels = infer.pad(encoded, tokenizer.pad_token_id, "cpu")
        logits = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def interrupted(settings, monkeypatch, step: int, after: int = 0) -> None:
    """Run until Ctrl-C after `step` steps, with a checkpoint; `after` so many phases."""
    ended: list[int] = []

    def interrupt(self, args, state, control, **_):
        if state.global_step == step and len(ended) == after:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        patched.setattr(callbacks.ProgressDisplay, "on_train_end", lambda *_, **__: ended.append(1))
        with pytest.raises(KeyboardInterrupt):
            sft.run(settings)


def assert_equal(one: artifact.Artifact, other: artifact.Artifact) -> None:
    """Same weights to the bit, same curve."""
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    kept = ("step", "phase", "loss", "validation_loss", "gap")
    assert [[line.get(key) for key in kept] for line in lines(one)] == [
        [line.get(key) for key in kept] for line in lines(other)
    ]


def chosen(name: str) -> bool:
    return name.startswith("model.layers.1.") or "norm" in name


def test_a_partial_run_is_a_plain_loop_over_the_same_weights(place: Path, tiny_folder: Path) -> None:
    expected = by_hand(place, tiny_folder, chosen, decay=0.1)
    made = sft.run(build(place, tiny_folder, **TOP, train={"weight_decay": 0.1}))
    assert curve(made) == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0] - 0.1
    assert all(map(chosen, made.manifest["trained"])) and len(made.manifest["trained"]) == 9 + 3


def test_a_full_run_is_a_plain_loop_over_every_weight(place: Path, tiny_folder: Path) -> None:
    made = sft.run(build(place, tiny_folder, train={"weight_decay": 0.1}))
    assert curve(made) == pytest.approx(by_hand(place, tiny_folder, lambda name: 1.0, decay=0.1), abs=2e-5)
    assert "trained" not in made.manifest


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32 base", "bfloat16 base"])
def test_bfloat16_beside_float32_masters_learns_the_same_and_leaves_the_rest_to_the_bit(
    place, tmp_path, stored
) -> None:
    base = tiny.save(tmp_path / "base", stored)
    exact = sft.run(build(place, base, "exact", **TOP))
    mixed = sft.run(build(place, base, "mixed", **TOP, dtype="bfloat16"))
    assert curve(mixed) == pytest.approx(curve(exact), rel=0.02)  # bfloat16 has three digits
    assert curve(mixed)[-1] < curve(mixed)[0] - 0.1
    given, learned = load_file(base / "model.safetensors"), weights(mixed)
    assert {tensor.dtype for tensor in learned.values()} == {torch.float32}
    assert mixed.manifest["base"]["dtype"] == json.loads((mixed.path / "config.json").read_text())["dtype"] == "float32"
    changed = {name for name in given if not torch.equal(given[name].float(), learned[name])}
    assert changed == set(mixed.manifest["trained"])
    assert not all(
        torch.equal(tensor, tensor.bfloat16().float()) for tensor in learned.values()
    )  # masters, not rounded


def test_activation_checkpointing_of_a_partial_run_changes_nothing(place: Path, tiny_folder: Path) -> None:
    plain = sft.run(build(place, tiny_folder, "plain", **TOP))
    thrifty = sft.run(build(place, tiny_folder, "thrifty", **TOP, train={"activation_checkpointing": True}))
    assert curve(thrifty) == pytest.approx(curve(plain), abs=2e-5)


@pytest.mark.parametrize("sections", [TOP, {}], ids=["partial", "full"])
def test_resumed_equals_uninterrupted_to_the_bit(place, dropout_folder, monkeypatch, sections) -> None:
    train = {"batch_size": 4, "micro_batch_size": 2, "eval_steps": 2}

    def settings(name: str):
        return build(place, dropout_folder, name, dtype="bfloat16", data=WITH_VALIDATION, train=train, **sections)

    whole = sft.run(settings("whole"))
    interrupted(settings("cut"), monkeypatch, 3)
    assert_equal(whole, sft.run(settings("cut")))
    still = dropout_folder.parent / "still"
    if not still.exists():
        shutil.copytree(dropout_folder, still)
        base = json.loads((still / "config.json").read_text())
        (still / "config.json").write_text(json.dumps(base | {"attention_dropout": 0.0}))
    undropped = sft.run(
        build(place, still, "undropped", dtype="bfloat16", data=WITH_VALIDATION, train=train, **sections)
    )
    assert curve(undropped) != curve(whole)  # so dropout was on


LORA = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def test_layer_decay_is_a_plain_loop_with_those_rates(place: Path, tiny_folder: Path) -> None:
    """Of two blocks the upper has the whole rate, the lower half of it, the (tied) embeddings below them a quarter."""
    shares = {"model.layers.1.": 1.0, "model.layers.0.": 0.5, "model.embed_tokens.": 0.25, "model.norm.": 1.0}
    expected = by_hand(
        place, tiny_folder, lambda name: next(v for k, v in shares.items() if name.startswith(k)), decay=0.1
    )
    made = sft.run(build(place, tiny_folder, train={"layer_decay": 0.5, "weight_decay": 0.1}))
    assert curve(made) == pytest.approx(expected, abs=2e-5)
    plain = by_hand(place, tiny_folder, lambda name: 1.0, decay=0.1)
    assert abs(curve(made)[-1] - plain[-1]) > 1e-2  # so the rates matter here
    assert lines(made)[0]["learning_rate"] == RATE


def test_a_layer_decay_of_one_changes_nothing(place: Path, tiny_folder: Path) -> None:
    plain, one = (sft.run(build(place, tiny_folder, f"{n}", train=t)) for n, t in enumerate([{}, {"layer_decay": 1.0}]))
    assert_equal(plain, one)


def adapted_by_hand(place: Path, base: Path, share) -> list[float]:
    """As `by_hand`, of a LoRA adapter."""
    raw = build(place, base, adapter=LORA)

    def adapt(model):
        return adapters.build_adapter(model, raw.adapter, "float32", RATE, seed=0)

    return by_hand(place, base, lambda name: share(name) if "lora_" in name else 0.0, adapt=adapt)


@pytest.mark.parametrize(
    ("train", "share"),
    [
        ({"lora_plus_ratio": 8.0}, lambda name: 8.0 if "lora_B" in name else 1.0),
        ({"layer_decay": 0.5}, lambda name: 1.0 if "layers.1." in name else 0.5),
        (
            {"layer_decay": 0.5, "lora_plus_ratio": 8.0},
            lambda name: (8.0 if "lora_B" in name else 1.0) * (1.0 if "layers.1." in name else 0.5),
        ),
    ],
    ids=["LoRA+", "layer decay", "both"],
)
def test_rates_of_an_adapter_are_those_of_a_plain_loop(place: Path, tiny_folder: Path, train, share) -> None:
    made = sft.run(build(place, tiny_folder, adapter=LORA, train=train))
    assert curve(made) == pytest.approx(adapted_by_hand(place, tiny_folder, share), abs=2e-5)
    assert abs(curve(made)[-1] - adapted_by_hand(place, tiny_folder, lambda name: 1.0)[-1]) > 1e-3
    assert lines(made)[0]["learning_rate"] == RATE  # what is logged is the run's rate, not that of B


def test_the_groups_of_lora_plus_are_those_of_peft(tiny_folder: Path, place: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    base = load.load_model(load.find(str(tiny_folder)), "float32")
    made = adapters.build_adapter(base, build(place, tiny_folder, adapter=LORA).adapter, "float32", RATE, seed=0)
    theirs = create_loraplus_optimizer(made, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=4.0)
    ours = optim.groups(made, set(), RATE, 0.0, optim.Rates(lora_plus_ratio=4.0))

    def rates(groups) -> dict[int, float]:
        return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}

    assert rates(ours) == rates(theirs.param_groups)


@pytest.mark.parametrize("share", [{}, {"layer_decay": 0.5}], ids=["one rate", "a rate a block"])
@pytest.mark.parametrize("family", ["GPT2Config", "Qwen2Config"])
def test_weight_decay_spares_biases_and_norms(family, share) -> None:
    from test_freeze import build as of_family

    model = of_family(family)
    decaying = set(trainer.SupervisedTrainer.get_decay_parameter_names(None, model))
    groups = optim.groups(model, decaying, RATE, 0.1, optim.Rates(**share))
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["lr"] == RATE


@pytest.mark.parametrize(
    ("sections", "train", "reason"),
    [
        ({"trainable": {"top_blocks": 1}}, {"layer_decay": 0.5}, "layer_decay: has no effect"),
        ({"adapter": {"method": "ia3", "target_modules": ["k_proj"], "feedforward_modules": []}}, {"lora_plus_ratio": 4.0}, "no lora_B"),
        ({"adapter": {"method": "prompt_tuning", "num_virtual_tokens": 2}}, {"layer_decay": 0.5}, "layer_decay: has no effect"),
    ],
)  # fmt: skip
def test_a_rate_without_effect_is_refused_before_training(place, tiny_folder, sections, train, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        sft.run(build(place, tiny_folder, **sections, train=train))
    assert not (place / "run").exists()


def test_rates_need_an_adapter_that_has_them(place, tiny_folder) -> None:
    with pytest.raises(ConfigError, match=r"train\.lora_plus_ratio: has no effect without an adapter"):
        build(place, tiny_folder, train={"lora_plus_ratio": 4.0})
    with pytest.raises(ConfigError, match=r"train\.scheduler: greedy needs data\.validation"):
        build(place, tiny_folder, train={"scheduler": "greedy"})


def test_embedding_noise_is_on_in_training_only_and_resumes_to_the_bit(place, tiny_folder, monkeypatch) -> None:
    def settings(name: str, alpha: float | None, **train: object):
        noise = {"neftune_alpha": alpha} if alpha else {}
        small = {"batch_size": 4, "micro_batch_size": 4, "eval_steps": 2}
        return build(place, tiny_folder, name, data=WITH_VALIDATION, train={**small, **noise, **train}, **TOP)

    def validations(made) -> list[float]:
        return [line["validation_loss"] for line in lines(made) if "validation_loss" in line]

    still, shaken = (
        sft.run(settings(f"still-{alpha}", alpha, learning_rate=1e-12, max_steps=2)) for alpha in (None, 20.0)
    )
    assert curve(still) != curve(shaken)
    assert validations(still) == pytest.approx(validations(shaken), abs=1e-6)
    whole = sft.run(settings("whole", 20.0))
    interrupted(settings("cut", 20.0), monkeypatch, 3)
    assert_equal(whole, sft.run(settings("cut", 20.0)))
    assert (whole.path / "config.json").read_text() == (still.path / "config.json").read_text()


def test_embedding_noise_that_cannot_be_added_is_refused(place, tmp_path) -> None:
    """Under a prompt adapter transformers looks for the embeddings in `.model`, which GPT-2 does not have."""
    base = tmp_path / "gpt2"
    tiny.tokenizer().save_pretrained(base)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    ).save_pretrained(base)
    prompt = {"method": "prompt_tuning", "num_virtual_tokens": 2}
    data = {"train": "./train.jsonl", "max_length": 256}
    settings = build(place, base, adapter=prompt, data=data, train={"neftune_alpha": 5.0})
    with pytest.raises(ConfigError, match=r"train\.neftune_alpha: transformers finds no embeddings"):
        sft.run(settings)


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adafactor", "scheduler": "reduce_lr_on_plateau", "scheduler_options": {"patience": 0}},
        {"scheduler": "greedy", "scheduler_options": {"min_lr": 1e-6, "patience": 0}, "layer_decay": 0.9},
    ],
    ids=lambda train: train.get("optimizer", train.get("scheduler")),
)
def test_other_optimizers_and_schedules_resume_to_the_bit(place, tiny_folder, monkeypatch, train) -> None:
    small = {"batch_size": 4, "micro_batch_size": 4, "eval_steps": 1, "learning_rate": 2e-2}

    def settings(name: str):
        return build(place, tiny_folder, name, data=WITH_VALIDATION, train={**small, **train})

    whole = sft.run(settings("whole"))
    interrupted(settings("cut"), monkeypatch, 3)
    assert_equal(whole, sft.run(settings("cut")))
    rates = [line["learning_rate"] for line in lines(whole) if "loss" in line]
    assert len(set(rates)) > 1
