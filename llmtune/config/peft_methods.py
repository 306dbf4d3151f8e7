"""Which methods the installed PEFT has and which fields each takes, read from its source without importing it.

Importing PEFT imports torch (seconds); its registrations and dataclasses parse in a tenth of one, so a typo costs nothing.
What PEFT would take without a word, and then do nothing or something else with, is refused here by name.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from llmtune.errors import LlmtuneError, did_you_mean

OURS = {
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
}
"""Fields that llmtune sets itself: what they say follows from the run."""

# fmt: off
ON_4_BITS = frozenset({
    "adalora", "adaption_prompt", "beft", "boft", "c3a", "cartridge", "fourierft", "gralora", "hira", "ia3", "lily",
    "ln_tuning", "lora", "miss", "oft", "p_tuning", "prefix_tuning", "prompt_tuning", "pvera", "randlora", "road",
    "shadow", "shira", "trainable_tokens", "vblora", "vera", "waveft",
})
# fmt: on
"""Methods of PEFT 0.21 that train on an NF4 base exactly as on the same base dequantised (tests/test_quantised.py holds it)."""
ON_8_BITS = ON_4_BITS | {"loha", "lokr"}
"""The same for an int8 base. Several of the others take the stored integers for weights there and say nothing."""


IN_THE_CACHE = {"cartridge", "prefix_tuning"}
"""Methods whose tokens lie in the cache of keys and values, which activation checkpointing does without."""

REFUSED = {
    "xlora": "it trains a router over finished LoRA adapters, and a run here has none; train one lora adapter",
}
"""Methods that do not fit a run on a causal language model, each with the reason."""

NEEDED = {
    "adaption_prompt": {"adapter_len": "10", "adapter_layers": "8"},
    "cpt": {"cpt_token_ids": "[12, 34, 56], the ids of the tokens the prompt begins as"},
    "trainable_tokens": {"token_indices": "[3, 4], the ids of the tokens to train"},
}
"""Fields whose default means nothing, each with an example. Virtual tokens are needed by every method that has them."""

WITHOUT_EFFECT = {
    "adalora": {
        "r": "AdaLoRA starts from init_r and ends at target_r; set those",
        "total_step": "follows from the run's steps; remove it",
        "rank_pattern": "AdaLoRA finds it; remove it",
    },
    "adamss": {"use_asa": "its scores are not part of a checkpoint, so a resumed run would be another; remove it"},
    "cpt": {
        "num_virtual_tokens": "is the number of cpt_token_ids; remove it",
        "opt_weighted_loss_type": "the loss of a run is that of its answers; remove it",
        "opt_loss_decay_factor": "the loss of a run is that of its answers; remove it",
    },
    "lora": {
        "arrow_config": "it routes between finished adapters, and a run here trains one; remove it",
        "layer_replication": "it gives the base more layers, so that switching the adapter off no longer gives the base; remove it",
        "loftq_config": "LoftQ is of the run's own NF4 base; remove it",
        "lora_ga_config": "a run does not take gradients of the whole base; remove it",
        "megatron_config": "the base is not a Megatron model; remove it",
        "megatron_core": "the base is not a Megatron model; remove it",
        "monteclora_config": "its divergence is not part of a run's loss; remove it",
        "runtime_config": "nothing of it is stored with the adapter; remove it",
        "use_qalora": "PEFT has it for GPTQ layers only; remove it",
        "qalora_group_size": "PEFT has it for GPTQ layers only; remove it",
    },
    "multitask_prompt_tuning": {"num_tasks": "rows carry no task, so there is one; remove it"},
    "poly": {"n_tasks": "rows carry no task, so there is one; remove it"},
    "prompt_tuning": {"tokenizer_kwargs": "only with prompt_tuning_init: TEXT"},
}
"""Fields that do nothing in a run here, or something that it must not do: method -> field -> what to do."""

RANKS = ("r", "init_r", "target_r", "rank", "module_rank", "shadow_r")
REGEXES = ("target_modules", "exclude_modules")
"""Fields that are a regular expression where they are not a list."""

NO_MERGE = {
    "adaption_prompt": "it adds a gated attention to prompts of its own, which no weight of the base computes",
    "lily": "it mixes its experts anew for every batch, so there is no one change of the weights",
    "poly": "it mixes its skills anew for every row's task, so there is no one change of the weights",
}
"""Methods that PEFT cannot merge without saying why; what it says itself is passed on."""


def known_method(name: str) -> str:
    """`name` when a run can train it. Raises ValueError naming the nearest method, or why this one does not fit."""
    if name not in methods():
        hint = did_you_mean(name, methods()) or f"; it has {', '.join(sorted(methods().keys() - REFUSED))}"
        raise ValueError(f"PEFT has no method '{name}'{hint}")
    if name in REFUSED:
        raise ValueError(f"{name} does not fit: {REFUSED[name]}")
    return name


def check_fields(method: str, fields: dict[str, object]) -> None:
    """Raises ValueError for a field that is not one of PEFT's config of `method`, that has no effect in a run, that is
    missing, or whose rank is none."""
    for name in fields:
        _check_field(method, name)
    for name, value in fields.items():
        if name in RANKS and isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"adapter.{name}: {value} is no rank, and would train nothing; use 1 or more, such as 8")
        if name in ("lora_alpha", "alpha") and value == 0:
            raise ValueError(
                f"adapter.{name}: 0 multiplies the adapter by nothing, so it would train nothing; use 16, say"
            )
        _check_regexes(name, value)
        if name == "bias" and value != "none":
            raise ValueError(
                f"adapter.bias: {value!r} trains the base's own biases, so that switching the adapter off no longer "
                "gives the base; remove it"
            )
    first, last = fields.get("init_r", 12), fields.get("target_r", 8)  # PEFT's defaults
    if method == "adalora" and isinstance(first, int) and isinstance(last, int) and last >= first:
        raise ValueError(
            f"adapter.target_r: AdaLoRA prunes from init_r ({first}) down to it; set it below that, not to {last}"
        )
    for name, example in needed(method).items():
        if not fields.get(name):
            raise ValueError(f"adapter.{name}: {method} needs it, for example {name}: {example}")


def _check_regexes(name: str, value: object) -> None:
    keys = list(value) if name.endswith("_pattern") and isinstance(value, dict) else []
    for pattern in [value] if name in REGEXES and isinstance(value, str) else keys:
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise ValueError(f"adapter.{name}: {pattern!r} is not a regular expression: {error}") from None


def needed(method: str) -> dict[str, str]:
    """Fields that a run file has to set, each with an example."""
    virtual = method != "cpt" and "num_virtual_tokens" in fields_of(method)
    return {**NEEDED.get(method, {}), **({"num_virtual_tokens": "20"} if virtual else {})}


def _check_field(method: str, name: str) -> None:
    if name in OURS:
        raise ValueError(f"adapter.{name}: set by llmtune itself; remove it")
    allowed = fields_of(method) - OURS
    if name not in allowed:
        owners = sorted((other for other in methods() if name in fields_of(other)), key=lambda other: other != "lora")
        whose = f"; it is a field of {', '.join(owners[:3])}{', ...' if owners[3:] else ''}" if owners else ""
        near = did_you_mean(name, allowed) if not owners else ""
        raise ValueError(f"adapter.{name}: not a field of PEFT's {methods()[method]}{whose}{near}")
    if why := WITHOUT_EFFECT.get(method, {}).get(name):
        raise ValueError(f"adapter.{name}: has no effect with {method}: {why}")


def check_quantised(method: str, quantised: str) -> None:
    """Raises ValueError for a method that does not train rightly on a base that is `quantised` ("nf4" or "int8")."""
    able = ON_8_BITS if quantised == "int8" else ON_4_BITS
    if method not in able:
        raise ValueError(
            f"adapter.method: PEFT's {method} does not train rightly on {quantised} weights, which are not numbers it can read; "
            f"methods that do: {', '.join(sorted(able))}. Or take the base in full precision"
        )


@functools.cache
def methods() -> dict[str, str]:
    """Method name -> name of its PEFT config class."""
    found: dict[str, str] = {}
    for file in sorted(_peft().glob("tuners/*/__init__.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_peft_method":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                name, config = given.get("name"), given.get("config_cls")
                if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                    found[str(name.value)] = config.id
    return found


def fields_of(method: str) -> set[str]:
    """Names of every dataclass field of the method's config, inherited ones included."""
    return set(_fields(methods()[method]))


def has_virtual_tokens(method: str) -> bool:
    """Whether the method puts tokens of its own before the text, as prompt tuning does."""
    return "PromptLearningConfig" in _ancestors(methods()[method])


def _ancestors(name: str) -> Iterator[str]:
    yield name
    for base in _classes()[name].bases if name in _classes() else []:
        yield from _ancestors(getattr(base, "id", ""))


def _fields(name: str) -> Iterator[str]:
    definition = _classes().get(name)
    if definition is None:
        return
    for base in definition.bases:
        yield from _fields(getattr(base, "id", ""))
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


@functools.cache
def _classes() -> dict[str, ast.ClassDef]:
    files = [_peft() / "config.py", *sorted(_peft().glob("tuners/*.py")), *sorted(_peft().glob("tuners/*/config.py"))]
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _peft() -> Path:
    spec = importlib.util.find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        raise LlmtuneError("PEFT is not installed; 'pip install peft' brings it")
    return Path(spec.submodule_search_locations[0])
