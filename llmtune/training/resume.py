"""May this run go on from the checkpoints in its folder? Only as the run that it was: what changed since is named.

A resumed run is promised to equal an uninterrupted one to the bit. What cannot break that may change, and is said; everything
else is refused, also a setting that nobody thought of here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llmtune import ranks
from llmtune.artifact import versions, write_atomically
from llmtune.errors import ConfigError
from llmtune.progress import say
from llmtune.training import checkpoints

NOTE = "run.json"
MAY_CHANGE = {
    "config.output_dir": "where the run lies; the folder was moved",
    "config.tracking": "who else is told of the metrics",
    "config.train.log_steps": "how often a loss is written, not what it is",
    "config.data.train": "the name of a file; its rows are compared by their hash",
    "config.data.validation": "the same",
    "config.model.name": "the name of the base; its weights and its words are compared by their hash",
    "base.id": "the same",
    "base.revision": "the same",
    "base.licence": "no arithmetic",
    "machine.gpu": "another GPU may round otherwise: refusing would keep a cluster from requeueing",
    "machine.threads": "the same for processors",
}
"""Where a run may differ from what it was when it was interrupted, and why."""
ARITHMETIC = ("llmtune", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
"""Libraries of which another version may compute otherwise."""


def identity(config: dict[str, Any], rows: dict[str, str], base: dict[str, Any], device: str) -> dict[str, Any]:
    """What a run is, as JSON: its settings, rows, base, libraries and machine."""
    import torch

    here = {
        "processes": ranks.world_size(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
    }
    stack = {name: version for name, version in versions().items() if name in ARITHMETIC}
    told = {"config": config, "rows": rows, "base": base, "versions": stack, "machine": here}
    return json.loads(json.dumps(told))  # type: ignore[no-any-return]


def claim(folder: Path, identity: dict[str, Any], place: object, *, other_versions: bool = False) -> None:
    """Note in `folder` what run its checkpoints belong to, and say what is not as it was when they were written.

    Raises ConfigError where that would break the equality with an uninterrupted run (`other_versions` lets the libraries be
    others), and for a folder that is not ours to clear.
    """
    note = folder / NOTE
    if note.is_file() and checkpoints.begun(folder):
        before = json.loads(note.read_text(encoding="utf-8"))
        _compare(before, identity, folder, place, other_versions=other_versions)
    else:
        clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(
            not path.name.startswith(f".{NOTE}.") for path in folder.iterdir()
        ):  # one killed while it wrote the note
            raise ConfigError(
                place, f"output_dir: {folder} holds files that are not this tool's; choose another output_dir"
            )
    write_atomically(note, json.dumps(identity, indent=1))


def clear(folder: Path) -> None:
    """Delete a run's checkpoints, seals first and the note last: whenever this is cut short, what is left is known to be ours.

    A folder without a note is not touched.
    """
    if (folder / NOTE).is_file():
        for seal in folder.glob(f"**/{checkpoints.SEAL}"):
            seal.unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # two machines of one run may both be at it
            elif path.name != NOTE:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _compare(before: dict[str, Any], now: dict[str, Any], folder: Path, place: object, *, other_versions: bool) -> None:
    changed = _differences({**before, "rows": _hashes(before)}, {**now, "rows": _hashes(now)})
    libraries = {key: text for key, text in changed.items() if key.startswith("versions.")}
    refused = [text for key, text in changed.items() if key not in {*MAY_CHANGE, *libraries}]
    text = "; ".join([*refused, *libraries.values()])
    if refused:
        raise ConfigError(
            place,
            f"an interrupted run lies in {folder}, and since then {text}. To go on, undo that, choose another output_dir, or "
            f"remove {folder} to start anew",
        )
    if libraries and not other_versions:
        raise ConfigError(
            place,
            f"an interrupted run lies in {folder}, and since then {text}: from there on its numbers may be others. Install the "
            "versions of then, or add --other-versions to go on with these",
        )
    if changed:
        say(f"  going on with changes: {'; '.join(changed.values())}")


def _hashes(told: dict[str, Any]) -> dict[str, list[str]]:
    """split -> the hashes of its sources in their order, whatever the files are called."""
    found: dict[str, list[str]] = {}
    for key, sha in told["rows"].items():
        found.setdefault(f"the rows of {key.partition(' ')[0]}", []).append(sha[:12])
    return found


def _differences(before: Any, now: Any, key: str = "") -> dict[str, str]:
    """Dotted key -> what was and what is."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(name for name in now if name not in before)]
        below = [_differences(before.get(name), now.get(name), f"{key}.{name}" if key else name) for name in keys]
        return {name: text for part in below for name, text in part.items()}
    short = key.partition(".")[2] if key.startswith(("config.", "rows.", "machine.", "versions.")) else key
    return {} if before == now else {key: f"{short} was {before!r} and is {now!r}"}
