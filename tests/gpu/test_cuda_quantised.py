"""On a GPU: 4-bit and 8-bit bases train, evaluate as the quantised base, and merge with a proof. Random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtune import artifact, config
from llmtune.export import merge
from llmtune.model import load, quantised
from llmtune.stages import sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
pytest.importorskip("bitsandbytes")
IDS = torch.arange(5, 60)[None]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_and_its_merge_is_proven(tmp_path: Path, tiny_folder: Path, kind: str) -> None:
    for split, number, most in (("train", 32, 500), ("validation", 24, 99)):
        rows = [
            [{"role": "user", "content": f"take {i} from {most}"}, {"role": "assistant", "content": str(most - i)}]
            for i in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny_folder), "dtype": "bfloat16", "device": "cuda", "quantize": kind},
        "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "eval_steps": 6},
        "output_dir": "./run",
    }
    made = sft.run(config.build(raw, tmp_path / "sft.yaml"))
    losses = [
        line["loss"]
        for line in map(json.loads, (made.path / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    assert losses[-1] < losses[0]
    facts = artifact.read(merge.run(made.path.parent).path).manifest
    assert facts["proof"]["algebra"]["holds"] and facts["proof"]["distance"]["holds"]
    assert facts["bases"]["dequantised_kl"] < 0.01


def test_both_devices_quantise_alike(tiny_folder: Path) -> None:
    """The same 4-bit codes, so that a run may move between them: the dequantised weights agree to rounding."""
    weights = []
    for device in ("cpu", "cuda"):
        model = load.load_model(load.find(str(tiny_folder), quantize="nf4"), "float32", device)
        plain = quantised.dequantised(model, torch.float32)
        weights.append(plain.model.layers[0].mlp.up_proj.weight.cpu())
    assert torch.allclose(*weights, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_pass_in_eval_mode_changes_nothing_of_what_follows(tiny_folder: Path, kind: str) -> None:
    model = load.load_model(load.find(str(tiny_folder), quantize=kind), "bfloat16", "cuda")
    ids = IDS.cuda()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
