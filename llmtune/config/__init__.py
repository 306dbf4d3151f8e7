"""Run files: the only reader of run YAML, and the only finder of shipped files.

A run file names its `stage`, and that stage's class says what may stand in it. Nothing is ignored: an unknown key, a key
written twice and a setting that has no effect are errors, reported all at once with their place.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo

from llmtune.errors import ConfigError, did_you_mean

STAGES = {"sft": "llmtune.config.sft:SftConfig", "eval": "llmtune.config.eval:EvalConfig"}
SHIPPED = ("configs", "data_templates", "evals")
SHORT = ("model",)
"""Sections that may be written as their name alone: `model: NAME` is `model: {name: NAME}`."""
DATA_FILES = (".json", ".jsonl", ".csv", ".parquet")


class Section(BaseModel):
    """A part of a run file. Strict: a boolean is not a number and a number is not a string."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


Config = TypeVar("Config", bound=Section)


class _FromShell(str):
    """A string given on the command line: a path in it is relative to the working directory, not to the run file."""


def _resolve(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str) or value.startswith("package:"):
        return value
    base = Path.cwd() if isinstance(value, _FromShell) else (info.context or {}).get("base", Path.cwd())
    return str(Path(base, Path(value).expanduser()).resolve())


def _resolve_if_local(value: object, info: ValidationInfo) -> object:
    local = isinstance(value, str) and (
        value.startswith((".", "/", "~")) or value.lower().endswith((*DATA_FILES, ".gguf"))
    )
    return _resolve(value, info) if local else value


LocalPath = Annotated[str, BeforeValidator(_resolve)]
"""A path in a run file, relative to that file; absolute once loaded."""
PathOrHub = Annotated[str, BeforeValidator(_resolve_if_local)]
"""A path (it starts with `.`, `/` or `~`, or ends like a data file), else the id of something on the hub."""


def load(path: Path | str, overrides: list[str] | None = None, stage: str | None = None) -> Any:
    """Read a run file and apply `key.sub=value` overrides.

    Returns the config of its stage. `stage` is the one the caller can run: another one is refused.
    Raises ConfigError with every problem of the file, each with its key and, where there is one, the nearest known key.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(path, f"no such file; 'llmtune init {stage or 'sft'}' writes one to start from")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(path, "a run file is a mapping of keys to values, such as 'stage: sft'")
    for override in overrides or []:
        _apply(raw, override)
    return build(raw, path, stage)


def build(raw: dict[str, Any], place: Path | str, stage: str | None = None) -> Any:
    """Validate an already parsed run file; relative paths in it belong to the folder of `place`."""
    named = raw.get("stage")
    if named not in STAGES:
        hint = did_you_mean(str(named), STAGES) if named else f"; known: {', '.join(STAGES)}"
        raise ConfigError(place, f"stage: {'unknown stage ' + repr(named) if named else 'missing'}{hint}")
    if stage and named != stage:
        raise ConfigError(place, f"stage: this file is for 'llmtune {named}', not for 'llmtune {stage}'")
    return validate(section_class(STAGES[named]), raw, place)


def section_class(path: str) -> type[Section]:
    """The class at "module:Name"."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def validate(section: type[Config], raw: object, place: Path | str) -> Config:
    """`raw` as a `section`, or one ConfigError that lists every problem: wrong fields first, rules between fields after."""
    try:
        return section.model_validate(raw, context={"base": Path(place).resolve().parent})
    except ValidationError as error:
        problems = [_explain(problem, section) for problem in error.errors(include_url=False)]
        once = {problem.split(": ")[0]: problem for problem in reversed(problems)}  # each branch of a union complains
        raise ConfigError(place, list(reversed(once.values()))) from None


def read_yaml(path: Path) -> Any:
    """Parse YAML; a key written twice is an error, and `1e-3` is a number."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise ConfigError(path, "no such file") from None
    except IsADirectoryError:
        raise ConfigError(path, "is a folder, and a YAML file is needed") from None
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(path, f"is not valid YAML: {' '.join(str(error).split())}") from None


def shipped(kind: Literal["configs", "data_templates", "evals"], name: str = "") -> Path:
    """A file or folder that comes with llmtune: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent
    beside = checkout / "pyproject.toml"
    roots = [package / kind]
    if beside.is_file() and 'name = "llmtune"' in beside.read_text(encoding="utf-8"):
        roots.append(checkout / kind)
    for root in roots:
        if root.is_dir():
            found = root / name
            if found.exists():
                return found
            known = [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
            raise ConfigError(f"{kind}/{name}", f"is not shipped with llmtune{did_you_mean(name, known)}")
    raise ConfigError(kind, "is missing from this installation; install llmtune again")


class Recorded:
    """A config seen through a view that remembers which settings were read, so that one without effect can be named."""

    def __init__(self, section: Section, prefix: str = "", seen: set[str] | None = None) -> None:
        self._section, self._prefix = section, prefix
        self._seen: set[str] = set() if seen is None else seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._section, name)
        self._seen.add(self._prefix + name)
        return Recorded(value, f"{self._prefix}{name}.", self._seen) if isinstance(value, Section) else value

    def whole(self) -> Any:
        """The section itself, for a reader that takes all of it: every key of it counts as read."""
        self._seen.update(self._prefix + key for key in _keys_set(self._section))
        return self._section

    def unread(self) -> list[str]:
        """The keys that the user set and nothing read, as dotted paths."""
        return [key for key in _keys_set(self._section) if key not in self._seen]

    def require_all_read(self, place: object) -> None:
        """Raise ConfigError for settings without effect in this run."""
        if unread := self.unread():
            raise ConfigError(place, [f"{key}: has no effect in this run; remove it" for key in unread])


def _keys_set(section: Section, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in sorted(section.model_fields_set & type(section).model_fields.keys()):
        value = getattr(section, name)
        keys += _keys_set(value, f"{prefix}{name}.") if isinstance(value, Section) else [prefix + name]
    return keys


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError("command line", f"{override!r} is not an override; write key.sub=value")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError("command line", f"{override!r}: {' '.join(str(error).split())}") from None
    *parents, last = key.split(".")
    target = raw
    for parent in parents:
        if isinstance(target.get(parent), str) and parent in SHORT:
            target[parent] = {"name": target[parent]}
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError("command line", f"{key}: '{parent}' is a value, not a section")
    target[last] = _from_shell(value)


def _from_shell(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_shell(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _from_shell(entry) for key, entry in value.items()}
    return _FromShell(value) if isinstance(value, str) else value


def _explain(problem: Any, section: type[Section]) -> str:
    # a union adds the names of its branches to the place; they are pydantic's words, not the user's
    parts = [str(part) for part in problem["loc"] if not re.search(r"[\[(]|^(str|int|float|bool)$", str(part))]
    place = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        *parents, last = parts
        return f"{place}: unknown key{did_you_mean(last, _fields_at(section, parents))}"
    if problem["type"] == "missing":
        return f"{place}: required, and not set"
    if problem["type"] == "model_type":
        return f"{place}: is a section with keys of its own, not {problem['input']!r}"
    if problem["type"] == "too_short":
        return f"{place}: needs at least {problem['ctx']['min_length']}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if not place or message.startswith(place) else f"{place}: {message}"
    return f"{place}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def _fields_at(section: type[Section], parents: list[Any]) -> list[str]:
    for parent in parents:
        field: FieldInfo | None = section.model_fields.get(str(parent))
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if not nested:
            return []
        section = nested[0]
    return list(section.model_fields)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1 and key != "<<"}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {min(twice)!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
