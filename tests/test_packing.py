"""Packed rows: none lost, none seen by another, on every family and attention that is offered, or refused."""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path

import pytest
import tiny
import torch
from test_methods import METHODS, SMALLEST

from llmtune import config
from llmtune.config import peft_methods
from llmtune.config.train import AdapterConfig
from llmtune.data.tokens import IGNORED, TokenRow, write_dataset
from llmtune.errors import ConfigError, MachineError
from llmtune.model import adapters, infer, load
from llmtune.training import packing

PAD = 1
APART = [
    (name, attention) for name in ("llama", "qwen2", "qwen3", "mistral", "phi3") for attention in ("eager", "sdpa")
]
APART += [("gemma2", "eager"), ("gemma3_text", "eager"), ("gemma3_text", "sdpa")]


def token_rows(lengths: tuple[int, ...] = (31, 20, 5, 40, 12), shared: int = 0) -> list[TokenRow]:
    """Random rows, some longer than any sliding window here; the last half of each is supervised."""
    draw = random.Random(0)
    ahead = [draw.randrange(2, 258) for _ in range(shared)]
    rows = [[*ahead, *(draw.randrange(2, 258) for _ in range(n))] for n in lengths]
    return [TokenRow(ids, [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :]) for ids in rows]


def each_loss(model, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits, targets = infer.supervised_logits(model, inputs, labels)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def packed_batch(rows: list[TokenRow]) -> tuple[dict, torch.Tensor]:
    collate = packing.Collator(PAD, padding_free=True)
    batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    return batch, batch.pop("labels")


# ---- forward passes


@pytest.mark.parametrize(("name", "attention"), APART)
def test_a_token_has_one_loss_packed_padded_and_alone(name: str, attention: str) -> None:
    model, rows = tiny.family(name, attention), token_rows()
    alone = torch.cat([each_loss(model, *infer.pad([row], PAD, "cpu")) for row in rows])
    torch.testing.assert_close(each_loss(model, *packed_batch(rows)), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(each_loss(model, *infer.pad(rows, PAD, "cpu")), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "attention"), APART)
def test_our_own_losses_are_those_of_a_row_alone(name: str, attention: str) -> None:
    """Batches of any length, and a shared prefix that is run once, longer than the sliding windows."""
    model = tiny.family(name, attention)
    for shared in (0, 24):
        rows = token_rows((31, 40, 35, 26), shared)
        alone = [each_loss(model, *infer.pad([row], PAD, "cpu")).mean().item() for row in rows]
        assert infer.token_losses(model, rows, PAD) == pytest.approx(alone, abs=1e-5)


def test_the_first_token_of_a_packed_row_is_nobodys_next_one() -> None:
    rows = [TokenRow(row.input_ids, row.input_ids) for row in token_rows()]
    _, labels = packed_batch(rows)
    starts = [sum(len(row.input_ids) for row in rows[:n]) for n in range(len(rows))]
    assert labels[0, starts].tolist() == [IGNORED] * len(rows)
    assert (labels[0, 1:] != IGNORED).sum() == sum(len(row.input_ids) - 1 for row in rows)


# ---- sequences


@pytest.fixture
def packed(tmp_path: Path):
    dataset = write_dataset(iter(token_rows()), tmp_path / "rows.arrow")
    return packing.pack(dataset, 64, tmp_path / "packed.arrow")


def test_every_row_is_in_one_sequence_whole(tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = token_rows(tuple(draw.randrange(2, 60) for _ in range(2500)))  # more than TRL packs at a time
    sequences = packing.pack(write_dataset(iter(rows), tmp_path / "rows.arrow"), 64, tmp_path / "packed.arrow")
    found = []
    for sequence in sequences:
        assert sum(sequence["seq_lengths"]) == len(sequence["input_ids"]) == len(sequence["labels"]) <= 64
        ends = [sum(sequence["seq_lengths"][:n]) for n in range(len(sequence["seq_lengths"]) + 1)]
        found += [
            (tuple(sequence["input_ids"][a:b]), tuple(sequence["labels"][a:b])) for a, b in itertools.pairwise(ends)
        ]
    assert sorted(found) == sorted((tuple(row.input_ids), tuple(row.labels)) for row in rows)
    assert sum(map(len, sequences["input_ids"])) / (64 * len(sequences)) > 0.97


def test_the_same_rows_make_the_same_file(tmp_path: Path) -> None:
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        packing.pack(write_dataset(iter(token_rows()), folder / "rows.arrow"), 64, folder / "packed.arrow")
        made.append((folder / "packed.arrow").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
def test_weights_go_with_their_tokens(padding_free: bool) -> None:
    examples = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "weights": [0.0, 0.5, 2.0], "seq_lengths": [3]},
        {"input_ids": [8, 9], "labels": [IGNORED, 9], "weights": [0.0, 1.0], "seq_lengths": [2]},
    ]
    batch = packing.Collator(PAD, padding_free=padding_free)(examples)
    expected = [[0.0, 0.5, 2.0, 0.0, 1.0]] if padding_free else [[0.0, 0.5, 2.0], [0.0, 1.0, 0.0]]
    assert batch["weights"].tolist() == expected
    assert batch["weights"].shape == batch["labels"].shape


# ---- the check before the first step


@pytest.mark.parametrize(("name", "attention"), APART)
def test_families_that_keep_rows_apart_pass(name: str, attention: str, packed) -> None:
    packing.require_isolation(
        tiny.family(name, attention), packed, packing.Collator(PAD, padding_free=True), "f", mixed_bf16=False
    )


@pytest.mark.parametrize("name", ["bloom", "opt", "mamba"])
def test_families_that_do_not_are_refused(name: str, packed) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.packing: \w+ForCausalLM with \w+ attention does not keep packed rows"
    ):
        packing.require_isolation(
            tiny.family(name), packed, packing.Collator(PAD, padding_free=True), "f", mixed_bf16=False
        )


