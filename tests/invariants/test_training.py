"""Nothing of ours bends the maths: the stage equals a plain PyTorch loop, and every equivalent set-up gives one trajectory.

Everything in one process, in float32 and without dropout unless said. A curve is a loss a step, in nats per supervised token.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llmtune import config
from llmtune.artifact import Artifact
from llmtune.data.chats import load_chats
from llmtune.data.tokens import IGNORED, Counts, TokenRow, encode_chats
from llmtune.model import adapters, infer, load
from llmtune.stages import sft
from llmtune.training import callbacks, loop, packing, trainer

STEPS, RATE, ROWS, PAD = 6, 5e-3, 8, 257
SAME = 2e-5
"""Nats by which two float32 curves of one trajectory may differ: sums are taken in another order."""
LORA = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PACKED = {"data__packing": True, "data__max_length": 96, "train__batch_size": 4, "train__micro_batch_size": 4}
"""Eight rows become four sequences, so that a step still sees every row."""


def write_rows(folder: Path, n: int, name: str = "train.jsonl") -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{name[:1]} say " + "x" * i},
                {"role": "assistant", "content": "y" * (8 - i % 8) + "!"},
            ]
        }
        for i in range(n)
    ]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path):
    """`run(name, section__key=value, ...)`: the stage on eight rows, all of them in every step."""
    write_rows(tmp_path, ROWS)
    write_rows(tmp_path, 5, "validation.jsonl")

    def sft_run(name: str, **changes: object) -> Artifact:
        raw: dict = {
            "stage": "sft",
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "data": {"train": "./train.jsonl"},
            "adapter": LORA,
            "train": {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 8, "learning_rate": RATE},
            "output_dir": f"./{name}",
        }
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            raw[section] = raw.get(section, {}) | {leaf: value} if leaf else value
        return sft.run(config.build(raw, tmp_path / "sft.yaml"))

    return sft_run


def logged(made: Artifact, key: str = "loss") -> list[float]:
    lines = map(json.loads, (made.path / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def weights(made: Artifact) -> dict[str, torch.Tensor]:
    return load_file(made.path / "adapter_model.safetensors")


def encoded(folder: Path, tiny_folder: Path, name: str = "train.jsonl") -> list[TokenRow]:
    tokenizer = load.load_tokenizer(load.find(str(tiny_folder)))
    return list(encode_chats(load_chats(str(folder / name), training=True), tokenizer, 512, "error", Counts()))


def fresh_model(tiny_folder: Path):
    """The base with the adapter that every run here begins with."""
    base = load.load_model(load.find(str(tiny_folder)), "float32")
    return adapters.build_adapter(
        base, config.validate(adapters.AdapterConfig, LORA, "adapter"), "float32", RATE, seed=0
    )


def weighted_loss(model, batch: list[TokenRow]) -> torch.Tensor:
    """sum(w * nll) / sum(w) over the supervised tokens of padded rows, from full logits."""
    inputs, labels = infer.pad(batch, PAD, "cpu")
    logits = model(**inputs).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels[:, 1:].shape)
    weight = (labels != IGNORED).float()
    for row, tokens in enumerate(batch):
        if tokens.weights:
            weight[row, : len(tokens.weights)] *= torch.tensor(tokens.weights)
    return (each * weight[:, 1:]).sum() / weight[:, 1:].sum()


def by_hand(tiny_folder: Path, batches: list[list[TokenRow]]) -> list[float]:
    """A loop as in a textbook: rows padded, full logits, AdamW, clipping, a linear schedule. Returns the loss of each step."""
    model = fresh_model(tiny_folder).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / len(batches))
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- the plain loop


def test_the_stage_equals_a_plain_loop(run, tmp_path: Path, tiny_folder: Path) -> None:
    expected = by_hand(tiny_folder, [encoded(tmp_path, tiny_folder)] * STEPS)
    assert logged(run("stage")) == pytest.approx(expected, abs=SAME)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("micro", [4, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_training_equals_a_plain_loop_over_padded_rows(
    run, tmp_path: Path, tiny_folder: Path, micro: int, attention: str
) -> None:
    expected = by_hand(tiny_folder, [encoded(tmp_path, tiny_folder)] * STEPS)
    made = run("packed", **PACKED | {"train__micro_batch_size": micro, "model__attention": attention})
    assert made.manifest["data"]["batches"]["sequences"] == 4
    assert made.manifest["data"]["train"]["rows"] == ROWS
    assert logged(made) == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3", "gemma2", "gemma3_text"])
def test_other_families_equal_the_plain_loop_padded_and_packed(run, tmp_path: Path, family: str) -> None:
    """All but Qwen with sliding windows shorter than the rows, and with them Gemma's capped logits."""
    folder = tmp_path / family
    tiny.family(family).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    expected = by_hand(folder, [encoded(tmp_path, folder)] * STEPS)
    for name, changes in (("padded", {"train__micro_batch_size": 2}), ("packed", PACKED)):
        assert logged(run(name, model__name=str(folder), **changes)) == pytest.approx(expected, abs=SAME)


