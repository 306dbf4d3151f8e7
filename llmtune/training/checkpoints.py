"""Which checkpoint a run may be resumed from: only one that was written whole, by this very run.

transformers writes `checkpoint-N` file by file. It counts from the moment its seal is in it: the hashes of all its files, written
last, by rename, after everything else is on the disk. Older ones are deleted after that, seal first. So whenever a run is
killed, the newest sealed checkpoint is whole, and there is one from the first save on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llmtune.artifact import flush, sha256_file, write_atomically
from llmtune.progress import say

SEAL = "llmtune-checkpoint.json"
STATE = "trainer_state.json"
KEPT = 2


def seal(checkpoint: Path) -> None:
    """Write the hash of every file of a finished checkpoint into it, last, when all of it is on the disk."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL]
    flush(checkpoint)
    hashes = {str(file.relative_to(checkpoint)): sha256_file(file) for file in files}
    write_atomically(checkpoint / SEAL, json.dumps(hashes, indent=1))
    flush(checkpoint.parent, below=False)


def rotate(folder: Path, best_step: int | None) -> None:
    """Delete every checkpoint but the best and the newest sealed one, or the two newest where that is one and the same."""
    sealed = [path for path in _newest_first(folder) if (path / SEAL).is_file()]
    best = [path for path in sealed if path.name == f"checkpoint-{best_step}"]
    kept = list(dict.fromkeys([*sealed[:1], *best, *sealed]))[:KEPT]
    for path in _newest_first(folder):
        if path not in kept:
            discard(path)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; one half deleted has no seal any more."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def begun(folder: Path) -> bool:
    """Whether there is a sealed checkpoint or phase, whole or not: something that is not thrown away without asking."""
    return any(folder.glob(f"**/{SEAL}"))


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was sealed."""
    return next((path for path in _newest_first(folder) if not damage(path)), None)


def resumable(folder: Path) -> Path | None:
    """The newest whole checkpoint, once the ones after it are named with what is wrong with them, and deleted."""
    for checkpoint in _newest_first(folder):
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        say(f"  {checkpoint.name} cannot be resumed from and is deleted: {wrong}")
        discard(checkpoint)
    return None


def damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being resumed from, its best checkpoint included; None when nothing does."""
    if wrong := _damaged_files(checkpoint):
        return wrong
    try:
        best = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best_global_step")
    except (ValueError, AttributeError) as error:
        return f"{STATE} cannot be read ({error})"
    other = checkpoint.parent / f"checkpoint-{best}"
    if best is not None and other != checkpoint and (wrong := _damaged_files(other)):
        return f"the best checkpoint up to there, {other.name}, is lost: {wrong}"
    return None


def whole(folder: Path) -> bool:
    """Whether `folder` holds a model that is as it was sealed."""
    return _damaged_files(folder, "config.json") is None


def _damaged_files(checkpoint: Path, holds: str = STATE) -> str | None:
    try:
        hashes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError) as error:
        return f"its seal {SEAL} cannot be read ({error})"
    if not isinstance(hashes, dict) or holds not in hashes:
        return f"its seal {SEAL} is not one of llmtune"
    missing = [name for name in hashes if not (checkpoint / name).is_file()]
    changed = [name for name in hashes if name not in missing and sha256_file(checkpoint / name) != hashes[name]]
    said = [f"{name} is missing" for name in missing] + [f"{name} was changed" for name in changed]
    return ", ".join(said) or None


def _newest_first(folder: Path) -> list[Path]:
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
