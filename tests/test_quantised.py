"""Bases in 4 and 8 bits: one arithmetic for training and for answers, an adapter in the dtype that was asked for, what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmtune import cli, config
from llmtune.config import peft_methods
from llmtune.config.train import AdapterConfig
from llmtune.data.tokens import encode_chat
from llmtune.errors import ConfigError
from llmtune.evaluate import arms
from llmtune.model import adapters, infer, load, quantised
from llmtune.stages import sft
from llmtune.training import callbacks

pytest.importorskip("bitsandbytes")
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
IDS = torch.arange(5, 60)[None]
LORA = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}


def base(folder: Path, kind: str | None, dtype: str = "float32"):
    return load.load_model(load.find(str(folder), quantize=kind), dtype, "cpu")


def adapted(folder: Path, kind: str, dtype: str = "float32", asked: str = "auto"):
    config = AdapterConfig(**{**LORA, "init_lora_weights": False, "lora_dropout": 0.0})
    return adapters.build_adapter(base(folder, kind, dtype), config, asked, 1e-3, seed=0)


@pytest.fixture
def run_file(tmp_path: Path, tiny_folder: Path, chat_rows):
    """Writes a run file of a small LoRA run on an NF4 base, with what is given on top; returns its loaded config."""
    chat_rows(tmp_path, 16)
    rows = [
        [{"role": "user", "content": f"take {i} from 9"}, {"role": "assistant", "content": str(9 - i)}]
        for i in range(4)
    ]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))

    def write(name: str = "run", model: dict[str, object] | None = None, **train: object) -> config.Section:
        raw = {
            "stage": "sft",
            "model": {"name": str(tiny_folder), "dtype": "bfloat16", "quantize": "nf4", **(model or {})},
            "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
            "adapter": LORA,
            "train": {
                "max_steps": 6,
                "batch_size": 4,
                "micro_batch_size": 4,
                "learning_rate": 1e-2,
                "eval_steps": 2,
                **train,
            },
            "output_dir": f"./{name}",
        }
        return config.build(raw, tmp_path / "sft.yaml")

    return write


OPTIONS = {
    "adalora": {"init_r": 4, "target_r": 2},
    "adaption_prompt": {"adapter_layers": 2, "adapter_len": 4},
    "c3a": {"block_size": 32},
    "road": {"group_size": 32},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [1, 2, 3]},
    "vblora": {"vector_length": 32},
    "waveft": {"n_frequency": 100},
    **{name: {"num_virtual_tokens": 4} for name in ("cartridge", "p_tuning", "prefix_tuning", "prompt_tuning")},
}


def curve(folder: Path, kind: str, method: str, *, plain: bool) -> list[float]:
    """Losses of a few steps of `method`, on the quantised base or on the same base dequantised."""
    model = base(folder, kind)
    model = quantised.dequantised(model, torch.float32) if plain else model
    fields = AdapterConfig(method=method, **OPTIONS.get(method, {}))
    model = adapters.build_adapter(model, fields, "float32", 1e-2, seed=0, steps=10).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    found = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("method", sorted(peft_methods.ON_8_BITS))
@KINDS
@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # PEFT's own, of single methods, which have nothing to do with the base
def test_a_method_trains_on_a_quantised_base_as_on_the_same_base_dequantised(tiny_folder, kind, method) -> None:
    if kind == "nf4" and method not in peft_methods.ON_4_BITS:
        with pytest.raises(ValueError, match=f"PEFT's {method} does not train rightly on nf4 weights.*lora"):
            peft_methods.check_quantised(method, kind)
        return
    plain, quantised_one = curve(tiny_folder, kind, method, plain=True), curve(tiny_folder, kind, method, plain=False)
    assert plain[-1] < plain[0]
    assert quantised_one == pytest.approx(plain, abs=1e-5)


@KINDS
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_method_that_is_refused_fails_or_trains_on_something_else(tiny_folder, kind) -> None:
    """So that one which PEFT makes right is let in, and a new one is looked at."""
    more_than_tokens = {"cpt", "multitask_prompt_tuning", "poly", "xlora"}  # want inputs that no row of ours has
    able = peft_methods.ON_8_BITS if kind == "int8" else peft_methods.ON_4_BITS
    for method in sorted(peft_methods.methods().keys() - able - more_than_tokens):
        try:
            found = curve(tiny_folder, kind, method, plain=False)
        except (ConfigError, RuntimeError, TypeError, ValueError):
            continue
        assert found != pytest.approx(curve(tiny_folder, kind, method, plain=True), abs=1e-3), method


def test_the_page_counts_the_methods() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "quantised.md").read_text(encoding="utf-8")
    assert f"{len(peft_methods.ON_4_BITS)} methods" in page


@KINDS
def test_a_pass_in_eval_mode_changes_nothing_of_training(tiny_folder, kind) -> None:
    """bitsandbytes on a CPU would lay 4-bit weights out anew at the first answer, and no gradient would pass them again."""
    gradients = []
    for answers_first in (False, True):
        model = adapted(tiny_folder, kind)
        if answers_first:
            with torch.no_grad():
                model.eval()(input_ids=IDS)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_4_bit_base_trains_and_answers_by_one_arithmetic(tiny_folder) -> None:
    model = base(tiny_folder, "nf4")
    with torch.no_grad():
        answered = model.eval()(input_ids=IDS).logits
        assert torch.equal(model.train()(input_ids=IDS).logits, answered)


@KINDS
def test_without_its_adapter_the_model_is_the_quantised_base(tiny_folder, kind) -> None:
    model = adapted(tiny_folder, kind).eval()
    with torch.no_grad():
        with model.disable_adapter():
            off = model(input_ids=IDS).logits
        fresh = base(tiny_folder, kind)(input_ids=IDS).logits
        assert torch.equal(off, fresh)
        assert not torch.equal(fresh, base(tiny_folder, None)(input_ids=IDS).logits)
        assert not torch.equal(fresh, model(input_ids=IDS).logits)


@KINDS
@pytest.mark.parametrize(
    ("asked", "rate", "kept"),
    [
        ("auto", 1e-2, "bfloat16"),
        ("auto", 1e-5, "float32"),
        ("float32", 1e-2, "float32"),
        ("bfloat16", 1e-5, "bfloat16"),
    ],
)
def test_the_adapter_has_the_dtype_that_was_asked_for_from_the_first_step_to_the_file(
    run_file, kind, asked, rate, kept
):
    made = sft.run(
        run_file(model={"quantize": kind}, adapter_dtype=asked, learning_rate=rate, max_steps=1, eval_steps=1)
    )
    assert {str(tensor.dtype) for tensor in load_file(made.path / "adapter_model.safetensors").values()} == {
        f"torch.{kept}"
    }
    source = load.find_again(made.manifest["base"])
    model = adapters.attach(load.load_model(source, "bfloat16", "cpu"), source, made)
    again = {str(weight.dtype) for name, weight in model.named_parameters() if "lora_" in name}
    assert again == {f"torch.{kept}"}


def test_training_on_4_bits_lowers_the_loss_and_the_manifest_says_4_bits(run_file) -> None:
    made = sft.run(run_file(max_steps=20, eval_steps=20))
    losses = [
        line["loss"]
        for line in map(json.loads, (made.path / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert made.manifest["base"]["quantize"] == made.manifest["base"]["quantised"] == "nf4"
    assert load.find_again(made.manifest["base"]).quantize == "nf4"


def test_activation_checkpointing_changes_memory_and_not_the_result(run_file) -> None:
    plain, saving = (sft.run(run_file(f"run-{on}", activation_checkpointing=on)) for on in (False, True))
    before, after = (load_file(made.path / "adapter_model.safetensors") for made in (plain, saving))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resumed_on_4_bits_equals_uninterrupted_to_the_bit(run_file, monkeypatch) -> None:
    whole = sft.run(run_file("whole"))

    def interrupt(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sft.run(run_file("cut"))
    resumed = sft.run(run_file("cut"))
    before, after = (load_file(made.path / "adapter_model.safetensors") for made in (whole, resumed))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_dequantised_base_is_the_quantised_one_in_bfloat16_too(tiny_folder) -> None:
    model = base(tiny_folder, "nf4", "bfloat16")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        assert torch.equal(before, quantised.dequantised(model, torch.bfloat16)(input_ids=IDS).logits)


@KINDS
def test_the_dequantised_base_is_the_quantised_one(tiny_folder, kind) -> None:
    """NF4 exactly, even after an answer. 8 bits: the product itself rounds its inputs, so the logits are near and not equal."""
    model = base(tiny_folder, kind)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        plain = quantised.dequantised(model, torch.float32)
        after = plain(input_ids=IDS).logits
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(before, after) if kind == "nf4" else (before - after).abs().max() < 0.2


def test_what_cannot_be_trained_is_refused_before_weights_load(run_file, tmp_path, tiny_folder, monkeypatch) -> None:
    raw = run_file().model_dump(exclude_unset=True) | {"adapter": None}
    with pytest.raises(ConfigError, match=r"model\.quantize: nf4 weights cannot be trained.*add an 'adapter' section"):
        config.build(raw, tmp_path / "sft.yaml")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed; pip install 'llmtune\[quantised\]'"):
        quantised.require_loadable(load.find(str(tiny_folder), quantize="nf4"), "cpu")
    with pytest.raises(ConfigError, match=r"PEFT's hra does not train rightly on nf4 weights.*lora"):
        config.build(run_file().model_dump(exclude_unset=True) | {"adapter": {"method": "hra"}}, tmp_path / "sft.yaml")


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory, tiny_folder) -> Path:
    """A checkpoint whose weights lie in NF4 on disk, as one finds them on the hub."""
    folder = tmp_path_factory.mktemp("nf4") / "base"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    base(tiny_folder, "nf4", "bfloat16").save_pretrained(folder)
    return folder


def test_a_checkpoint_that_is_quantised_already_trains_as_it_is(run_file, nf4_folder, tiny_folder, tmp_path) -> None:
    with torch.no_grad():
        here, there = (
            base(folder, kind, "bfloat16")(input_ids=IDS).logits
            for folder, kind in ((nf4_folder, None), (tiny_folder, "nf4"))
        )
    assert torch.equal(here, there)
    raw = run_file().model_dump(exclude_unset=True)
    raw["model"] = {"name": str(nf4_folder), "dtype": "bfloat16"}
    made = sft.run(config.build(raw, tmp_path / "sft.yaml"))
    assert made.manifest["base"]["quantised"] == "nf4" and made.manifest["base"]["quantize"] is None
    source = load.find_again(made.manifest["base"])
    adapters.attach(load.load_model(source, "bfloat16", "cpu"), source, made)
    with pytest.raises(ConfigError, match=r"dtype: .* is quantised on disk and computes in bfloat16; set it to auto"):
        load.load_model(source, "float32", "cpu")


def test_a_float16_checkpoint_gets_a_float32_adapter(run_file, tiny_folder, tmp_path) -> None:
    """As GPTQ and AWQ checkpoints often are: nothing is trained in a format of so little range."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    base(tiny_folder, "nf4", "float16").save_pretrained(tmp_path / "base")
    raw = run_file().model_dump(exclude_unset=True)
    made = sft.run(config.build(raw | {"model": str(tmp_path / "base")}, tmp_path / "sft.yaml"))
    weights = load_file(made.path / "adapter_model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert made.manifest["base"]["dtype"] == "float16"


def test_what_a_quantised_checkpoint_cannot_do_is_said_before_weights_load(run_file, nf4_folder, tmp_path) -> None:
    raw = run_file().model_dump(exclude_unset=True)
    for changes, problem in (
        (
            {"model": {"name": str(nf4_folder), "quantize": "nf4"}},
            r"model\.quantize: .* is quantised already \(nf4\); remove",
        ),
        (
            {"model": {"name": str(nf4_folder)}, "adapter": None},
            r"is quantised \(nf4\), and a quantised weight cannot be trained",
        ),
        (
            {"model": {"name": str(nf4_folder)}, "adapter": {"method": "hra"}},
            "PEFT's hra does not train rightly on nf4",
        ),
    ):
        if changes.get("adapter", ...) is None:
            changes["train"] = {"max_steps": 1}
        with pytest.raises(ConfigError, match=problem):
            sft.run(config.build(raw | changes, tmp_path / "sft.yaml"))


@pytest.mark.parametrize(
    ("stated", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
        ({"quant_method": "new"}, "Unknown quantization type"),
    ],
)
def test_a_checkpoint_whose_package_is_missing_names_it(tiny_folder, tmp_path, stated, package) -> None:
    for name in ("optimum", "gptqmodel", "hqq"):
        if importlib.util.find_spec(name):
            pytest.skip(f"{name} is installed here")
    shutil.copytree(tiny_folder, tmp_path / "base")
    facts = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(facts | {"quantization_config": stated}))
    source = load.find(str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=rf"(?i)is quantised \({stated['quant_method']}\): .*{package}"):
        load.load_model(source, "float32", "cpu")


