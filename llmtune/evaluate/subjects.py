"""What is evaluated: a finished run, an adapter, a merged or quantised folder, a GGUF file, a hub model, or an endpoint."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import torch

from llmtune import artifact
from llmtune.artifact import Artifact
from llmtune.errors import ConfigError
from llmtune.evaluate.endpoint import Endpoint
from llmtune.evaluate.suites import fingerprint
from llmtune.model import adapters, load

URL = ("http://", "https://")


@dataclass(frozen=True)
class Subject:
    """One model to ask, found and checked, not yet loaded.

    sha256: of the artifact where llmtune made it, else of the weights; of an endpoint, of its address and model name, which
    is all that can be known. source: the whole model, or the base of `adapter`. made: the artifact it is, if any.
    """

    name: str
    kind: str
    sha256: str
    source: load.Source | None = None
    adapter: Artifact | None = None
    made: Artifact | None = None

    def parent(self) -> dict[str, str]:
        """What a verdict names as the thing it judged."""
        return self.made.parent() if self.made else {"kind": self.kind, "path": self.name, "sha256": self.sha256}

    def facts(self) -> dict[str, Any]:
        return {**self.parent(), "source": self.source.facts() if self.source else None}

    def endpoint(self) -> Endpoint:
        """The server behind `http://host:port/v1?api_key_env=VARIABLE#model`. Raises ConfigError when the variable is not set."""
        parts = urlsplit(self.name)
        keys = parse_qs(parts.query, strict_parsing=bool(parts.query))
        if unknown := keys.keys() - {"api_key_env"}:
            raise ConfigError(
                self.name, f"'{min(unknown)}' is not known; only api_key_env=VARIABLE may stand behind '?'"
            )
        address = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
        return Endpoint(address, parts.fragment, api_key_env=keys.get("api_key_env", [None])[0], place=self.name)

    @property
    def recorded_dtype(self) -> str | None:
        return self.made.manifest["base"]["dtype"] if self.made else None


def of_run(folder: Path, other: str | None = None) -> tuple[Subject, Subject]:
    """The base of a finished run, and what it made; `other` instead of that, where another form of it is to ship."""
    tuned = artifact.finished_run(folder)
    source = load.find_again(tuned.manifest["base"])
    adapters.require_base(tuned, source)
    base = Subject(source.name, "model", source.sha256, source)
    if other is not None:
        return base, find(other)
    return base, _made(tuned, source)


def find(name: str) -> Subject:
    """A model by any of its names: a run, an artifact, a folder, `./file.gguf`, `package:PKG/file.gguf`, `org/name@revision`
    or `http://host:port/v1#model`. Raises ConfigError or ArtifactError."""
    if name.startswith(URL):
        if not urlsplit(name).fragment:
            raise ConfigError(name, "names no model; write it behind '#', as in http://127.0.0.1:8000/v1#my-model")
        found = Subject(name, "endpoint", fingerprint(name))
        found.endpoint()
        return found
    folder = Path(name)
    if (folder / artifact.MANIFEST).is_file():
        made = artifact.read(folder, "adapter", "model")
    elif artifact.complete(folder / "adapter") or artifact.complete(folder / "model"):
        made = artifact.finished_run(folder)
    else:
        source = load.find(name)
        return Subject(name, "model", source.sha256, source)
    return _made(made, load.find_again(made.manifest["base"]) if made.kind == "adapter" else None)


def _made(made: Artifact, base: load.Source | None) -> Subject:
    if made.kind == "adapter":
        assert base is not None
        adapters.require_base(made, base)
        if made.manifest["config"]["adapter"]["method"] == "lily":
            why = "lily mixes its experts by the mean over a batch, so that a score would depend on the items beside it"
            raise ConfigError(made.path, f"{why}; tune with another method to compare it with its base")
        return Subject(str(made.path), "adapter", made.sha256, base, made, made)
    return Subject(str(made.path), made.kind, made.sha256, load.find(str(made.path)), made=made)


class Memory:
    """The models of an evaluation, each loaded when it is first asked; one at a time, but for an adapter and its own base,
    which are one model with the adapter on or off."""

    def __init__(self, subjects: list[Subject], dtype: str, device: str) -> None:
        self._subjects, self.dtype, self.device = subjects, dtype, device
        self._loaded: Subject | None = None
        self._model: Any = None
        self._tokenizers: dict[str, Any] = {}

    def tokenizer(self, subject: Subject) -> Any:
        assert subject.source is not None
        words = subject.source.words_sha256
        if words not in self._tokenizers:
            self._tokenizers[words] = load.load_tokenizer(subject.source)
        return self._tokenizers[words]

    @contextlib.contextmanager
    def active(self, subject: Subject) -> Iterator[Any]:
        """The model that answers for `subject`, in eval mode."""
        carrier = self._carrier(subject)
        if self._loaded is not carrier:
            self.release()
            assert carrier.source is not None
            model: Any = load.load_model(carrier.source, self.dtype, self.device)
            self._model = adapters.attach(model, carrier.source, carrier.adapter) if carrier.adapter else model
            self._loaded = carrier
        if carrier.adapter and subject.adapter is None:
            with self._model.disable_adapter():
                yield self._model
        else:
            yield self._model

    def one_model(self) -> bool:
        """Whether one model in memory answers for all of them."""
        first, *rest = [self._carrier(subject) for subject in self._subjects]
        return all(carrier is first for carrier in rest)

    def release(self) -> None:
        self._loaded = self._model = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _carrier(self, subject: Subject) -> Subject:
        """The subject whose weights are loaded for this one: of a base, the adapter on it."""
        assert subject.source is not None
        for other in self._subjects:
            same = other.source is not None and (other.source.sha256, other.source.quantize) == (
                subject.source.sha256,
                subject.source.quantize,
            )
            if subject.adapter is None and other.adapter is not None and same:
                return other
        return subject


def require_unlike(base: Subject, tuned: Subject, place: object) -> None:
    """Raise ConfigError when both are the very same thing."""
    if base.sha256 == tuned.sha256 and base.kind == tuned.kind:
        raise ConfigError(
            place, f"base and tuned are the same model ({tuned.sha256[:12]}): there is nothing to compare"
        )


def dtype_of(base: Subject, tuned: Subject, dtype: str, device: str) -> str:
    """One number format for both: what the tuned one was made in, unless another is asked for."""
    if dtype != "auto":
        return dtype
    return tuned.recorded_dtype or base.recorded_dtype or load.choose_dtype("auto", device)


def template_sha256(tokenizer: Any) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
