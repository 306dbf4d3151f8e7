"""`llmtune plan`: figures that can be worked out by hand, what autograd really keeps, and levers that are tried in order."""

import json

import pytest
import tiny
import torch
from transformers import LlamaConfig

from llmtune import config, plan
from llmtune.config.train import AdapterConfig, TrainableConfig
from llmtune.errors import ConfigError
from llmtune.model import memory
from llmtune.model.memory import Batch, Kept

NOTHING = Kept(0.0, 0.0, 0.0, 0.0, 0.0)
BATCH = Batch(rows=1, length=2048, supervised=2048, positions=2048)


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int = 128_256) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


EIGHT, SEVENTY = llama(4096, 14_336, 32, 32, 8), llama(8192, 28_672, 80, 64, 8)  # Llama 3's published dimensions


def lora(rank: int = 16) -> AdapterConfig:
    return AdapterConfig.model_validate({"method": "lora", "r": rank, "target_modules": "all-linear"})


def sketch(shape: LlamaConfig, adapter=None, trainable=None, compute: str = "bfloat16"):
    return memory.sketch(shape, adapter, trainable, compute=compute, adapter_dtype=compute)


def need(model, held: Kept = NOTHING, **settings):
    defaults = {"checkpointing": False, "accumulates": False, "compute": "bfloat16", "on_cpu": False}
    return memory.need(model, held, BATCH, **defaults | settings)


def test_published_sizes():
    assert memory.count(sketch(EIGHT)) == (8_030_261_248, 8_030_261_248)
    assert memory.count(sketch(SEVENTY)) == (70_553_706_496, 70_553_706_496)


def test_seventy_billion_by_hand():
    size = 70_553_706_496
    full = need(sketch(SEVENTY))
    assert (full.trained, full.gradients, full.optimizer, full.weights) == (4 * size, 4 * size, 8 * size, 0)
    assert full.peak == 16 * size  # float32 weights, their gradients, two moments
    frozen = need(sketch(SEVENTY, lora()))
    assert frozen.weights == 2 * size  # 141 GB of bfloat16
    inputs_and_outputs = 4 * (8192 + 8192) - 2 * (8192 - 1024) + 3 * (8192 + 28_672)  # q, o; k, v; gate, up, down
    assert frozen.trained == 2 * 16 * 80 * inputs_and_outputs
    assert frozen.optimizer == 2 * frozen.trained
    linear = size - 2 * 128_256 * 8192 - (2 * 80 + 1) * 8192
    packed = need(sketch(SEVENTY, lora()), quantize="nf4")
    assert packed.weights == pytest.approx(2 * (size - linear) + linear * (0.5 + 1 / 64 + 4 / (64 * 256)))
    assert packed.workspace == 2 * 8192 * 28_672  # the largest layer, unpacked
    on_cpu = need(sketch(SEVENTY, lora()), quantize="nf4", on_cpu=True)
    assert on_cpu.workspace == packed.workspace + 2 * linear + memory.KERNELS  # and the file that it was read from


def test_sharding_divides_and_data_parallelism_does_not():
    model, size = sketch(EIGHT), 8_030_261_248
    ddp, fsdp, zero = (need(model, sharding=kind, devices=8) for kind in ("ddp", "fsdp2", "zero3"))
    assert (ddp.trained, ddp.gradients) == (4 * size, 8 * size)
    block = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336 + 2)
    outside = 2 * 128_256 * 4096 + 4096
    assert fsdp.peak == 16 * size / 8 + 2 * (outside + 2 * block)
    assert zero.peak == 16 * size / 8 + 2 * (1e9 + 5e8)
    assert need(model, sharding="fsdp2", devices=64).trained == 4 * size / 64


def test_the_logits_of_a_cpu_run():
    model = sketch(llama(64, 128, 2, 4, 2, vocabulary=1000), lora())
    batch = Batch(rows=2, length=50, supervised=60, positions=40)
    settings = {"checkpointing": False, "accumulates": False, "compute": "bfloat16", "on_cpu": True}
    assert memory.need(model, NOTHING, batch, **settings).loss == 80 * 1000 * 2 + 60 * 1000 * (2 + 4 + 4)
    wide = memory.need(sketch(llama(64, 128, 2, 4, 2, 1000)), NOTHING, batch, **settings | {"compute": "float32"})
    assert wide.loss == (80 + 60 + 60) * 1000 * 4 + 1000 * 64 * 4  # and the head's own gradient


H, INNER, HEADS, KV, LENGTH = 256, 704, 8, 2, 64


def block_by_hand(adapter: bool) -> int:
    """Bytes a token that one Llama block keeps: docs/plan.md."""
    if (
        adapter
    ):  # bfloat16: two norms in float32 and their outputs; q, k, v, o; gate, its silu, up, product; LoRA's middles
        return (2 * 4 + 2 * 2) * H + 4 * 2 * H + 4 * 2 * INNER + 7 * 16 * 2
    return (2 * 4 + 2 * 4 + 2 * 4) * H + 4 * 4 * H + 4 * 4 * INNER  # float32, all trained: what a norm multiplies, too