# ---- equivalent set-ups


@pytest.mark.parametrize(
    "changes",
    [
        {"train__micro_batch_size": 1},
        {"train__micro_batch_size": 2},
        {"train__group_by_length": False},
        {"train__activation_checkpointing": True},
        PACKED | {"train__activation_checkpointing": True},
        {"model__attention": "eager"},
    ],
    ids=["1x8 = 8x1", "2x4 = 8x1", "rows in any order", "checkpointing", "checkpointing, packed", "eager = sdpa"],
)
def test_equivalent_set_ups_give_one_trajectory(
    run, tmp_path: Path, tiny_folder: Path, changes: dict[str, object]
) -> None:
    """That of the plain loop, which the stage itself follows above."""
    expected = by_hand(tiny_folder, [encoded(tmp_path, tiny_folder)] * STEPS)
    assert logged(run("other", **changes)) == pytest.approx(expected, abs=SAME)


def test_a_class_that_does_not_count_tokens_is_trained_like_any_other(
    run, tmp_path: Path, tiny_folder: Path, monkeypatch
) -> None:
    """Gemma3ForConditionalGeneration says so, by which transformers takes the mean of the means of micro batches."""
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    expected = by_hand(tiny_folder, [encoded(tmp_path, tiny_folder)] * STEPS)
    assert logged(run("other", train__micro_batch_size=2)) == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("changes", [{}, {"data__packing": True, "data__max_length": 96}], ids=["padded", "packed"])
