"""Every method that the installed PEFT registers: trained by our own code, read back, switched off and merged.

Methods are discovered, so that one which a new PEFT brings is tested on the day it is installed. Where its defaults do not fit
the tiny model it fails here: give it options in SMALLEST, or say in `peft_methods.REFUSED` why it does not fit a run.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from llmtune import artifact, config
from llmtune.config import Recorded, peft_methods
from llmtune.config.train import AdapterConfig
from llmtune.data.tokens import TokenRow
from llmtune.errors import ConfigError
from llmtune.export import merge, proof
from llmtune.interruption import Interruption
from llmtune.model import adapters, infer, initialisations, load
from llmtune.model.saved import require_whole
from llmtune.training import loop, rows, setup

STEPS, RATE = 6, 1e-2
SMALLEST: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "c3a": {"block_size": 32},
    "cartridge": {"num_virtual_tokens": 4},
    "cpt": {"cpt_token_ids": [5, 6, 7]},
    "frod": {"progressbar": False},
    "multitask_prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "road": {"group_size": 32},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [97, 98, 99]},
    "vblora": {"vector_length": 32},
    "waveft": {"n_frequency": 100},
}
"""The options without which a method does not fit the tiny model (hidden 64, two layers, no biases)."""
CANNOT_MERGE = {
    "adaption_prompt",
    "beft",
    "cartridge",
    "cpt",
    "lily",
    "multitask_prompt_tuning",
    "p_tuning",
    "poly",
    "prefix_tuning",
    "prompt_tuning",
    "shadow",
}
METHODS = sorted(peft_methods.methods().keys() - peft_methods.REFUSED)


class Bench:
    """A tiny base and eight encoded rows, to train any adapter on by the stage's own parts."""

    def __init__(self, folder: Path, tiny_folder: Path) -> None:
        self.folder, self.base = folder, load.find(str(tiny_folder))
        turns = [[("user", f"say {'x' * i}"), ("assistant", "y" * (8 - i) + "!")] for i in range(8)]
        lines = [{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns]
        (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.tokenizer = load.load_tokenizer(self.base)
        self.split, _ = rows.encode_splits(self.view({"method": "lora"}).data, self.tokenizer, folder, "test")
        self.ids = torch.tensor([list(range(60, 84)), list(range(90, 114))])

    def view(self, adapter: dict[str, Any], model: dict[str, Any] | None = None, **train: Any) -> Recorded:
        raw = {
            "stage": "sft",
            "model": {"name": self.base.name, "dtype": "float32", **(model or {})},
            "data": {"train": "./train.jsonl"},
            "adapter": adapter,
            "train": {"max_steps": STEPS, "learning_rate": RATE, "scheduler": "constant", **train},
            "output_dir": "./run",
        }
        return Recorded(config.build(raw, self.folder / "sft.yaml"))

    def train(self, view: Recorded, folder: Path) -> tuple[Any, list[float]]:
        """The trained model in memory, and its losses."""
        model = setup.build_model(view, self.base, self.split, "cpu", "test")
        folder.mkdir()
        trainer = setup.build_trainer(view, model, self.tokenizer, self.split, None, folder, "cpu", "test")
        loop.train(trainer, folder, Interruption(), folder / "metrics.jsonl")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        # without the autocast that a trainer wraps a model's forward in: what is read back has none
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        return model.eval(), [line["loss"] for line in lines]

    def save(self, model: Any, folder: Path, method: str) -> artifact.Artifact:
        with artifact.writing(folder / "adapter", "adapter") as draft:
            adapters.save(model, draft.path)
            require_whole(draft.path, model)
            draft.facts.update(base=self.base.facts(), config={"adapter": {"method": method}})
        return artifact.read(folder / "adapter")

    def load(self, dtype: str = "float32") -> Any:
        return load.load_model(self.base, dtype, "cpu")

    def logits(self, model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=self.ids).logits[:, -self.ids.shape[1] :]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("methods"), tiny_folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_is_read_back_switches_off_and_merges(bench: Bench, method: str, tmp_path: Path) -> None:
    prove(bench, method, tmp_path)


def prove(bench: Bench, method: str, tmp_path: Path) -> bool:
    """The whole proof for one method. Returns whether it merges."""
    from peft import PeftModel

    base = bench.logits(bench.load())
    model, losses = bench.train(bench.view({"method": method, **SMALLEST.get(method, {})}), tmp_path / "checkpoints")
    bench.logits(model)  # CPT projects its weights when they are read: the second reading changes nothing more
    trained = bench.logits(model)
    assert losses[-1] < losses[0] and not torch.equal(trained, base)
    with model.disable_adapter():
        assert torch.equal(bench.logits(model), base)
    saved = bench.save(model, tmp_path, method)
    again = adapters.attach(bench.load(), bench.base, saved)
    assert torch.equal(bench.logits(again), trained)
    if method not in ("poly", "multitask_prompt_tuning"):  # plain PEFT wants the task of each row there
        with adapters.peft_warnings():
            plain = PeftModel.from_pretrained(bench.load(), saved.path)
        assert torch.equal(bench.logits(plain), trained)
    with again.disable_adapter():
        assert torch.equal(bench.logits(again), base)
    if method == "lily":  # its experts are mixed by the mean over a batch: said when it is built, see below
        with pytest.raises(AssertionError):
            reads_like_a_plain_forward_pass(bench, again)
    else:
        reads_like_a_plain_forward_pass(bench, again)
    if method in CANNOT_MERGE:
        with pytest.raises(ConfigError, match=f"a {method} adapter cannot be merged: "):
            merge.merge_into_base(again, saved)
    else:
        exact = bench.logits(in_float64(again))  # so that what is measured is the algebra
        difference = float((bench.logits(merge.merge_into_base(again, saved)) - exact).abs().max())
        assert difference <= 3e-7 * float(exact.abs().max())
    return method not in CANNOT_MERGE


def in_float64(model: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.double().modules():
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "dtype", None), torch.dtype):
            module.dtype = torch.float64  # AdaMSS keeps its own note of it
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast": {"init_lora_weights": "pissa_niter_4"},
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa, patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "alora": {"alora_invocation_tokens": "<|im_start|>assistant"},
    "velora": {"velora_config": {"num_groups": 2}},
    "bdlora": {
        "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["o_proj"], "nblocks": 2},
        "target_modules": ["q_proj", "o_proj"],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_lora_is_an_adapter_of_the_base_as_it_was(bench: Bench, variant: str, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **VARIANTS[variant]}
    if variant == "alora":
        words = lora["alora_invocation_tokens"]
        lora["alora_invocation_tokens"] = bench.tokenizer(words, add_special_tokens=False)["input_ids"]
    model, losses = bench.train(bench.view(lora), tmp_path / "checkpoints")
    trained = bench.logits(model)
    assert losses[-1] < losses[0]
    assert torch.equal(trained, bench.logits(bench.load())) == (variant == "alora")  # no invocation, no adapter
    saved = bench.save(model, tmp_path, "lora")
    with adapters.peft_warnings():
        plain = PeftModel.from_pretrained(bench.load(), saved.path)
    again = adapters.attach(bench.load(), bench.base, saved)  # compares it, switched off, with the base to the bit
    assert torch.equal(bench.logits(again), bench.logits(plain))
    difference = float((bench.logits(again) - trained).abs().max() / trained.abs().max())
    assert difference <= (2e-5 if variant.startswith(initialisations.TAKES_FROM_THE_BASE) else 0.0)
    reads_like_a_plain_forward_pass(bench, again, lora.get("alora_invocation_tokens", []))
    if variant == "alora":
        with pytest.raises(ConfigError, match="cannot be merged"):
            merge.merge_into_base(again, saved)
        return
    exact = bench.logits(in_float64(again))
    merged = bench.logits(merge.merge_into_base(again, saved))
    assert float((merged - exact).abs().max()) <= 3e-7 * float(exact.abs().max())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_what_is_taken_out_of_a_bfloat16_base_and_the_rest_add_up_to_it(tiny_folder, monkeypatch, start: str) -> None:
    from peft.tuners.lora import Linear

    def build() -> Any:
        model = load.load_model(load.find(str(tiny_folder)), "bfloat16", "cpu")
        lora = AdapterConfig(method="lora", r=4, init_lora_weights=start, target_modules="all-linear")
        return adapters.build_adapter(model, lora, "auto", 1e-3, seed=0, rows=[{"input_ids": [1, 2, 3]}])

    assert initialisations.takes_from_the_base(build())
    whole = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 0.5 * whole(self, name))
    with pytest.raises(ConfigError, match=r"takes out of .*_proj and the rest do not add up to it"):
        build()


@pytest.mark.parametrize("variant", ["pissa", "pissa, fast", "eva", "corda"])
def test_a_resumed_run_rebuilds_what_it_began_from(bench: Bench, variant: str, tmp_path: Path) -> None:
    lora = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **VARIANTS[variant]}
    resumed_equals_uninterrupted(bench, lora, tmp_path)