@pytest.mark.parametrize("adapter", [True, False])
def test_activations_of_a_llama_block_by_hand(adapter):
    compute = "bfloat16" if adapter else "float32"
    one, three = (
        memory.kept(
            sketch(llama(H, INNER, layers, HEADS, KV, 1000), lora() if adapter else None, compute=compute),
            LENGTH,
            mixed=False,
        )
        for layers in (1, 3)
    )
    block = (three.row - one.row) / 2
    mask = LENGTH * LENGTH * (2 if adapter else 4)
    small = LENGTH * (2 * 4 + HEADS * 4)  # a number a norm, and one a head
    assert block == pytest.approx(LENGTH * block_by_hand(adapter) + mask + small, rel=0.01)
    assert three.block == pytest.approx(block, rel=0.01)
    assert three.inputs == 3 * LENGTH * H * (2 if adapter else 4)
    assert three.bytes(4, checkpointing=True) < three.bytes(4, checkpointing=False)


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning", None])
def test_what_is_counted_is_what_autograd_keeps(method):
    """The same model with storage, on a batch with padding."""
    import peft

    adapter = method and AdapterConfig.model_validate(
        {"method": method, **({"num_virtual_tokens": 4} if "prompt" in method else {"target_modules": "all-linear"})}
    )
    if method == "ia3":
        adapter = AdapterConfig.model_validate(
            {"method": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        )
    model = tiny.model()
    counted = memory.kept(
        memory.sketch(model.config, adapter, None, compute="float32", adapter_dtype="float32"), 24, mixed=False
    )
    if adapter:
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.upper())]
        model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **adapter.options))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, 20:] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.train()(input_ids=torch.zeros_like(mask), attention_mask=mask, logits_to_keep=1, use_cache=False)
    assert counted.bytes(3, checkpointing=False) == pytest.approx(sum(found.values()), rel=0.02)
    assert out.logits.requires_grad


RUN_FILE = {
    "stage": "sft",
    "data": {"train": "./train.jsonl"},
    "adapter": {"method": "lora", "r": 2, "target_modules": "all-linear"},
    "train": {"epochs": 3.0, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3},
    "output_dir": "./run",
}


@pytest.fixture
def planned(tmp_path, tiny_folder, chat_rows):
    """`planned(train__batch_size=8)`: the plan of a small run file."""
    chat_rows(tmp_path, 10)

    def price(earlier=(), **changes):
        raw = json.loads(json.dumps(RUN_FILE)) | {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"}
        }
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            if leaf:
                raw[section][leaf] = value
            else:
                raw[section] = value
        return plan.of_run(config.build(raw, tmp_path / "sft.yaml"), "sft.yaml", list(earlier))

    return price


def test_a_run_in_figures(planned):
    found = planned()
    tokens = found["data"]["tokens"]
    assert (found["model"]["parameters"], found["model"]["trained"]) == (94_656, 4096)
    assert (found["run"]["steps"], found["run"]["tokens"], found["run"]["accumulation"]) == (9, 3 * tokens, 1)
    assert found["run"]["flops"] == 3 * tokens * (4 * (94_656) + 2 * 4096)
    assert found["run"]["seconds"] is None
    assert (found["batch"]["rows"], found["batch"]["length"]) == (4, found["data"]["longest"])
    parts = found["memory"]
    assert parts["weights"] == 4 * (94_656 - 4096)
    assert parts["optimizer"] == 8 * 4096
    assert found["device"]["fits"]
    assert found["proposal"]["overrides"] == []
    assert found["strategy"].startswith("few rows")


def test_the_time_is_that_of_an_earlier_run_of_the_same_base_and_method(planned, tiny_folder):
    other = {"run": "x", "base": str(tiny_folder), "method": "ia3", "tokens_per_s": 10.0}
    same = other | {"run": "first", "method": "lora", "tokens_per_s": 100.0}
    run = planned([other, same])["run"]
    assert run["seconds"] == run["tokens"] / 100
    assert run["basis"] == "100 tokens/s, measured in first"


def test_the_first_lever_that_makes_it_fit_is_proposed(planned, monkeypatch):
    settings = {"train__batch_size": 8, "train__micro_batch_size": 8}
    whole = planned(**settings)
    monkeypatch.setattr(plan.Run, "need", _priced(whole["memory"]["peak"]))
    for free, said in (
        (0.75, ["train.micro_batch_size=4"]),
        (0.3, ["train.micro_batch_size=2"]),
        (0.15, ["train.micro_batch_size=1"]),
        (0.1, ["train.micro_batch_size=1", "train.activation_checkpointing=true"]),
        (0.04, ["train.micro_batch_size=1", "train.activation_checkpointing=true", "model.quantize=nf4"]),
    ):
        monkeypatch.setattr(plan, "available", lambda _, free=free: free * whole["memory"]["peak"] / plan.ROOM)
        assert planned(**settings)["proposal"]["overrides"] == said
    monkeypatch.setattr(plan, "available", lambda _: 1.0)
    nothing = planned(**settings)
    assert nothing["proposal"] is None
    assert not nothing["device"]["fits"]


