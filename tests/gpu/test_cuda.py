"""On a GPU: the stage runs, its curve is the CPU's, and a merge is proven. Random weights, no exact version of torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtune import artifact, config
from llmtune.config.eval import CostConfig
from llmtune.evaluate import cost, subjects
from llmtune.evaluate.subjects import Memory
from llmtune.evaluate.suites import Item
from llmtune.export import merge
from llmtune.stages import sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def losses(
    folder: Path, tiny: Path, device: str, dtype: str, *, packed: str | None = None, weight: float = 1.0
) -> list[float]:
    """The curve of sixteen rows, all of them in every step. packed: the attention to pack them with, into one sequence."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} plus {i}?"},
                {"role": "assistant", "content": f"{2 * i}", "weight": weight if i % 2 else 1.0},
            ]
        }
        for i in range(16)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny), "dtype": dtype, "device": device},
        "data": {"train": "./train.jsonl"},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"max_steps": 6, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 5e-3},
        "output_dir": f"./{device}-{dtype}-{packed}" if packed else f"./{device}-{dtype}",
    }
    if packed:
        raw["model"] |= {"attention": packed}
        raw["data"] |= {"packing": True, "max_length": 2048}
        raw["train"] |= {"batch_size": 1, "micro_batch_size": 1}
    made = sft.run(config.build(raw, folder / "sft.yaml"))
    lines = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_one_trajectory_on_both_devices(tmp_path: Path, tiny_folder: Path) -> None:
    """TRL's fused kernel on the GPU and our head on supervised positions on the CPU: the same loss."""
    cpu, gpu = losses(tmp_path, tiny_folder, "cpu", "float32"), losses(tmp_path, tiny_folder, "cuda", "float32")
    assert gpu == pytest.approx(cpu, abs=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_rows_stay_apart_on_every_attention(tmp_path: Path, tiny_folder: Path, attention: str) -> None:
    cpu = losses(tmp_path, tiny_folder, "cpu", "float32")
    assert losses(tmp_path, tiny_folder, "cuda", "float32", packed=attention) == pytest.approx(cpu, abs=1e-3)


def test_packed_rows_stay_apart_in_flash_attention(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("flash_attn")
    padded = losses(tmp_path, tiny_folder, "cuda", "bfloat16")
    flash = losses(tmp_path, tiny_folder, "cuda", "bfloat16", packed="flash_attention_2")
    assert flash == pytest.approx(padded, abs=0.03 * padded[0])


@pytest.mark.parametrize("packed", [None, "sdpa"])
def test_weights_count_on_the_gpu_too(tmp_path: Path, tiny_folder: Path, packed: str | None) -> None:
    """TRL's fused kernel knows no weights: it must not be used where there are any."""
    cpu = losses(tmp_path, tiny_folder, "cpu", "float32", weight=0.25)
    assert losses(tmp_path, tiny_folder, "cuda", "float32", packed=packed, weight=0.25) == pytest.approx(cpu, abs=1e-3)


def test_bfloat16_trains_and_its_merge_is_proven(tmp_path: Path, tiny_folder: Path) -> None:
    curve = losses(tmp_path, tiny_folder, "cuda", "bfloat16")
    assert curve[-1] < curve[0]
    made = merge.run(tmp_path / "cuda-bfloat16")
    assert artifact.read(made.path).manifest["proof"]["storage"]["holds"]


def test_the_peak_of_an_arm_is_counted_by_torch(tiny_folder: Path) -> None:
    found = subjects.find(str(tiny_folder))
    memory = Memory([found], "float32", "cuda")
    items = [Item("s", str(i), str(i), [{"role": "user", "content": "count " * 200}]) for i in range(4)]
    (figures,) = cost.measure(CostConfig(prompts=4, new_tokens=4), {"base": found}, items, memory, 4).values()
    assert "max_memory_allocated" in figures["peak_is"]
    keys_and_values = 2 * 2 * 4 * 1200 * 32 * 4  # layers, rows, tokens, two heads of 16, float32
    assert figures["peak_bytes"] - figures["weights_bytes"] > keys_and_values
    assert figures["first_token_s"]["p50"] > 0