def reads_like_a_plain_forward_pass(bench: Bench, model: Any, invocation: list[int] | None = None) -> None:
    """Losses behind a shared beginning, and greedy answers with a cache, are those of whole rows one by one."""
    shared = [*range(40, 60), *(invocation or [])]
    made = [
        TokenRow([*shared, 70 + i, 80, 81 + i, 82], [-100] * (len(shared) + 1) + [80, 81 + i, 82]) for i in range(3)
    ]
    expected = []
    for row in made:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[:, -len(row.input_ids) :]
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(row.labels[1:]), ignore_index=-100)
        expected.append(losses.item())
    assert infer.token_losses(model, made, 0) == pytest.approx(expected, abs=1e-4)
    prompts = [row.input_ids for row in made]
    for prompt, answer in zip(prompts, infer.generate(model, bench.tokenizer, prompts, 3, 3), strict=True):
        ids = list(prompt)
        for _ in range(3):
            with torch.inference_mode():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == bench.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_lily_is_said_to_look_ahead(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    adapters.build_adapter(bench.load(), AdapterConfig(method="lily"), "auto", RATE, 0)
    assert "an answer depends on the rows beside it and on tokens after it" in capsys.readouterr().err


def test_a_format_that_would_not_be_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="bfloat16 has no effect on a float32 base"):
        adapters.build_adapter(bench.load(), AdapterConfig(method="lora"), "bfloat16", RATE, 0)


