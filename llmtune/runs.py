"""`llmtune runs`: what lies in a folder of runs, and how two runs differ. Manifests are read, no model is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmtune.artifact import MANIFEST
from llmtune.errors import ArtifactError, UserError, did_you_mean

TRAINED = ("adapter", "model")
"""Where a run leaves what it trained."""
NOTE = "checkpoints/run.json"
"""What an unfinished run says about itself."""
COLUMNS = (
    ("run", ""), ("stage", ""), ("method", ""), ("base", ""), ("rows", ",d"), ("steps", ""), ("validation_loss", ".4f"),
    ("tokens_per_s", ",.0f"), ("peak_memory_gb", ".2f"), ("date", ""), ("verdict", ""),
)  # fmt: skip


class Run(BaseModel):
    """A row of the list. What is not known is None. `date` is UTC: when it was finished, else last written to."""

    model_config = ConfigDict(frozen=True, strict=True)

    run: str
    path: str
    state: Literal["finished", "unfinished", "broken"]
    date: str
    problem: str | None = None
    stage: str | None = None
    method: str | None = None
    base: str | None = None
    seed: int | None = None
    rows: int | None = None
    steps: int | None = None
    total_steps: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    tokens_per_s: float | None = None
    peak_memory_gb: float | None = None
    verdict: str | None = None


def find(folder: Path) -> list[Run]:
    """The runs in `folder`, at any depth, or `folder` itself: newest first. A broken one is among them, with its problem.

    Cheap: files are compared with their manifest by name and size; `artifact.read` compares hashes.
    Raises UserError when there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; 'llmtune runs DIR' lists the runs in DIR")
    found = [_describe(run, run.relative_to(folder).as_posix()) for run in _runs(folder)]
    return sorted(found, key=lambda run: run.date, reverse=True)


def _runs(folder: Path) -> Iterator[Path]:
    if (folder / NOTE).is_file() or any(_trained(folder / name) for name in TRAINED):
        yield folder
        return
    children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for child in children:
        if not (child / MANIFEST).exists():  # an artifact holds no runs
            yield from _runs(child)


def _trained(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or any(folder.glob("*.safetensors"))


def _describe(path: Path, name: str) -> Run:
    named = {"run": path.resolve().name if name == "." else name, "path": str(path.resolve())}
    try:
        facts = _facts(path)
        config, metrics = facts["config"], facts["metrics"]
        told = {
            "state": "finished" if facts["finished"] else "unfinished",
            "date": facts["date"],
            "stage": config.get("stage"),
            "method": _method(config),
            "base": facts["base"].get("id"),
            "seed": config.get("train", {}).get("seed"),
            "rows": (facts["data"].get("train") or {}).get("rows"),
            **{key: metrics.get(key) for key in METRICS},
            "verdict": facts["verdict"],
        }
        return Run.model_validate(named | told)
    except ArtifactError as error:
        why = str(error)
    except (ValidationError, AttributeError, TypeError, KeyError) as error:
        why = f"{path}: what it says of itself is not what llmtune writes ({' '.join(str(error).split())[:120]})"
    return Run.model_validate({**named, "state": "broken", "date": _written(path), "problem": why})


METRICS = ("steps", "total_steps", "train_loss", "validation_loss", "tokens_per_s", "peak_memory_gb")


def _method(config: Mapping[str, Any]) -> str:
    """PEFT's name of the adapter's method, `partial` where a part of the weights is trained, else `full`."""
    first = (
        str(config["adapter"]["method"]) if config.get("adapter") else "partial" if config.get("trainable") else "full"
    )
    return f"{first}, then partial" if config.get("second_phase") else first


def _facts(path: Path) -> dict[str, Any]:
    """What a run says of itself: config, base, data, metrics, environment. Raises ArtifactError when it is broken."""
    manifest = _manifest(path)
    if manifest is not None:
        return {
            "finished": True,
            "date": str(manifest.get("created")),
            "config": manifest["config"],
            "base": manifest["base"],
            "data": manifest["data"],
            "metrics": {**manifest["metrics"], "total_steps": manifest["metrics"].get("steps")},
            "environment": {key: manifest.get(key) for key in ("versions", "hardware", "git_commit")},
            "verdict": _verdict(path),
        }
    note = _json(path / NOTE)
    config = {key: value for key, value in note.get("config", {}).items() if key != "output_dir"}
    sources: dict[str, dict[str, Any]] = {}
    for key, sha in note.get("rows", {}).items():
        split, _, source = key.partition(" ")
        sources.setdefault(split, {"sources": []})["sources"].append({"path": source, "sha256": sha})
    return {
        "finished": False,
        "date": _written(path),
        "config": config,
        "base": note.get("base", {}),
        "data": sources,
        "metrics": _so_far(path / "checkpoints", config),
        "environment": {"versions": note.get("versions")},
        "verdict": None,
    }


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of what the run trained; None where it has not got so far."""
    for name in TRAINED:
        folder = path / name
        if folder.is_dir():
            found = _json(folder / MANIFEST)
            wanted = ("config", "base", "data", "metrics", "files")
            if wrong := [key for key in wanted if not isinstance(found.get(key), dict)]:
                raise ArtifactError(f"{folder / MANIFEST}: not a manifest of a run: no {wrong[0]!r}")
            changed = [
                file
                for file, facts in found["files"].items()
                if not (folder / file).is_file() or (folder / file).stat().st_size != facts["bytes"]
            ]
            if changed:
                raise ArtifactError(f"{folder}: differs from its manifest: {changed[0]} is missing or was changed")
            return found
    return None


def _so_far(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """How far an unfinished run has got: the last step it can be resumed from, of how many, and its last losses."""
    folder = max(folder.glob("phase-*"), default=folder)  # of two phases, the one it is in
    steps = [int(n) for path in folder.glob("checkpoint-*") if (n := path.name.removeprefix("checkpoint-")).isdigit()]
    state: dict[str, Any] = {}
    for step in sorted(steps, reverse=True):
        try:
            state = _json(folder / f"checkpoint-{step}" / "trainer_state.json")
            break
        except ArtifactError:  # half-written: the one before it counts
            continue
    return {
        "steps": state.get("global_step", 0),
        "total_steps": state.get("max_steps") or config.get("train", {}).get("max_steps"),
        "validation_loss": state.get("best_metric"),
    }


def _verdict(path: Path) -> str | None:
    try:
        return str(_json(path / "verdict" / MANIFEST)["verdict"])
    except (ArtifactError, KeyError):
        return None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{file}: is missing, so this run is unfinished or was not written by llmtune") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{file}: not a JSON object")
    return found


def _written(path: Path) -> str:
    """When anything in the run's own folders was last written."""
    times = [file.stat().st_mtime for file in [path, *path.glob("*"), *path.glob("checkpoints/*")]]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds")


def render_list(found: list[Run]) -> str:
    """The list as a table, newest first; a broken run has its problem in its line."""
    if not found:
        return "no runs here; 'llmtune sft CONFIG' makes one\n"
    lines = [[key.replace("_gb", "_GB").replace("_per_s", "/s").replace("_", " ") for key, _ in COLUMNS]]
    for run in found:
        cells = run.model_dump()
        cells["base"] = run.base and run.base.rstrip("/").rpartition("/")[2]
        cells["date"] = run.date[:16].replace("T", " ")
        if run.state == "unfinished":
            cells |= {"steps": f"{run.steps} of {run.total_steps or '?'}", "verdict": "unfinished"}
        lines.append([_cell(cells[key], spec) for key, spec in COLUMNS])
    problems = {i: f"broken: {run.problem}" for i, run in enumerate(found, 1) if run.state == "broken"}
    widths = [
        max(len(line[i]) for n, line in enumerate(lines) if not i or n not in problems) for i in range(len(COLUMNS))
    ]
    text = []
    for n, line in enumerate(lines):
        if n in problems:
            text.append(f"{line[0]:<{widths[0]}}  {problems[n]}")
            continue
        padded = [
            f"{cell:>{width}}" if spec else f"{cell:<{width}}"
            for cell, width, (_, spec) in zip(line, widths, COLUMNS, strict=True)
        ]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text) + "\n"


