"""Nothing of ours bends the maths: the stage equals a plain PyTorch loop, and every equivalent set-up gives one trajectory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtune import config
from llmtune.data.chats import load_chats
from llmtune.data.tokens import Counts, encode_chats
from llmtune.model import adapters, infer, load
from llmtune.stages import sft

STEPS, RATE = 6, 5e-3


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": "say " + "x" * i},
                {"role": "assistant", "content": "y" * (8 - i) + "!"},
            ]
        }
        for i in range(8)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def curve(rows: Path, tiny: Path, name: str, **train: object) -> list[float]:
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny), "dtype": "float32"},
        "data": {"train": "./train.jsonl"},
        "adapter": adapter,
        "train": {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 8, "learning_rate": RATE, **train},
        "output_dir": f"./{name}",
    }
    made = sft.run(config.build(raw, rows / "sft.yaml"))
    return [json.loads(line)["loss"] for line in (made.path / "metrics.jsonl").read_text().splitlines()]


def test_the_stage_equals_a_plain_loop(rows: Path, tiny_folder: Path) -> None:
    """Full logits, the loss by hand, AdamW, clipping and a linear schedule: the same numbers in float32."""
    source = load.find(str(tiny_folder))
    tokenizer = load.load_tokenizer(source)
    chats = load_chats(str(rows / "train.jsonl"), training=True)
    encoded = list(encode_chats(chats, tokenizer, 512, "error", Counts()))
    raw = config.build(
        {
            "stage": "sft",
            "model": str(tiny_folder),
            "data": {"train": "x.jsonl"},
            "train": {"max_steps": 1},
            "output_dir": "x",
            "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        },
        rows / "sft.yaml",
    )
    model = adapters.build_adapter(load.load_model(source, "float32"), raw.adapter, "float32", RATE, seed=0).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    expected = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        inputs, labels = infer.pad(encoded, tokenizer.pad_token_id, "cpu")
        logits = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert curve(rows, tiny_folder, "stage") == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(
    "train",
    [{"micro_batch_size": 1}, {"micro_batch_size": 2, "group_by_length": False}, {"activation_checkpointing": True}],
    ids=["1x8 = 8x1", "rows in any order", "activation checkpointing"],
)
def test_equivalent_set_ups_give_one_trajectory(rows: Path, tiny_folder: Path, train: dict[str, object]) -> None:
    assert curve(rows, tiny_folder, "b", **train) == pytest.approx(curve(rows, tiny_folder, "a"), abs=2e-5)


def test_bfloat16_adapters_learn_like_float32_ones(rows: Path, tiny_folder: Path) -> None:
    """The guard of the faster default: at a learning rate it is used at, the curve is the same within bfloat16's noise."""
    slow = curve(rows, tiny_folder, "float32")
    raw = json.loads((rows / "float32" / "adapter" / "llmtune.json").read_text())["config"]
    raw["model"]["dtype"] = "bfloat16"
    raw["train"]["adapter_dtype"] = "bfloat16"
    raw["output_dir"] = "./bfloat16"
    made = sft.run(config.build(raw, rows / "sft.yaml"))
    fast = [json.loads(line)["loss"] for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert fast == pytest.approx(slow, abs=0.03 * slow[0])
    assert fast[-1] < fast[0]