def test_adalora_prunes_ranks_and_adds_its_own_loss(bench: Bench, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adalora = {"method": "adalora", **SMALLEST["adalora"]}
    model, losses = bench.train(bench.view(adalora), tmp_path / "checkpoints")
    saved = load_file(bench.save(model, tmp_path, "adalora").path / "adapter_model.safetensors")
    ranks = [len(tensor) for name, tensor in saved.items() if name.endswith("lora_A")]
    assert len(ranks) == 4 and sum(ranks) == 4 * SMALLEST["adalora"]["target_r"]
    _, without = bench.train(bench.view({**adalora, "orth_reg_weight": 0.0}), tmp_path / "without")
    assert losses[0] == pytest.approx(without[0] + 0.5 * _orthogonality(bench, adalora), abs=1e-5)


def _orthogonality(bench: Bench, adalora: dict[str, Any]) -> float:
    """Mean of |A A' - 1| and |B' B - 1| at the start, from AdaLoRA's paper, by PEFT's own forward pass."""
    made = adapters.build_adapter(bench.load(), AdapterConfig(**adalora), "auto", RATE, 0, steps=STEPS)
    with torch.no_grad():
        out = made(input_ids=bench.ids, labels=bench.ids)
        plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), bench.ids[:, 1:].flatten())
    return float((out.loss - plain) / 0.5)


@pytest.mark.parametrize("method", ["adalora", "p_tuning", "multitask_prompt_tuning", "cpt", "vblora", "shadow"])
def test_a_resumed_run_of_a_method_equals_an_uninterrupted_one(bench: Bench, method: str, tmp_path: Path) -> None:
    """Whose checkpoint holds more than PEFT saves: pruned ranks and their scores, the network that makes a prompt."""
    resumed_equals_uninterrupted(bench, {"method": method, **SMALLEST.get(method, {})}, tmp_path)


def resumed_equals_uninterrupted(bench: Bench, adapter: dict[str, Any], tmp_path: Path) -> None:
    view = bench.view(adapter)
    whole, losses = bench.train(view, tmp_path / "whole")
    folder = tmp_path / "cut"
    folder.mkdir()
    half = setup.build_model(view, bench.base, bench.split, "cpu", "test")
    trainer = setup.build_trainer(view, half, bench.tokenizer, bench.split, None, folder, "cpu", "test")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt), Interruption() as stop:
        loop.train(trainer, folder, stop, folder / "metrics.jsonl")
    resumed = setup.build_model(view, bench.base, bench.split, "cpu", "test")
    trainer = setup.build_trainer(view, resumed, bench.tokenizer, bench.split, None, folder, "cpu", "test")
    loop.train(trainer, folder, Interruption(), folder / "metrics.jsonl")
    assert trainer.state.global_step == STEPS
    assert torch.equal(bench.logits(resumed.eval()), bench.logits(whole))
    lines = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == losses