def test_the_last_batch_of_an_epoch_is_a_step_of_its_own(
    run, tmp_path: Path, tiny_folder: Path, monkeypatch, changes: dict[str, object]
) -> None:
    """Ten rows, or five sequences, in batches of four: the last step of an epoch has what is left, and its own denominator."""
    write_rows(tmp_path, 10)
    seen = _batches_seen(monkeypatch)
    sizes = {"train__batch_size": 4, "train__micro_batch_size": 2, "train__epochs": 2, "train__max_steps": None}
    made = run("run", **sizes | changes)
    units = made.manifest["data"]["batches"].get("sequences", 10)
    steps = -(-units // 4)
    micro = [-(-units // 2)] * 2
    assert made.manifest["metrics"]["steps"] == 2 * steps
    assert len(seen) == sum(micro)
    batches = []
    for epoch in (seen[: micro[0]], seen[micro[0] :]):
        batches += [[row for part in epoch[n : n + 2] for row in part] for n in range(0, len(epoch), 2)]
        assert sorted(tuple(row.input_ids) for part in epoch for row in part) == sorted(
            tuple(row.input_ids) for row in encoded(tmp_path, tiny_folder)
        )
    assert logged(made) == pytest.approx(by_hand(tiny_folder, batches), abs=SAME)


def _batches_seen(monkeypatch) -> list[list[TokenRow]]:
    """The rows of every micro batch that is trained on, as the collator gets them, sequences taken apart."""
    seen: list[list[TokenRow]] = []
    collate = packing.Collator.torch_call

    def watched(self, examples):
        seen.append([])
        for example in examples:
            start = 0
            for length in example.get("seq_lengths", [len(example["input_ids"])]):
                part = slice(start, start + length)
                seen[-1].append(TokenRow(example["input_ids"][part], example["labels"][part]))
                start += length
        return collate(self, examples)

    check = packing.require_isolation

    def quietly(*arguments, **settings):
        check(*arguments, **settings)
        seen.clear()

    monkeypatch.setattr(packing.Collator, "torch_call", watched)
    monkeypatch.setattr(packing, "require_isolation", quietly)
    return seen


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped by length", "in any order"])
def test_the_padding_said_is_the_padding_done(run, tmp_path: Path, monkeypatch, grouped: bool) -> None:
    write_rows(tmp_path, 30)
    seen = _batches_seen(monkeypatch)
    sizes = {"train__batch_size": 4, "train__micro_batch_size": 2, "train__epochs": 1, "train__max_steps": None}
    made = run("run", **sizes, train__group_by_length=grouped)
    lengths = [[len(row.input_ids) for row in batch] for batch in seen]
    computed = sum(max(batch) * len(batch) for batch in lengths)
    said = made.manifest["data"]["batches"]["padding"]
    assert said == pytest.approx(1 - sum(map(sum, lengths)) / computed, abs=1e-4)
    assert said > 0


# ---- weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__micro_batch_size": 2},
        {"data__packing": True, "train__batch_size": 2, "train__micro_batch_size": 2},
        {"data__packing": True, "train__batch_size": 2, "train__micro_batch_size": 1},
    ],
    ids=["padded", "padded 2x4", "packed", "packed 1x2"],
)
def test_a_weighted_loss_is_that_of_a_loop_by_hand(
    run, tmp_path: Path, tiny_folder: Path, changes: dict[str, object]
) -> None:
    """sum(w * nll) / sum(w) over the supervised tokens of a step, whatever its micro batches; the same in validation."""
    plain = encoded(tmp_path, tiny_folder)
    for name in ("train.jsonl", "validation.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for number, line in enumerate(lines):
            again = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "z", "weight": 0.125}]
            line["messages"][1]["weight"] = 0.5 if number % 2 else 2
            line["messages"] += again if number == 3 else []
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = encoded(tmp_path, tiny_folder)
    assert {weight for row in given for weight in row.weights or []} == {0.0, 0.125, 0.5, 2.0}
    expected = by_hand(tiny_folder, [given] * STEPS)
    validated = {"data__validation": "./validation.jsonl", "train__eval_steps": STEPS, "data__max_length": 200}
    made = run("weighted", **validated | changes)
    assert made.manifest["data"]["batches"].get("sequences", 2) == 2  # every row is in every step
    assert logged(made) == pytest.approx(expected, abs=SAME)
    unweighted = by_hand(tiny_folder, [plain] * STEPS)
    assert max(abs(a - b) for a, b in zip(expected, unweighted, strict=True)) > 100 * SAME
    held_out = encoded(tmp_path, tiny_folder, "validation.jsonl")
    base = load.load_model(load.find(str(tiny_folder)), "float32")
    after = adapters.attach(base, load.find(str(tiny_folder)), made)
    (loss,) = logged(made, "validation_loss")
    assert loss == pytest.approx(weighted_loss(after, held_out).item(), abs=SAME)


# ---- validation, the adapter on disk, and resuming


