"""On two GPUs: copies (NCCL), FSDP2 and ZeRO-3 train what one GPU trains, and leave an adapter that plain PEFT loads."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmtune import artifact

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_process,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]


@pytest.mark.parametrize("shipped", ["multi_gpu", "fsdp2", "deepspeed_zero3"])
def test_two_gpus_train_what_one_trains(tmp_path: Path, tiny_folder: Path, chat_rows, shipped: str) -> None:
    if shipped == "deepspeed_zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    chat_rows(tmp_path, 21)
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cuda"},
        "data": {"train": "./train.jsonl"},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"max_steps": 10, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2},
        "output_dir": "./run",
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(raw))
    accelerate = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
    several = [*accelerate, str(ROOT / "configs" / "accelerate" / f"{shipped}.yaml")]
    losses = []
    for name, launcher, environment in (("one", [], {"CUDA_VISIBLE_DEVICES": "0"}), ("two", several, {})):
        words = [sys.executable, *launcher, "-m", "llmtune", "sft", "sft.yaml", f"output_dir={name}"]
        subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
        made = artifact.read(tmp_path / name / "adapter")
        losses.append([json.loads(line)["loss"] for line in (made.path / "metrics.jsonl").read_text().splitlines()])
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), made.path)
        assert all(weight.any() for key, weight in model.named_parameters() if "lora_B" in key)
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