def test_an_evaluation_compares_with_the_quantised_base(run_file, tiny_folder, tmp_path) -> None:
    made = sft.run(run_file())
    (tmp_path / "items.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "prompt": f"say {i}", "answer": f"it is {i}"}) + "\n" for i in range(4))
    )
    suite = {"suite": "own", "description": "d", "licence": "own", "items": "./items.jsonl", "metrics": ["loss"]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite | {"gate": {"loss": {"margin": 0.1}}}))
    settings = {"stage": "eval", "run": str(made.path.parent), "suites": ["./suite.yaml"]}
    measured = arms.run(config.build(settings, tmp_path / "eval.yaml"), tmp_path / "eval.yaml")
    records = [json.loads(line) for line in (measured.path / "scores.jsonl").read_text().splitlines()]
    tokenizer = load.load_tokenizer(load.find(str(tiny_folder)))
    rows = [
        encode_chat(
            tokenizer, [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]
        )
        for i in range(4)
    ]
    expected = infer.token_losses(base(tiny_folder, "nf4", "bfloat16"), rows, tokenizer.pad_token_id)
    assert [record["value"] for record in records if record["arm"] == "base"] == expected


def test_a_quantised_weight_that_is_to_be_saved_whole_is_refused(run_file, tmp_path) -> None:
    raw = run_file().model_dump(exclude_unset=True)
    raw["adapter"] = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
    with pytest.raises(ConfigError, match="gradient of quantised weights"):
        sft.run(config.build(raw, tmp_path / "sft.yaml"))


def test_only_what_bitsandbytes_says_about_itself_is_kept_from_the_user(monkeypatch, caplog) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with warnings.catch_warnings():
        cli._quiet()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
    logger.warning("your weights are on fire")
    logging.getLogger("bitsandbytes.autograd._functions").warning("MatMul8bitLt: inputs will be cast from %s", "x")
    assert caplog.messages == ["your weights are on fire"]


def test_loftq_without_a_gpu_is_an_error(tiny_folder) -> None:
    loftq = AdapterConfig(method="lora", target_modules=["q_proj"], init_lora_weights="loftq")
    with pytest.raises(ConfigError, match="PEFT computes loftq on an NVIDIA GPU only"):
        adapters.build_adapter(base(tiny_folder, "nf4"), loftq, "float32", 1e-3, seed=0)