@pytest.mark.parametrize(
    ("method", "asked", "rate", "dtype"),
    [
        ("ia3", "auto", 1e-3, "float32"),  # its weights begin at one, where bfloat16 does not feel a step of 1e-3
        ("ia3", "auto", 1e-2, "bfloat16"),
        ("delora", "auto", 1e-3, "float32"),
        ("adalora", "auto", 1e-3, "bfloat16"),
        ("prompt_tuning", "auto", 1e-2, "float32"),
    ],
)
def test_an_adapter_is_float32_where_its_own_weights_would_round_updates_away(bench, method, asked, rate, dtype):
    adapter = AdapterConfig(method=method, **SMALLEST.get(method, {}))
    made = adapters.build_adapter(bench.load("bfloat16"), adapter, asked, rate, 0, steps=STEPS)
    assert {str(weight.dtype) for weight in made.parameters() if weight.requires_grad} == {f"torch.{dtype}"}


@pytest.mark.parametrize(
    ("method", "asked", "rate", "problem"),
    [
        (
            "ln_tuning",
            "auto",
            1e-4,
            r"PEFT keeps weights of ln_tuning in the base's bfloat16.*set model\.dtype to float32",
        ),
        (
            "prompt_tuning",
            "bfloat16",
            1e-2,
            "bfloat16 has no effect: PEFT keeps the weights of prompt_tuning in float32",
        ),
    ],
)
def test_a_dtype_that_a_method_does_not_take_is_an_error(bench, method, asked, rate, problem):
    adapter = AdapterConfig(method=method, **SMALLEST.get(method, {}))
    with pytest.raises(ConfigError, match=problem):
        adapters.build_adapter(bench.load("bfloat16"), adapter, asked, rate, 0)


@pytest.mark.parametrize(
    "method",
    [
        "adalora",
        "adaption_prompt",
        "boft",
        "cpt",
        "delora",
        "frod",
        "glora",
        "ia3",
        "lora",
        "oft",
        "p_tuning",
        "shadow",
    ],
)
def test_a_bfloat16_base_trains_and_is_read_back_equal(bench: Bench, method: str, tmp_path: Path) -> None:
    view = bench.view(
        {"method": method, **SMALLEST.get(method, {})}, {"dtype": "bfloat16"}, max_steps=5 if method == "adalora" else 2
    )
    model, _ = bench.train(view, tmp_path / "checkpoints")
    again = adapters.attach(bench.load("bfloat16"), bench.base, bench.save(model, tmp_path, method))
    assert torch.equal(bench.logits(again), bench.logits(model))


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        ({"method": "lorra"}, "PEFT has no method 'lorra'; did you mean 'lora'"),
        ({"method": "zzz"}, "PEFT has no method 'zzz'.*it has adalora, adamss, adaption_prompt"),
        ({"method": "xlora"}, "xlora does not fit: it trains a router over finished LoRA adapters"),
        (
            {"method": "ia3", "lora_alpha": 8},
            "lora_alpha: not a field of PEFT's IA3Config; it is a field of lora, adalora",
        ),
        ({"method": "lora", "rr": 8}, "rr: not a field of PEFT's LoraConfig; did you mean 'r'"),
        ({"method": "lora", "r": 0}, r"adapter\.r: 0 is no rank, and would train nothing; use 1 or more, such as 8"),
        (
            {"method": "adalora", "r": 8},
            "r: has no effect with adalora: AdaLoRA starts from init_r and ends at target_r",
        ),
        ({"method": "adalora", "target_r": 0}, r"adapter\.target_r: 0 is no rank"),
        ({"method": "adalora", "target_r": 12}, r"adapter\.target_r: AdaLoRA prunes from init_r \(12\) down to it"),
        ({"method": "prompt_tuning"}, "num_virtual_tokens: prompt_tuning needs it, for example num_virtual_tokens: 20"),
        ({"method": "cpt"}, "cpt_token_ids: cpt needs it, for example"),
        ({"method": "trainable_tokens", "token_indices": []}, "token_indices: trainable_tokens needs it"),
        ({"method": "poly", "n_tasks": 3}, "n_tasks: has no effect with poly: rows carry no task"),
        ({"method": "lora", "lora_alpha": 0}, r"adapter\.lora_alpha: 0 multiplies the adapter by nothing"),
        ({"method": "lora", "target_modules": "(["}, r"adapter\.target_modules: '\(\[' is not a regular expression"),
        ({"method": "lora", "rank_pattern": {"*": 2}}, r"adapter\.rank_pattern: '\*' is not a regular expression"),
        ({"method": "lora", "bias": "all"}, "'all' trains the base's own biases"),
    ],
)
def test_what_does_not_fit_a_method_is_refused_without_torch(adapter, problem):
    with pytest.raises(ValidationError, match=problem):
        AdapterConfig(**adapter)


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"target_modules": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*(q|v)_proj"}, {"1.self_attn.q_proj", "1.self_attn.v_proj"}),
        ({"target_modules": "all-linear", "layers_to_transform": None}, None),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"1.self_attn.q_proj"}),
        ({"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"0.mlp.up_proj"}),
        (
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*0.*"},
            {"1.self_attn.q_proj", "1.self_attn.k_proj"},
        ),
    ],
)
def test_target_modules_are_found_by_name_regex_and_layer(bench, fields, trained):
    fields = {key: value for key, value in fields.items() if value is not None}
    made = adapters.build_adapter(bench.load(), AdapterConfig(method="lora", **fields), "auto", RATE, 0)
    names = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert {name.split("layers.")[1].split(".lora_")[0] for name in names} == (trained or {
        f"{layer}.{part}" for layer in (0, 1) for part in (
            *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
        )
    })  # fmt: skip


