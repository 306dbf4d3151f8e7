"""Which checkpoint a run may be resumed from: only one that was written whole, by this very run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmtune import ranks
from llmtune.artifact import sha256_file, write_atomically
from llmtune.errors import ConfigError

SEAL = "llmtune-checkpoint.json"


def seal(checkpoint: Path) -> None:
    """Write the hash of every file of a finished checkpoint into it, last."""
    files = {
        file.name: sha256_file(file) for file in sorted(checkpoint.iterdir()) if file.is_file() and file.name != SEAL
    }
    write_atomically(checkpoint / SEAL, json.dumps(files, indent=1))


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was sealed; a half-written one is passed over."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(steps, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
            if all(sha256_file(checkpoint / name) == digest for name, digest in files.items()):
                return checkpoint
        except (OSError, ValueError):
            continue
    return None


def claim(folder: Path, identity: dict[str, Any], place: object) -> None:
    """Note what run these checkpoints belong to. Raises ConfigError naming what changed when they are another run's,
    and for a folder that is not ours to clear."""
    note = folder / "run.json"
    identity = json.loads(json.dumps(identity))
    if note.is_file() and last_complete(folder):
        before = json.loads(note.read_text(encoding="utf-8"))
        changed = _differences(before, identity)
        if changed:
            fix = f"undo that, choose another output_dir, or remove {folder} to start anew"
            raise ConfigError(
                place, f"an interrupted run lies in {folder}, and since then {'; '.join(changed)}. To go on, {fix}"
            )
        return
    if folder.exists() and not note.is_file() and any(folder.iterdir()):
        raise ConfigError(
            place, f"output_dir: {folder} holds files that are not this tool's; choose another output_dir"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomically(note, json.dumps(identity, indent=1))


def identity(config: dict[str, Any], rows: dict[str, str], base: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a resumed run to equal an uninterrupted one."""
    return {
        **{key: value for key, value in config.items() if key not in {"output_dir", "tracking"}},
        "processes": ranks.world_size(),
        "rows": rows,
        "base": base,
    }


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if before == now else [f"{prefix.rstrip('.')} was {before!r} and is {now!r}"]
