"""A model small enough for a unit test, made here and never fetched: a random 2-layer Llama and a byte-level tokenizer.

One token a byte, so a test can write down the tokens it expects by hand. As in SmolLM2, pad is eos is end-of-turn.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """256 byte tokens and the two marks of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=END)
    made.chat_template = chat_template
    return made


def model(seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    """Two layers, hidden 64, float32, in eval mode, the same for the same seed.

    Embeddings are tied as in SmolLM2; untrained, such a model answers with its last token over and over, an untied one does not.
    """
    vocabulary = tokenizer()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,  # wide enough that greedy answers do not hang on the last digit
        tie_word_embeddings=tied,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


WINDOW = 8
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {},
    "mamba": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.1},
    "bloom": {"n_head": 4},
}
"""What the configs of other model types need beside the sizes they share; those with a window slide it over WINDOW tokens."""


def family(name: str, attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A random 2-layer model of another model type, hidden 64, float32, in eval mode."""
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    given = {**sizes, **heads, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(name, **given | FAMILIES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def save(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    licence: str | None = "apache-2.0",
    chat_template: str | None = CHATML,
    tied: bool = True,
) -> Path:
    """`folder` as a plain transformers folder: safetensors, tokenizer, chat template, generation config, model card."""
    words, weights = tokenizer(chat_template), model(seed, tied=tied).to(dtype)
    weights.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    weights.save_pretrained(folder)
    words.save_pretrained(folder)
    front = f"license: {licence}\n" if licence else ""
    (folder / "README.md").write_text(
        f"---\n{front}library_name: transformers\n---\nRandom weights, for tests.\n", encoding="utf-8"
    )
    return folder