def _cell(value: object, spec: str) -> str:
    if value is None:
        return "-"
    return format(value, spec) if spec else str(value)


Pair = tuple[Any, Any]
"""What the first run has, and what the second."""


def diff(first: Path, second: Path) -> dict[str, dict[str, Pair]]:
    """What differs between two runs, by section: `config` (run file keys), `base`, `data`, `environment`; and `metrics`,
    where equal figures stand as well. Raises ArtifactError for a folder without a run and for a broken one."""
    sides = [_side(first), _side(second)]
    return {
        section: _pairs(sides[0][section], sides[1][section], equal=section == "metrics")
        for section in ("config", "base", "data", "environment", "metrics")
    }


def _side(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_dir():
        near = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ArtifactError(f"{path}: no such folder{did_you_mean(path.name, near)}")
    if next(_runs(path), None) != path:
        raise ArtifactError(f"{path}: holds no run (no adapter/, model/ or checkpoints/)")
    if (seen := _describe(path, path.name)).problem:
        raise ArtifactError(seen.problem)
    facts = _facts(path)
    config = {key: value for key, value in facts["config"].items() if key != "output_dir"}
    metrics = {key: value for key, value in facts["metrics"].items() if key != "total_steps"}
    for split in (split for split in facts["data"].values() if split and "sources" in split):
        split["sources"] = {source["path"]: source["sha256"] for source in split["sources"]}
    facts |= {"config": config, "metrics": {**metrics, "verdict": facts["verdict"]}}
    return {key: _flat(value) for key, value in facts.items() if isinstance(value, dict)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in _flat(entry, f"{prefix}{key}.").items()}
    return {} if value is None else {prefix.rstrip("."): value}


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any], *, equal: bool) -> dict[str, Pair]:
    keys = [*first, *(key for key in second if key not in first)]
    pairs = {key: (first.get(key), second.get(key)) for key in keys}
    return {key: (one, two) for key, (one, two) in pairs.items() if equal or one != two}


def render_diff(first: Path, second: Path, sections: Mapping[str, Mapping[str, Pair]]) -> str:
    """The difference as text, a line a key; numbers of `metrics` with their change."""
    lines = []
    for section, pairs in sections.items():
        shown = {key: (_short(one), _short(two), _change(one, two)) for key, (one, two) in pairs.items()}
        if not shown:
            lines += [f"{section}: the same", ""]
            continue
        rows = [(section, str(first), str(second), "change" if section == "metrics" else "")]
        rows += [(f"  {key}", *cells) for key, cells in shown.items()]
        if section != "metrics":
            rows = [(*row[:3], "") for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
        lines.append("")
    return "\n".join(lines)


def _short(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.5g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-27:]}"


def _change(one: object, two: object) -> str:
    if isinstance(one, int | float) and isinstance(two, int | float) and one != two and math.isfinite(one + two):
        return f"{two - one:+.4g}"
    return ""
