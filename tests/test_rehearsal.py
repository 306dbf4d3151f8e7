"""What `llmtune verify-resume` compares, and that one bit is enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmtune.training import rehearsal


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {"a": torch.tensor([0.0, 1.0]), "b": torch.ones(2, dtype=torch.bfloat16)}, folder / "adapter_model.safetensors"
    )
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save(state, folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    numbers = {
        "python": (3, (1, 2), None),
        "numpy": ("MT", np.arange(3, dtype=np.uint32)),
        "cpu": torch.arange(9),
    }
    torch.save(numbers, folder / "rng_state.pth")
    return folder


CHANGES = {
    "a weight": (
        "adapter_model.safetensors",
        {"a": torch.tensor([0.0, 1.0 + 2**-23]), "b": torch.ones(2).bfloat16()},
        ": a",
    ),
    "the sign of a zero": (
        "adapter_model.safetensors",
        {"a": torch.tensor([-0.0, 1]), "b": torch.ones(2).bfloat16()},
        ": a",
    ),
    "a format": ("adapter_model.safetensors", {"a": torch.tensor([0.0, 1.0]), "b": torch.ones(2)}, ": b"),
    "a missing weight": ("adapter_model.safetensors", {"a": torch.tensor([0.0, 1.0])}, ": b"),
    "a moment": (
        "optimizer.pt",
        {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        ": state.0.exp_avg",
    ),
    "the schedule": ("scheduler.pt", {"last_epoch": 4}, ": last_epoch"),
    "random numbers": (
        "rng_state.pth",
        {
            "python": (3, (1, 2), None),
            "numpy": ("MT", np.array([0, 1, 3], dtype=np.uint32)),
            "cpu": torch.arange(9),
        },
        ": numpy.1",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_named(tmp_path, name):
    first, second = checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second")
    number, different = rehearsal.differences(first, second)
    assert (number, different) == (13, [])
    file, content, key = CHANGES[name]
    save = save_file if file.endswith(".safetensors") else torch.save
    save(content, second / file)
    assert rehearsal.differences(first, second)[1] == [f"{file}{key}"]