def test_validation_loss_is_the_mean_over_tokens_packed_or_not(run, tmp_path: Path, tiny_folder: Path) -> None:
    frozen = {"train__max_steps": 1, "train__eval_steps": 1, "train__learning_rate": 1e-12}
    validation = {"data__validation": "./validation.jsonl"} | frozen
    losses = [
        logged(run(name, **validation, **changes), "validation_loss")[0]
        for name, changes in {
            "one": {"train__micro_batch_size": 1},
            "four": {"train__micro_batch_size": 4},
            "packed": PACKED,
            "packed-one": PACKED | {"train__micro_batch_size": 1},
        }.items()
    ]
    model = fresh_model(tiny_folder).eval()
    held_out = encoded(tmp_path, tiny_folder, "validation.jsonl")
    each = infer.token_losses(model, held_out, PAD)
    mean = sum(loss * row.supervised for loss, row in zip(each, held_out, strict=True))
    assert losses == pytest.approx([mean / sum(row.supervised for row in held_out)] * 4, abs=1e-5)


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["padded", "packed"])
def test_an_adapter_from_disk_is_the_one_in_memory(run, tiny_folder: Path, monkeypatch, changes) -> None:
    """Read by PEFT alone: its logits are those of the trained model, bit for bit."""
    import peft
    from transformers import AutoModelForCausalLM

    held: list[torch.nn.Module] = []
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda made, *rest: (held.append(made.model), train(made, *rest))[1])
    made = run("run", **changes)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = torch.arange(4, 36)[None]
    with torch.inference_mode():
        before = base.eval()(input_ids=ids).logits
        memory = held[0].eval()(input_ids=ids).logits
        disk = peft.PeftModel.from_pretrained(base, made.path).eval()(input_ids=ids).logits
    assert torch.equal(disk, memory)
    assert not torch.allclose(disk, before, atol=1e-3)


@pytest.mark.parametrize("cut_after", [2, 5])
def test_a_packed_run_resumes_to_the_bit_with_dropout(run, tmp_path: Path, monkeypatch, cut_after: int) -> None:
    """Inside an epoch and over its end: five sequences in batches of two are three steps an epoch."""
    write_rows(tmp_path, 10)
    changes = {
        "data__packing": True,
        "data__max_length": 96,
        "data__validation": "./validation.jsonl",
        "adapter": LORA | {"lora_dropout": 0.3},
        "train__batch_size": 2,
        "train__micro_batch_size": 1,
        "train__eval_steps": 1,
    }
    whole = run("whole", **changes)
    assert whole.manifest["data"]["batches"]["sequences"] == 5

    def interrupt(self, args, state, control, **_):
        if state.global_step == cut_after:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("cut", **changes)
    resumed = run("cut", **changes)
    before, after = weights(whole), weights(resumed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "validation_loss") == logged(whole, "validation_loss")


def test_bfloat16_adapters_learn_like_float32_ones(run) -> None:
    """The guard of the faster default: at a learning rate it is used at, the curve is the same within bfloat16's noise."""
    slow = logged(run("float32"))
    fast = logged(run("bfloat16", model__dtype="bfloat16", train__adapter_dtype="bfloat16"))
    assert fast == pytest.approx(slow, abs=0.03 * slow[0])
    assert fast[-1] < fast[0]


# ---- several processes, as far as one can show it


@pytest.mark.parametrize("world", [1, 2, 4])
def test_length_buckets_are_dealt_whole_to_any_number_of_processes(world: int) -> None:
    """accelerate deals micro batches in turn, so that a step of all processes is one bucket: neighbours in the order of lengths."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    micro, accumulation = 2, 3
    lengths = [(37 * n) % 389 for n in range(24 * world)]  # no two alike
    batch = micro * accumulation * world
    sampler = trainer.LengthBuckets(lengths, batch, seed=3)
    order = list(sampler)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, micro, False), world, rank)) for rank in range(world)]
    for step in range(len(order) // batch):
        dealt = [
            row for shard in shards for part in shard[step * accumulation : (step + 1) * accumulation] for row in part
        ]
        assert sorted(dealt) == sorted(order[step * batch : (step + 1) * batch])
        places = sorted(sorted(lengths).index(lengths[row]) for row in dealt)
        assert places == list(range(places[0], places[0] + batch))
