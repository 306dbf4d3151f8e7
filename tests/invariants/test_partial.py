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
from safetensors.torch import load_file

from llmtune import artifact, config
from llmtune.data.chats import load_chats
from llmtune.data.tokens import Counts, encode_chats
from llmtune.model import infer, load
from llmtune.stages import sft
from llmtune.training import callbacks

STEPS, RATE = 6, 2e-3
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


def by_hand(place: Path, base: Path, groups, *, decay: float = 0.0) -> list[float]:
    """Losses of a plain loop over the one batch. `groups(name)` is a parameter's share of the rate, 0 where it is frozen."""
    source = load.find(str(base))
    tokenizer = load.load_tokenizer(source)
    encoded = list(
        encode_chats(load_chats(str(place / "train.jsonl"), training=True), tokenizer, 512, "error", Counts())
    )
    model = load.load_model(source, "float32").train()
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


def interrupted(settings, monkeypatch, step: int) -> None:
    """Run until Ctrl-C after `step` steps, with a checkpoint."""

    def interrupt(self, args, state, control, **_):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
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
    data = {"train": "./train.jsonl", "validation": "./validation.jsonl"}
    train = {"batch_size": 4, "micro_batch_size": 2, "eval_steps": 2}

    def settings(name: str):
        return build(place, dropout_folder, name, dtype="bfloat16", data=data, train=train, **sections)

    whole = sft.run(settings("whole"))
    interrupted(settings("cut"), monkeypatch, 3)
    assert_equal(whole, sft.run(settings("cut")))
    still = dropout_folder.parent / "still"
    if not still.exists():
        shutil.copytree(dropout_folder, still)
        base = json.loads((still / "config.json").read_text())
        (still / "config.json").write_text(json.dumps(base | {"attention_dropout": 0.0}))
    undropped = sft.run(build(place, still, "undropped", dtype="bfloat16", data=data, train=train, **sections))
    assert curve(undropped) != curve(whole)  # so dropout was on