class Leaking(packing.Collator):
    """As a batch looks to a model that is told of an attention mask: positions restart, and rows see each other."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_leak_is_seen_in_either_dtype(packed, dtype: torch.dtype) -> None:
    model = tiny.model().to(dtype)
    packing.require_isolation(model, packed, packing.Collator(PAD, padding_free=True), "f", mixed_bf16=False)
    with pytest.raises(ConfigError, match="does not keep packed rows apart"):
        packing.require_isolation(model, packed, Leaking(PAD, padding_free=True), "f", mixed_bf16=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_looks_along_the_sequence_is_seen_and_left_as_it_was(packed, dtype: str) -> None:
    """A new adapter is the identity: only stirred does it show what it does. Afterwards every weight is as before, to the bit.

    In bfloat16 what it does is less than rounding may do, and only a row that changes with the one before it gives it away.
    """
    adapter = AdapterConfig(method="lora", r=4, target_modules="all-linear", lora_dropout=0.5)
    model = adapters.build_adapter(tiny.model().to(getattr(torch, dtype)), adapter, dtype, 1e-3, seed=0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collate = packing.Collator(PAD, padding_free=True)
    packing.require_isolation(model, packed, collate, "f", mixed_bf16=False)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp.down_proj.lora_A"))
    layer.default.register_forward_hook(lambda module, given, out: out + out.cumsum(1))
    with pytest.raises(ConfigError, match="does not keep packed rows apart"):
        packing.require_isolation(model, packed, collate, "f", mixed_bf16=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


ALONG = {"lily"}
"""Methods that mix all tokens of a batch: Lily weighs its experts by a mean over them, padding included."""


@pytest.mark.parametrize("method", [m for m in METHODS if not peft_methods.has_virtual_tokens(m)])
def test_every_method_keeps_packed_rows_apart_or_is_refused(packed, method: str) -> None:
    adapter = AdapterConfig(method=method, **SMALLEST.get(method, {}))
    model = adapters.build_adapter(tiny.model(), adapter, "float32", 1e-3, seed=0, steps=6)
    refused = pytest.raises(ConfigError, match="does not keep packed rows apart")
    with refused if method in ALONG else contextlib.nullcontext():
        packing.require_isolation(model, packed, packing.Collator(PAD, padding_free=True), "f", mixed_bf16=False)


class Shifted(packing.Collator):
    """Rows apart, but none after the first begins at position 0."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        return batch | {"position_ids": batch["position_ids"] + 7 * batch["seq_idx"]}


