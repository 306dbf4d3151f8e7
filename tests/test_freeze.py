"""What is trained of a base, found by its structure, in families that name their parts differently."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from llmtune.config import validate
from llmtune.config.train import TrainableConfig
from llmtune.errors import ConfigError
from llmtune.model import freeze

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {  # config -> (settings, blocks, head and embeddings are one)
    "LlamaConfig": (SIZE, "model.layers", False),
    "Qwen2Config": ({**SIZE, "tie_word_embeddings": True}, "model.layers", True),
    "GemmaConfig": ({**SIZE, "head_dim": 8}, "model.layers", True),
    "Phi3Config": (SIZE, "model.layers", False),
    "GPT2Config": (GPT2, "transformer.h", True),
    "GPTNeoXConfig": (SIZE, "gpt_neox.layers", False),
    "MixtralConfig": ({**SIZE, "num_local_experts": 8}, "model.layers", False),  # more experts than blocks
}
each = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, family)(**FAMILIES[family][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def choose(**chosen: object) -> TrainableConfig:
    return TrainableConfig(**chosen)


@each
def test_parts_are_found_by_structure(family) -> None:
    model, (_, where, tied) = build(family), FAMILIES[family]
    assert freeze.blocks(model) == (where, 3)
    names = [name for name, _ in model.named_parameters()]
    head = {name for name, parameter in model.named_parameters() if parameter is model.get_output_embeddings().weight}
    norms = {name for name in names if re.search(r"norm|\.ln_", name)}
    embeddings = {name for name in names if re.search(r"embed_tokens|embed_in|wte|wpe", name)}
    top = {name for name in names if name.startswith((f"{where}.1.", f"{where}.2."))}
    assert freeze.select(model, choose(top_blocks=2)) == top
    assert freeze.select(model, choose(head=True)) == head
    assert freeze.select(model, choose(norms=True)) == norms
    assert freeze.select(model, choose(embeddings=True)) == embeddings
    assert len(embeddings & head) == tied
    assert freeze.select(model, choose(top_blocks=2, head=True, norms=True)) == top | head | norms
    assert freeze.select(model, choose(pattern=r"\.0\..*(attn|attention)")) == {
        name for name in names if f"{where}.0." in name and re.search("attn|attention", name)
    }


@each
@pytest.mark.parametrize("part", ["top_blocks", "head", "norms", "embeddings"])
def test_only_what_is_named_learns_in_float32_beside_a_bfloat16_rest(family, part) -> None:
    """One step under autocast, whatever is frozen: the gradients are those of an all-float32 model but for rounding."""
    model, exact = build(family), build(family)
    chosen = choose(**{part: 1 if part == "top_blocks" else True})
    freeze.freeze(model, chosen, "bfloat16")
    freeze.freeze(exact, chosen, "float32")
    ids = torch.arange(2, 34).reshape(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    exact_loss = exact(input_ids=ids, labels=ids).loss
    exact_loss.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), abs=0.02)
    for name, parameter in model.named_parameters():
        if name in freeze.trained(model):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            given, wanted = parameter.grad.flatten(), exact.get_parameter(name).grad.flatten()
            assert torch.dot(given, wanted) >= 0.98 * given.norm() * wanted.norm()
        else:
            assert parameter.grad is None
            assert parameter.dtype == (torch.bfloat16 if parameter.ndim > 1 else torch.float32)


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"top_blocks": 4}, "top_blocks: 4 is more than the 3 blocks of model.layers"),
        ({"pattern": "no_such"}, r"'no_such' is found in no parameter's name; there are: .*model.layers.N.self_attn"),
        ({"top_blocks": 1, "pattern": r"layers\.2\.mlp"}, "adds nothing to what the other keys of the section name"),
        ({"head": True, "embeddings": False}, "head: true with embeddings: false contradict each other"),
        ({"head": False, "embeddings": True}, "embeddings: true with head: false contradict each other"),
    ],
)
def test_what_the_model_has_not_is_refused(chosen, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        freeze.select(build("Qwen2Config"), choose(**chosen))


def test_a_tied_head_is_told() -> None:
    told = freeze.tied(build("Qwen2Config"), choose(head=True))
    assert told.startswith("trainable.head: in this model head and embeddings are one matrix, so the embeddings")
    assert freeze.tied(build("LlamaConfig"), choose(head=True)) is None
    assert freeze.tied(build("Qwen2Config"), choose(head=True, embeddings=True)) is None


def test_a_pattern_finds_the_tied_head_by_its_name() -> None:
    assert freeze.select(build("Qwen2Config"), choose(pattern=r"^lm_head")) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({}, "trainable: nothing is named in it"),
        ({"head": False}, "trainable: nothing is named in it"),
        ({"pattern": "("}, "pattern: is no regular expression: missing \\)"),
        ({"top_blocks": 0}, "top_blocks: input should be greater than 0"),
        ({"top_block": 2}, "did you mean 'top_blocks'"),
    ],
)
def test_a_section_that_means_nothing_is_refused(chosen, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate(TrainableConfig, chosen, "sft.yaml")


def test_a_model_without_blocks_is_told() -> None:
    with pytest.raises(ConfigError, match="holds no list of blocks"):
        freeze.blocks(torch.nn.Linear(2, 2))
