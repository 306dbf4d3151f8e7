"""Immutable step folders: what a finished step leaves, and what the next one may rely on.

A step writes into `<folder>.partial-*`, hashes every file, writes `llmtune.json` last and renames the folder into
place: a folder with a manifest is complete, a folder without one is not an artifact. Reading checks the hashes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from llmtune.errors import ArtifactError, MachineError

MANIFEST = "llmtune.json"
SCHEMA = 1
Kind = Literal["data", "adapter", "model", "scores", "verdict", "report"]
STACK = ("llmtune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval", "safetensors")


@dataclass(frozen=True)
class Artifact:
    """A finished step on disk. `sha256` is the hash of its manifest, which holds the hash of every file."""

    path: Path
    manifest: dict[str, Any]
    sha256: str

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    def parent(self) -> dict[str, str]:
        """The entry by which a later step names this one."""
        return {"kind": self.kind, "path": str(self.path), "sha256": self.sha256}


@dataclass
class Draft:
    """A folder being written: put files under `path`, and what the manifest shall say into `facts`."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def writing(
    folder: Path, kind: Kind, parents: list[Artifact] | None = None, *, replace: bool = False
) -> Iterator[Draft]:
    """Write an artifact: nothing appears at `folder` unless the whole block succeeds.

    Raises ArtifactError when `folder` holds an artifact already and `replace` is off, MachineError when the disk is full.
    """
    if folder.exists() and not (replace and (folder / MANIFEST).is_file()):
        what = "is finished already" if (folder / MANIFEST).exists() else "exists and is not an artifact of ours"
        raise ArtifactError(f"{folder}: {what}; choose another output_dir, or move it away")
    with out_of_space_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Draft(Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent)))
        try:
            yield draft
            manifest = {
                "schema": SCHEMA,
                "kind": kind,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "parents": [parent.parent() for parent in parents or []],
                **draft.facts,
                "versions": versions(),
                "hardware": hardware(),
                "git_commit": git_commit(),
                "files": {
                    str(file.relative_to(draft.path)): {"sha256": sha256_file(file), "bytes": file.stat().st_size}
                    for file in sorted(draft.path.rglob("*"))
                    if file.is_file()
                },
            }
            write_atomically(draft.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
            _settle(draft.path)
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f"{folder.name}.replaced-", dir=folder.parent))
                folder.rename(old / folder.name)
                draft.path.rename(folder)
                shutil.rmtree(old)
            else:
                draft.path.rename(folder)
        finally:
            shutil.rmtree(draft.path, ignore_errors=True)


def read(folder: Path, *kinds: Kind) -> Artifact:
    """The artifact at `folder`, with every file checked against its hash.

    Raises ArtifactError when there is none, when it is unfinished, of another kind, or was changed since it was written.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    try:
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: has no {MANIFEST}, so it is unfinished or was not written by llmtune") from None
    try:
        manifest = json.loads(raw)
        files, kind = manifest["files"], manifest["kind"]
        if not isinstance(files, dict):
            raise TypeError("files is not an object")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / MANIFEST}: not a manifest of llmtune ({error!r})") from None
    if kinds and kind not in kinds:
        raise ArtifactError(f"{folder}: is a {kind} artifact, and {' or '.join(kinds)} is needed here")
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    changed = [f"{name} is missing" for name in sorted(files.keys() - found)]
    changed += [f"{name} was added" for name in sorted(found - files.keys())]
    changed += [
        f"{name} was changed"
        for name in sorted(files.keys() & found)
        if sha256_file(folder / name) != files[name]["sha256"]
    ]
    if changed:
        raise ArtifactError(f"{folder}: differs from its manifest: {'; '.join(changed)}. Make it anew")
    return Artifact(folder, manifest, hashlib.sha256(raw).hexdigest())


def finished_run(run: Path) -> Artifact:
    """The trained artifact of a run folder: its adapter, else its whole model."""
    for kind in ("adapter", "model"):
        if (run / kind).is_dir():
            return read(run / kind, "adapter", "model")
    raise ArtifactError(f"{run}: holds no finished run (neither adapter/ nor model/); 'llmtune sft' makes one")


def scores_folder(given: Path) -> Path:
    """Where the scores of a run lie, or `given` itself, which may be scores. Raises ArtifactError for a run without any."""
    if (given / "scores").is_dir():
        return given / "scores"
    if any((given / step).is_dir() for step in ("adapter", "model")):
        raise ArtifactError(f"{given}: holds no scores; 'llmtune eval' makes them")
    return given


def require_no_run(folder: Path, option: str) -> None:
    """Raises ArtifactError when `folder` holds a run, or is one of its steps: what speaks of another model must not go there."""
    if made := [step for step in ("adapter", "model") if (folder / step).is_dir()]:
        raise ArtifactError(
            f"{folder}: holds a run ({made[0]}/), whose scores would be taken for these; choose another {option}"
        )
    if complete(folder):
        raise ArtifactError(f"{folder}: is a finished step itself; choose another {option}")


def complete(folder: Path) -> bool:
    """Whether a finished artifact lies at `folder` (cheap: hashes are checked by `read`)."""
    return (folder / MANIFEST).is_file()


def sha256_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(file: Path, text: str) -> None:
    """Write `text` beside `file`, flush it to the disk, and rename it into place."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def out_of_space_explained(folder: Path) -> Iterator[None]:
    """Turn a full disk, also as torch reports it (a RuntimeError that never says so), into one clear MachineError."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing more special when it cannot write
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        torch_write = "inline_container" in str(error) or "basic_ios::clear" in str(error)
        if full or torch_write or "No space left" in str(error) or "os error 28" in str(error):
            raise MachineError(f"{folder}: the disk is full. Free space and run the same command again") from error
        raise


def versions() -> dict[str, str]:
    """Installed versions of Python and of the libraries a result depends on, read without importing them."""
    found = {"python": platform.python_version()}
    for name in STACK:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Processor, memory and, where torch is loaded already, the GPU."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cpu_count": os.cpu_count(), "system": platform.system()}
    with contextlib.suppress(ValueError, OSError, AttributeError):
        facts["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def git_commit() -> str | None:
    """The commit of the folder the command runs in, with `+changes` when its tree is dirty; None outside git."""
    try:
        run = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes"]
        return subprocess.run(run, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def flush(folder: Path, *, below: bool = True) -> None:
    """Return when `folder`, and what is below it, would outlast a power cut."""
    for path in [*(folder.rglob("*") if below else []), folder]:
        if path.is_file() or path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _settle(folder: Path) -> None:
    """Readable by others, and on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            path.chmod(0o755 if path.is_dir() else 0o644)
    flush(folder)