def test_positions_that_do_not_begin_anew_are_seen(packed) -> None:
    model = tiny.family("gpt2")
    packing.require_isolation(model, packed, packing.Collator(PAD, padding_free=True), "f", mixed_bf16=False)
    with pytest.raises(ConfigError, match=r"changes by 0 nats with the row before it"):
        packing.require_isolation(model, packed, Shifted(PAD, padding_free=True), "f", mixed_bf16=False)


def test_a_model_that_takes_no_packed_rows_says_why(packed) -> None:
    lfm2 = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    made = tiny.AutoConfig.for_model("lfm2", vocab_size=258, hidden_size=64, num_hidden_layers=2, **lfm2)
    model = tiny.AutoModelForCausalLM.from_config(made).eval()
    with pytest.raises(ConfigError, match=r"data\.packing: this model cannot be given packed rows \(.*causal_conv1d"):
        packing.require_isolation(model, packed, packing.Collator(PAD, padding_free=True), "f", mixed_bf16=False)


# ---- settings


def run_file(**changes: object) -> config.Section:
    raw: dict = {
        "stage": "sft",
        "model": "./base",
        "data": {"train": "./train.jsonl", "packing": True},
        "adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"},
        "train": {"epochs": 1},
        "output_dir": "./run",
    }
    return config.build(raw | changes, Path("sft.yaml"))


VIRTUAL = [method for method in peft_methods.methods() if peft_methods.has_virtual_tokens(method)]


def test_methods_with_virtual_tokens_are_those_of_peft() -> None:
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value.lower(): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert set(VIRTUAL) == {method for method, made in known.items() if issubclass(made, PromptLearningConfig)}


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_are_not_packed(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.packing: {method} puts tokens of its own before each row"):
        run_file(adapter={"method": method} | SMALLEST.get(method, {}))


def test_an_activated_lora_is_not_packed() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.packing: an activated LoRA .* remove adapter\.alora_invocation_tokens"
    ):
        run_file(adapter={"method": "lora", "r": 4, "alora_invocation_tokens": [5, 6]})


@pytest.mark.parametrize("grouped", [True, False])
def test_grouping_by_length_has_no_effect_on_packed_rows(grouped: bool) -> None:
    with pytest.raises(ConfigError, match=r"train\.group_by_length: has no effect with data\.packing; remove it"):
        run_file(train={"epochs": 1, "group_by_length": grouped})


def test_an_attention_that_this_machine_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"flex_attention has no backward pass on a CPU; use 'sdpa'"):
        load.require_attention("flex_attention", "cpu", "f")
    with pytest.raises(MachineError, match=r"flash_attention_2 needs a GPU; use 'sdpa'"):
        load.require_attention("flash_attention_2", "cpu", "f")
    if load.importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(MachineError, match=r"needs the package flash-attn, which is not installed; use 'sdpa'"):
            load.require_attention("flash_attention_2", "cuda", "f")
    with pytest.raises(ConfigError, match=r"model\.attention: flash_attention_2 does not compute in float32"):
        run_file(model={"name": "./base", "dtype": "float32", "attention": "flash_attention_2"})


def test_the_attention_asked_for_is_the_one_used(tiny_folder: Path, tmp_path: Path) -> None:
    source = load.find(str(tiny_folder))
    for attention in ("eager", "sdpa"):
        model = load.load_model(source, "float32", "cpu", attention=attention)
        assert model.config._attn_implementation == attention
    tiny.family("gemma2").save_pretrained(tmp_path / "gemma2")
    with pytest.raises(ConfigError, match=r"model\.attention: .*gemma2 has no such attention"):
        load.load_model(load.find(str(tmp_path / "gemma2")), "float32", "cpu", attention="sdpa")


# ---- what is said of it


def test_the_padding_share_is_what_is_padded() -> None:
    assert packing.padding_share([4, 1, 3, 2], [0, 1, 2, 3], 2) == pytest.approx(1 - 10 / 14)
    assert packing.padding_share([4, 1, 3, 2], [1, 3, 2, 0], 2) == pytest.approx(1 - 10 / 12)
    assert packing.padding_share([4, 1, 3], [0, 1, 2], 2) == pytest.approx(1 - 8 / 11)
    assert packing.padding_share([4, 1, 3, 2], [0, 1, 2, 3], 1) == 0
