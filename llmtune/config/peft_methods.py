"""Which methods the installed PEFT has and which fields each takes, read from its source without importing it.

Importing PEFT imports torch (seconds); its registrations and dataclasses parse in a tenth of one, so a typo costs nothing.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
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


def known_method(name: str) -> str:
    """`name` when PEFT has that method. Raises ValueError naming the nearest one."""
    if name not in methods():
        raise ValueError(f"PEFT has no method '{name}'{did_you_mean(name, methods())}")
    return name


def check_fields(method: str, fields: dict[str, object]) -> None:
    """Raises ValueError for a field that PEFT's config of `method` does not have, or that llmtune sets itself."""
    allowed = fields_of(method)
    for name in fields:
        if name in OURS:
            raise ValueError(f"adapter.{name}: set by llmtune itself; remove it")
        if name not in allowed:
            raise ValueError(
                f"adapter.{name}: not a field of PEFT's {methods()[method]}{did_you_mean(name, allowed - OURS)}"
            )


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
