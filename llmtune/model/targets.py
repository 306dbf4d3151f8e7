"""Which modules an adapter is put on: every name and pattern of the run file has to match, which PEFT leaves to chance."""

from __future__ import annotations

import re
from typing import Any

import torch

from llmtune.errors import ConfigError
from llmtune.progress import say

LISTS = ("target_modules", "exclude_modules", "modules_to_save")
PATTERNS = ("rank_pattern", "alpha_pattern", "lambda_pattern", "block_size_pattern", "n_frequency_pattern")
TOKENS = ("trainable_token_indices", "token_indices")


def check(model: Any, config: Any) -> None:
    """Raises ConfigError for a name that no module has, a layer or a token the model has not; keeps tied weights tied."""
    modules = dict(model.named_modules())
    for field in LISTS:
        given = getattr(config, field, None)
        for name in given if isinstance(given, (list, set, tuple)) else []:
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise ConfigError(f"adapter.{field}", f"{name!r} matches no module. {candidates(model, field)}")
    layers = getattr(config, "layers_to_transform", None)
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if number and not 0 <= layer < number:
            raise ConfigError("adapter.layers_to_transform", f"{layer} is no layer; the model has 0 to {number - 1}")
    for field in TOKENS:
        _check_tokens(model, field, getattr(config, field, None))
    _keep_tied(model, config)


def check_patterns(made: Any) -> None:
    """Raises ConfigError for a pattern that is for no module of the adapter, and for an adapter on one of two tied modules."""
    config = made.active_peft_config
    targets = list(getattr(made.base_model, "targeted_module_names", []))
    for field in PATTERNS:
        for key in getattr(config, field, None) or {}:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in targets):
                leaves = sorted({name.rsplit(".", 1)[-1] for name in targets})
                raise ConfigError(
                    f"adapter.{field}", f"{key!r} matches no module that the adapter is on: {', '.join(leaves)}"
                )
    ends = [name for name in targets if name.rsplit(".", 1)[-1] in _ends(made.get_base_model())]
    if ends and _tied(made.get_base_model()) and config.peft_type != "TRAINABLE_TOKENS":
        name = ends[0].rsplit(".", 1)[-1]
        raise ConfigError(
            "adapter.target_modules",
            f"the base ties its head to its embeddings, so that an adapter on {name} alone cannot be merged rightly; train "
            "them whole (modules_to_save) or a few of their tokens (trainable_token_indices of lora)",
        )


def candidates(model: Any, field: str = "target_modules") -> str:
    """What could have been written."""
    if field == "modules_to_save":
        return f"Modules that are often trained whole: {', '.join(sorted(_ends(model)))}"
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    linear -= _ends(model) if _tied(model) else set()  # they could not be merged; see check_patterns
    return f"Linear layers of this model: {', '.join(sorted(linear))}, or 'all-linear'"


def _check_tokens(model: Any, field: str, tokens: Any) -> None:
    size = len(model.get_input_embeddings().weight)
    for ids in tokens.values() if isinstance(tokens, dict) else [tokens or []]:
        for token in ids:
            if not 0 <= token < size:
                raise ConfigError(f"adapter.{field}", f"{token} is no token; the model has 0 to {size - 1}")


def _keep_tied(model: Any, config: Any) -> None:
    """Embeddings and head that are one weight in the base are one in the adapter, unless the run file says otherwise."""
    whole = {name.rsplit(".", 1)[-1] for name in getattr(config, "modules_to_save", None) or []}
    if not (whole & _ends(model) and _tied(model)):
        return
    names = " and ".join(sorted(_ends(model)))
    if hasattr(config, "ensure_weight_tying"):
        config.ensure_weight_tying = True
        say(f"  {names} are one weight in this base, and are trained and stored as one")
    else:
        say(f"  {names} are one weight in this base, which PEFT cannot keep with this method: they part here")


def _ends(model: Any) -> set[str]:
    """The names of the embeddings and of the head, without what they lie in."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is end for end in ends)}


def _tied(model: Any) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)