def test_patterns_of_rank_and_alpha_are_those_of_their_modules(bench):
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 16}}
    made = adapters.build_adapter(bench.load(), AdapterConfig(method="lora", **lora, **patterns), "auto", RATE, 0)
    layers = made.get_base_model().model.layers
    assert [layer.self_attn.q_proj.r["default"] for layer in layers] == [4, 2]
    assert [layer.self_attn.v_proj.scaling["default"] for layer in layers] == [4.0, 4.0]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"target_modules": ["q_proj", "nope"]}, "target_modules: 'nope' matches no module. Linear layers of this model: down"),
        ({"target_modules": "nope.*"}, "Linear layers of this model: down_proj"),
        ({"exclude_modules": ["nope"]}, "exclude_modules: 'nope' matches no module"),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module.*embed_tokens, lm_head"),
        ({"rank_pattern": {"gate_proj": 2}}, "rank_pattern: 'gate_proj' matches no module that the adapter is on: q_proj, v_proj"),
        ({"alpha_pattern": {"nope": 2}}, "alpha_pattern: 'nope' matches no module that the adapter is on"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [2]}, "layers_to_transform: 2 is no layer; the model has 0 to 1"),
        ({"trainable_token_indices": [258]}, "trainable_token_indices: 258 is no token; the model has 0 to 257"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the base ties its head to its embeddings.*lm_head alone"),
        ({"init_lora_weights": "loftq"}, "loftq makes up for what NF4 loses of the base; set model.quantize to nf4"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga needs gradients of the whole base"),
        ({"alora_invocation_tokens": [1, 2, 3]}, "8 of 8 training rows do not hold these tokens"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_named_with_what_could_have(bench, fields, problem):
    with pytest.raises(ConfigError, match=problem):
        adapters.build_adapter(
            bench.load(), AdapterConfig(method="lora", **fields), "auto", RATE, 0, rows=bench.split.rows
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {"modules_to_save": ["embed_tokens"]}),
        ("lora", {"modules_to_save": ["lm_head"]}),
        ("lora", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("lora", {"trainable_token_indices": [97, 98]}),
        ("ia3", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_embeddings_and_head_are_trained_and_merged_as_they_are_tied(bench, tied, method, fields, tmp_path):
    """What is stored from the merge, read back, is the adapter; one weight stays one, and its loss is taken through it."""
    folder = tiny.save(tmp_path / "base", tied=tied)
    other = Bench(tmp_path, folder)
    model, losses = other.train(other.view({"method": method, **fields}), tmp_path / "checkpoints")
    trained = other.logits(model)
    assert losses[-1] < losses[0]
    saved = other.save(model, tmp_path, method)
    again = adapters.attach(other.load(), other.base, saved)
    assert torch.equal(other.logits(again), trained)
    with adapters.peft_warnings():
        merged = merge.merge_into_base(again, saved)
        expected = merge._shared_once(merged)
        merged.save_pretrained(tmp_path / "merged")
    assert proof.differing_tensors(tmp_path / "merged", expected) == []
    stored = load.load_model(load.find(str(tmp_path / "merged")), "float32", "cpu")
    assert (other.logits(stored) - trained).abs().max() <= 1e-5 * trained.abs().max()
    one = stored.get_output_embeddings().weight is stored.get_input_embeddings().weight
    assert one == (tied and method == "lora")


def test_a_method_in_the_cache_is_refused_under_activation_checkpointing(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="the tokens of prefix_tuning lie in the cache, which it does without"):
        bench.view({"method": "prefix_tuning", "num_virtual_tokens": 4}, activation_checkpointing=True)
