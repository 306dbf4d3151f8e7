"""Which checkpoint is resumed from, whatever was done to the others; and that there always is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtune.training import checkpoints

FILES = {
    "trainer_state.json": '{"global_step": 0, "best_global_step": null}',
    "adapter_model.safetensors": "weights",
    "optimizer.pt": "moments",
    "scheduler.pt": "rate",
    "rng_state.pth": "random",
    "shards/rank0.pt": "a part",
}


def written(folder: Path, step: int, best: int | None = None, *, sealed: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name, text in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(text + str(step) if name != "trainer_state.json" else "")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best}))
    if sealed:
        checkpoints.seal(checkpoint)
    return checkpoint


def cut(name: str):
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-1])


def gone(name: str):
    return lambda checkpoint: (checkpoint / name).unlink()


def seal_of(text: str):
    return lambda checkpoint: (checkpoint / checkpoints.SEAL).write_text(text)


DAMAGES = {
    **{f"{name} cut": (cut(name), f"{name} was changed") for name in FILES},
    **{f"{name} gone": (gone(name), f"{name} is missing") for name in FILES},
    "empty": (lambda checkpoint: [shutil.rmtree(checkpoint), checkpoint.mkdir()], "it was not written to its end"),
    "no seal": (gone(checkpoints.SEAL), "it was not written to its end"),
    "a file for a folder": (
        lambda checkpoint: [shutil.rmtree(checkpoint / "shards"), (checkpoint / "shards").write_text("x")],
        "shards/rank0.pt is missing",
    ),
    **{
        f"seal {text[:9]!r}": (seal_of(text), f"its seal {checkpoints.SEAL}")
        for text in ("", "{", "{}", "[]", "null", '"x"', '{"optimizer.pt": "0"}', "\x00" * 40, '{"trainer_state.json"')
    },
    "seal of bytes": (
        lambda checkpoint: (checkpoint / checkpoints.SEAL).write_bytes(b"\xff\xfe\x00"),
        f"its seal {checkpoints.SEAL} cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_resumed_from_and_that_is_said(tmp_path, capsys, name):
    spoil, said = DAMAGES[name]
    good, bad = written(tmp_path, 9), written(tmp_path, 10)
    assert checkpoints.resumable(tmp_path) == bad
    assert capsys.readouterr().err == ""
    spoil(bad)
    assert checkpoints.last_complete(tmp_path) == good
    assert checkpoints.resumable(tmp_path) == good
    line = capsys.readouterr().err
    assert line.startswith(f"  checkpoint-10 cannot be resumed from and is deleted: {said}"), line
    assert line.count("\n") == 1
    assert not bad.exists()


def test_every_cut_of_a_seal_is_noticed(tmp_path):
    checkpoint = written(tmp_path, 3)
    whole = (checkpoint / checkpoints.SEAL).read_bytes()
    for length in range(len(whole)):
        (checkpoint / checkpoints.SEAL).write_bytes(whole[:length])
        assert checkpoints.damage(checkpoint), length


def test_nothing_whole_means_anew(tmp_path):
    for step in (2, 4):
        written(tmp_path, step, sealed=False)
    assert not checkpoints.begun(tmp_path)
    assert checkpoints.resumable(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_added_does_no_harm(tmp_path):
    checkpoint = written(tmp_path, 3)
    (checkpoint / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-final").mkdir()
    assert checkpoints.resumable(tmp_path) == checkpoint


def test_a_checkpoint_whose_best_one_is_lost_is_not_resumed_from(tmp_path, capsys):
    """The best weights so far are a part of what a run is; without them it would end with others, and not say so."""
    first = written(tmp_path, 2, best=2)
    lost = written(tmp_path, 4, best=4)
    written(tmp_path, 6, best=4)
    cut("adapter_model.safetensors")(lost)
    assert checkpoints.resumable(tmp_path) == first
    assert (
        "checkpoint-6 cannot be resumed from and is deleted: the best checkpoint up to there" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("best", "kept"), [(None, {6, 8}), (2, {2, 8}), (8, {6, 8}), (6, {6, 8}), (5, {6, 8})], ids=str
)
def test_what_is_kept(tmp_path, best, kept):
    for step in (2, 4, 6, 8):
        written(tmp_path, step)
    written(tmp_path, 7, sealed=False)
    checkpoints.rotate(tmp_path, best_step=best)
    assert {int(path.name.split("-")[1]) for path in tmp_path.iterdir()} == kept
    assert checkpoints.last_complete(tmp_path) == tmp_path / "checkpoint-8"
