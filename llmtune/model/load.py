"""A model's name -> its weights, tokenizer and provenance."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmtune.artifact import sha256_file
from llmtune.errors import ArtifactError, ConfigError, LlmtuneError, MachineError
from llmtune.model import gguf, quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md", "LICENSE*"]
WORDS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HUB_ID = re.compile(r"^(?P<id>(?!\.)[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")
NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial|research-only|no-commercial", re.IGNORECASE)
NO_SUCH_ATTENTION = re.compile(r"does not support (an attention implementation|Flash Attention)")


@dataclass(frozen=True)
class Source:
    """Where a model lies on disk, and what is known about where it came from."""

    name: str
    folder: Path
    revision: str | None
    sha256: str
    words_sha256: str
    """Hash of the tokenizer, the chat template and the model's config."""
    licence: str | None
    quantize: str | None = None
    """nf4 or int8: how its weights are quantised when they are loaded."""

    def facts(self) -> dict[str, Any]:
        """The `base` entry of a manifest."""
        return {
            "id": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "words_sha256": self.words_sha256,
            "licence": self.licence,
            "quantize": self.quantize,
            "quantised": self.quantised,
        }

    @property
    def quantised(self) -> str | None:
        """How its weights are quantised in memory: as asked for (nf4, int8), or as on disk (gptq, awq, nf4, ...); None: not."""
        return self.quantize or quantised.kind_on_disk(self.folder)

    @property
    def licence_warning(self) -> str | None:
        """A sentence when the licence forbids commercial use or is unknown."""
        if self.licence is None:
            return (
                f"{self.name} states no licence: find out whether you may use it before you ship anything made from it"
            )
        if NON_COMMERCIAL.search(self.licence):
            return f"{self.name} is under {self.licence}, which FORBIDS COMMERCIAL USE; so is what you make from it"
        return None