@pytest.mark.parametrize(
    ("adapter", "lever"),
    [
        ({"method": "loha"}, "quantize"),
        ({"method": "prefix_tuning", "num_virtual_tokens": 4}, "activation_checkpointing"),
    ],
)
def test_a_lever_that_the_run_would_refuse_is_not_proposed(planned, monkeypatch, adapter, lever):
    monkeypatch.setattr(plan.Run, "need", _priced(100.0))
    for free in (51.0, 26.0, 13.0, 7.0, 4.0):
        monkeypatch.setattr(plan, "available", lambda _, free=free: free / plan.ROOM)
        found = planned(adapter=adapter)["proposal"]
        assert lever not in str(found)


def test_each_of_two_phases_is_planned(planned, chat_rows, tmp_path):
    rows = chat_rows(tmp_path, 12, "all.jsonl").read_text().splitlines()[10:]
    (tmp_path / "val.jsonl").write_text("\n".join(rows) + "\n")
    data = {"train": "./train.jsonl", "validation": "./val.jsonl"}
    found = planned(data=data, second_phase={"trainable": {"top_blocks": 2}, "max_steps": 2})
    second = found["second_phase"]
    assert (found["model"]["method"], second["model"]["method"]) == ("lora", "partial")
    assert (found["model"]["trained"], found["run"]["steps"]) == (4096, 9)
    assert second["model"]["trained"] > 10 * 4096 and second["run"]["steps"] == 2
    assert "second_phase" not in planned()


def _priced(peak: float):
    """A need that is `peak` times the share of the micro batch, and a quarter and a half of it for the other two levers."""

    def price(self, setting, sharding="none", devices=1):
        share = setting.micro_batch_size / 8
        share *= 0.5 if setting.activation_checkpointing else 1.0
        share *= 0.5 if setting.quantize else 1.0
        return memory.Need(peak * share, 0, 0, 0, 0, 0, 0, 0, accumulates=False)

    return price


def test_packed_rows_are_one_row(planned):
    found = planned(data={"train": "./train.jsonl", "packing": True, "max_length": 128})
    assert found["batch"]["rows"] == 1
    assert found["batch"]["length"] > 3 * 80


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"method": "lora", "target_modules": ["nope"]}}, "'nope' matches no module.* or 'all-linear'"),
        ({"data": {"train": "./train.jsonl", "max_length": 4096}}, "data.max_length: 4096 is more than the 2048"),
        ({"data": {"train": "./train.jsonl", "validation": "./train.jsonl"}}, "10 of its rows are training rows too"),
        ({"train__optimizer": "adamw_tosch"}, "train.optimizer"),
        ({"adapter": None, "trainable": {"top_blocks": 5}}, "5 is more than the 2 blocks"),
    ],
)
def test_an_error_is_that_of_the_run(planned, changes, said):
    with pytest.raises(ConfigError, match=said):
        planned(**changes)


def test_part_of_the_weights(planned):
    found = planned(adapter=None, trainable={"top_blocks": 1})
    assert found["model"]["method"] == "partial"
    assert found["model"]["trained"] < found["model"]["parameters"] / 2
    assert found["memory"]["trained"] == 4 * found["model"]["trained"]


def test_a_table_of_strategies_proposes_the_first_that_fits():
    shape = llama(64, 128, 5, 4, 2, 1000)
    table = plan.strategies(shape, [1, 8], gpu_memory=2**31, micro=1, length=32)
    assert {line["strategy"] for line in table["lines"]} == set(plan.STRATEGIES) == set(table["first"])
    assert all(line["gpus"] == 1 and not line["activation_checkpointing"] for line in table["first"].values())
    full = [line for line in table["lines"] if line["strategy"] == "full"]
    assert len(full) == 2 + 2 * 3
    limit = min(line["peak"] for line in full)  # what shards most
    tight = plan.strategies(shape, [1, 8], gpu_memory=plan.CONTEXT + (limit + 1) / plan.ROOM, micro=1, length=32)
    assert tight["first"]["full"]["peak"] == limit
    assert tight["first"]["full"]["gpus"] == 8
    assert plan.strategies(shape, [1], gpu_memory=2**30, micro=1, length=32)["first"] == {}


@pytest.mark.parametrize(
    ("rows", "said"), [(50, "few rows"), (1000, "an adapter"), (20_000, "top blocks"), (200_000, "full fine-tuning")]
)
def test_what_the_number_of_rows_suggests(rows, said):
    assert said in plan.strategy(rows)


def test_top_blocks_are_counted_exactly():
    model = sketch(EIGHT, trainable=TrainableConfig(top_blocks=4))
    assert memory.count(model)[1] == 4 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336 + 2)
