"""Adapters: made by PEFT's names, attached to their own base only."""

from pathlib import Path

import pytest
import tiny
import torch

from llmtune import artifact
from llmtune.config.train import AdapterConfig
from llmtune.errors import ArtifactError, ConfigError
from llmtune.model import adapters, load


def finished_adapter(folder: Path, where: Path) -> artifact.Artifact:
    base = load.find(str(folder))
    model = load.load_model(base, "float32", "cpu")
    lora = AdapterConfig(method="lora", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = adapters.build_adapter(model, lora, "auto", 1e-3, seed=0)
    with artifact.writing(where / "adapter", "adapter") as draft:
        model.save_pretrained(draft.path)
        draft.facts["base"] = base.facts()
    return artifact.read(where / "adapter")


def test_an_adapter_is_attached_to_its_own_base_only(tiny_folder, tmp_path):
    adapter = finished_adapter(tiny_folder, tmp_path)
    base, other = load.find(str(tiny_folder)), load.find(str(tiny.save(tmp_path / "other", seed=1)))
    ids = torch.arange(20)[None]
    plain = load.load_model(base, "float32", "cpu")
    with torch.inference_mode():
        before = plain(ids).logits
        assert not torch.equal(adapters.attach(plain, base, adapter)(ids).logits, before)
    with pytest.raises(ArtifactError) as caught:
        adapters.attach(load.load_model(other, "float32", "cpu"), other, adapter)
    assert caught.value.exit_code == 2
    assert f"was trained on {tiny_folder} (weights {base.sha256[:12]})" in str(caught.value)
    assert f"this base is {tmp_path / 'other'} (weights {other.sha256[:12]}); use the base it was trained on" in str(
        caught.value
    )


def test_an_adapter_with_pickled_weights_is_refused(tiny_folder, tmp_path):
    base, adapter = load.find(str(tiny_folder)), finished_adapter(tiny_folder, tmp_path)
    (adapter.path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin: pickled weights can run code when read"):
        adapters.attach(load.load_model(base, "float32", "cpu"), base, adapter)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"target_modules": ["nope"]},
            r"'nope' matches no module\. Linear layers of this model: down_proj, gate_proj",
        ),
        ({"lora_dropout": 2.0}, "dropout probability has to be between 0 and 1"),
        ({"r": "two"}, "adapter: "),
    ],
)
def test_what_peft_refuses_is_said_in_one_error(tiny_folder, options, problem):
    model = load.load_model(load.find(str(tiny_folder)), "float32", "cpu")
    with pytest.raises(ConfigError, match=problem):
        adapters.build_adapter(model, AdapterConfig(method="lora", **options), "auto", 1e-3, seed=0)


@pytest.mark.parametrize(
    ("asked", "learning_rate", "dtype"),
    [
        ("auto", 1e-3, "bfloat16"),
        ("auto", 1e-5, "float32"),
        ("bfloat16", 1e-5, "bfloat16"),
        ("float32", 1e-3, "float32"),
    ],
)
def test_an_adapter_is_float32_where_bfloat16_would_round_its_updates_away(tiny_folder, asked, learning_rate, dtype):
    model = load.load_model(load.find(str(tiny_folder)), "bfloat16", "cpu")
    lora = AdapterConfig(method="lora", r=2, target_modules=["q_proj"])
    model = adapters.build_adapter(model, lora, asked, learning_rate, seed=0)
    assert {str(weight.dtype) for weight in model.parameters() if weight.requires_grad} == {f"torch.{dtype}"}


def test_the_folder_of_an_adapter_is_no_base(tiny_folder, tmp_path):
    with pytest.raises((ArtifactError, ConfigError), match="adapter"):
        load.find(str(finished_adapter(tiny_folder, tmp_path).path))