def find(name: str, *, quantize: str | None = None, trust_remote_code: bool = False) -> Source:
    """Resolve `org/name@revision`, `./folder`, `./file.gguf` or `package:PKG/file.gguf` to a folder with safetensors.

    quantize: "nf4" or "int8", how `load_model` is to quantise its weights.
    Raises ConfigError for what cannot be found, ArtifactError for pickled weights or a GGUF cut short.
    """
    revision = None
    if name.startswith("package:"):
        folder = gguf.dequantised(gguf.packaged_file(name))
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ConfigError("model", f"no such file: {name}")
        folder = gguf.dequantised(Path(name))
    elif Path(name).is_dir():
        folder = Path(name)
    elif match := HUB_ID.match(name):
        folder, revision = _download(
            match["id"], match["revision"], [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
        )
    else:
        raise ConfigError(
            "model", f"{name} is no folder, no .gguf file, no package:PKG/file.gguf and no hub id like org/name"
        )
    if (folder / "adapter_config.json").is_file():
        raise ArtifactError(f"{folder}: is an adapter, and a whole model is needed here; merge it into its base first")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        why = f"has only pickled weights ({pickled[0]}), which can run code when read" if pickled else "has no weights"
        raise ArtifactError(f"{folder}: {why}; a folder with .safetensors is needed")
    words = [folder / name for name in WORDS if (folder / name).is_file()]
    return Source(name, folder, revision, _digest(weights), _digest(words), _licence(folder), quantize)


def _digest(files: list[Path]) -> str:
    return hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()


def find_again(facts: dict[str, Any]) -> Source:
    """The base of a finished artifact, at the revision it had then, and quantised as it was then."""
    name, revision = str(facts["id"]), facts.get("revision")
    return find(f"{name}@{revision}" if revision and "@" not in name else name, quantize=facts.get("quantize"))


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token, and `generation_stops`: the ids at which its model's generation config stops.

    Raises ConfigError where there is no chat template: chats cannot be written.
    """
    from transformers import AutoTokenizer

    with named(source):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise ConfigError(
            "model",
            f"{source.name} has no chat template; use its instruct version, or add a chat_template.jinja to its folder",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.generation_stops = _generation_stops(source.folder)
    return tokenizer


def _generation_stops(folder: Path) -> list[int]:
    """The end-of-sequence ids of generation_config.json or, as transformers does without one, of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            stops = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            return stops if isinstance(stops, list) else [] if stops is None else [stops]
    return []


def positions(source: Source) -> int | None:
    """Tokens the model has positions for, where its config.json says so."""
    facts = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    found = facts.get("text_config", facts).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def load_model(
    source: Source,
    dtype: str = "auto",
    device: str = "auto",
    *,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The weights, on the device, in eval mode; quantised where `source` says so, and then dtype is that of the arithmetic.

    attention: transformers' name of an implementation; "auto" is its own choice.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place, kind = choose_device(device), getattr(torch, choose_dtype(dtype, device))
    how: dict[str, Any] = {}
    if source.quantised:  # such weights are put in their place as they are read: transformers does not move them later
        quantised.require_loadable(source, place)
        how["device_map"] = {
            "": torch.cuda.current_device() if place == "cuda" else place
        }  # accelerate asks for the number
    if source.quantize:
        how["quantization_config"] = quantised.settings(source.quantize, kind)
    with named(source):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=kind,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **how,
        )
    if not source.quantised:
        return model.to(place).eval()
    if dtype != "auto" and model.dtype != kind:
        own = str(model.dtype).removeprefix("torch.")
        raise ConfigError("model", f"dtype: {source.name} is quantised on disk and computes in {own}; set it to auto")
    return quantised.settled(model).eval()


def skeleton(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights (on torch's meta device): its modules, names and shapes, in milliseconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with named(source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return model


@contextlib.contextmanager
def named(source: Source) -> Iterator[None]:
    """Say which folder it is that cannot be read."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            why = "needs Python code that comes with it; read that code, then set model.trust_remote_code to true"
            raise ConfigError("model", f"{source.name} {why}") from None
        if NO_SUCH_ATTENTION.search(reason):
            why = "has no such attention in transformers; set it to 'auto' or 'eager'"
            raise ConfigError("model", f"model.attention: {source.name} {why}") from None
        raise ArtifactError(f"{source.folder}: cannot be read as a model: {reason[:300]}") from None


def choose_device(device: str) -> str:
    """`auto` -> a GPU where there is one. Raises MachineError when a GPU is asked for and none is seen."""
    import torch

    seen = torch.cuda.is_available()
    if device == "cuda" and not seen:
        raise MachineError(
            "model.device: 'cuda' is asked for and torch sees no GPU; use 'auto' or 'cpu', or install a CUDA build of torch "
            "('llmtune doctor' shows what is here)"
        )
    return ("cuda" if seen else "cpu") if device == "auto" else device


def require_attention(attention: str, device: str, place: object) -> None:
    """Raise MachineError where this machine lacks what the attention needs, ConfigError where it cannot be trained with."""
    if attention == "flash_attention_2" and (device != "cuda" or importlib.util.find_spec("flash_attn") is None):
        lacks = "a GPU" if device != "cuda" else "the package flash-attn, which is not installed"
        raise MachineError(f"model.attention: flash_attention_2 needs {lacks}; use 'sdpa'")
    if attention == "flex_attention" and device == "cpu":
        raise ConfigError(place, "model.attention: flex_attention has no backward pass on a CPU; use 'sdpa'")


def choose_dtype(dtype: str, device: str) -> str:
    """`auto` -> bfloat16 where the hardware multiplies in it, else float32."""
    import torch

    if dtype != "auto":
        return dtype
    if choose_device(device) == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if capable else "float32"


def _download(name: str, revision: str | None, files: list[str]) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError("model", f"{name}: {str(error).splitlines()[0]}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LlmtuneError(
            f"model: {name} is not in the local cache and the hub cannot be reached ({type(error).__name__}); "
            "is this machine offline? A ./folder, a ./file.gguf or package:PKG/file.gguf needs no network"
        ) from None
    return folder, folder.name


def _licence(folder: Path) -> str | None:
    """The licence a model card states in its front matter."""
    card = folder / "README.md"
    if card.is_file() and (
        match := re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    ):
        try:
            facts = yaml.safe_load(match[1])
        except yaml.YAMLError:
            return None
        licence = facts.get("license_name") or facts.get("license") if isinstance(facts, dict) else None
        return str(licence) if licence else None
    return None
