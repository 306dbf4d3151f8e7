"""A result that is not whole is not published."""

from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llmtune import config
from llmtune.errors import LlmtuneError
from llmtune.model import adapters, saved
from llmtune.stages import sft


def adapter(seed: int = 0):
    torch.manual_seed(seed)
    return get_peft_model(tiny.model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))


@pytest.mark.parametrize("make", [adapter, tiny.model, lambda: tiny.model(tied=False)])
def test_what_the_libraries_write_is_whole(tmp_path: Path, make) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    saved.require_whole(tmp_path, model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights, name: weights.pop(name), "is missing"),
        (
            lambda weights, name: weights.update({name: torch.empty(0)}),
            r"is empty.*has shape \(0,\) instead of \(2, 64\)",
        ),
        (lambda weights, name: weights.update({name: torch.full((2, 64), float("nan"))}), "not finite"),
        (lambda weights, name: weights.update(other=torch.ones(1)), "other is none of the adapter's"),
    ],
)
def test_what_is_not_is_refused(tmp_path: Path, change, said) -> None:
    model = adapter()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights, next(name for name in weights if name.endswith("q_proj.lora_A.weight")))
    save_file(weights, file)
    with pytest.raises(LlmtuneError, match=f"not those that were trained: .*{said}"):
        saved.require_whole(tmp_path, model)


def test_a_whole_model_that_lost_a_tensor_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(LlmtuneError, match="numbers instead of"):
        saved.require_whole(tmp_path, model)


def test_an_adapter_that_lost_its_tensors_is_not_published(
    tmp_path: Path, tiny_folder: Path, chat_rows, monkeypatch
) -> None:
    chat_rows(tmp_path)
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {"train": "./train.jsonl"},
        "adapter": {"method": "lora", "r": 2, "init_lora_weights": "pissa", "target_modules": "all-linear"},
        "train": {"max_steps": 1},
        "output_dir": "./run",
    }

    def emptied(made, folder, write=adapters.save):
        write(made, folder)
        file = folder / "adapter_model.safetensors"
        save_file({name: torch.empty(0) for name in load_file(file)}, file)

    with monkeypatch.context() as patched:
        patched.setattr(adapters, "save", emptied)
        with pytest.raises(LlmtuneError, match="is empty"):
            sft.run(config.build(raw, tmp_path / "sft.yaml"))
    assert not (tmp_path / "run" / "adapter").exists()
    assert sft.run(config.build(raw, tmp_path / "sft.yaml")).kind == "adapter"
