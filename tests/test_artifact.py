"""Artifacts: finished or not there at all, and noticed when anything in them changes."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from llmtune import artifact
from llmtune.errors import ArtifactError, MachineError


def make(folder: Path, kind="adapter", text="weights", **more) -> artifact.Artifact:
    with artifact.writing(folder, kind, **more) as draft:
        (draft.path / "weights.bin").write_text(text)
        (draft.path / "deep" / "er").mkdir(parents=True)
        (draft.path / "deep" / "er" / "curve.svg").write_text("<svg/>")
        draft.facts["metrics"] = {"loss": 1.5}
    return artifact.read(folder)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writing


def test_what_is_written_is_what_is_read(tmp_path):
    made = make(tmp_path / "runs" / "adapter")
    raw = (made.path / "llmtune.json").read_bytes()
    assert made.sha256 == hashlib.sha256(raw).hexdigest()
    assert made.manifest == json.loads(raw)
    assert made.kind == "adapter"
    assert made.manifest["metrics"] == {"loss": 1.5}
    assert made.manifest["files"] == {
        "deep/er/curve.svg": {"sha256": hashlib.sha256(b"<svg/>").hexdigest(), "bytes": 6},
        "weights.bin": {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7},
    }
    assert {"python", "torch", "transformers"} <= made.manifest["versions"].keys()
    assert made.manifest["hardware"]["cpu_count"] == os.cpu_count()
    assert left_in(tmp_path / "runs") == ["adapter"]


def test_a_child_names_its_parents_by_their_hash(tmp_path):
    parent = make(tmp_path / "adapter")
    child = make(tmp_path / "scores", "scores", parents=[parent])
    assert child.manifest["parents"] == [{"kind": "adapter", "path": str(parent.path), "sha256": parent.sha256}]


def test_the_hash_of_the_manifest_follows_every_file(tmp_path):
    hashes = {make(tmp_path / text, text=text).sha256 for text in ("a", "b")}
    assert len(hashes) == 2


def test_nothing_appears_before_the_block_ends(tmp_path):
    with artifact.writing(tmp_path / "adapter", "adapter") as draft:
        (draft.path / "weights.bin").write_text("half")
        assert not (tmp_path / "adapter").exists()
        assert not artifact.complete(tmp_path / "adapter")
    assert artifact.complete(tmp_path / "adapter")


def fail_inside(folder: Path, error: type[BaseException], **more) -> None:
    with artifact.writing(folder, "scores", **more) as draft:
        (draft.path / "weights.bin").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fail_inside(tmp_path / "scores", error)
    assert left_in(tmp_path) == []


def test_an_exception_inside_a_replacement_keeps_the_old_one(tmp_path):
    old = make(tmp_path / "scores", "scores")
    with pytest.raises(ValueError):
        fail_inside(tmp_path / "scores", ValueError, replace=True)
    assert artifact.read(tmp_path / "scores") == old
    assert left_in(tmp_path) == ["scores"]


def test_an_existing_folder_is_refused(tmp_path):
    make(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="is finished already; choose another output_dir, or move it away"):
        make(tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="exists and is not an artifact of ours"):
        make(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


def test_replace(tmp_path):
    make(tmp_path / "scores", "scores", "old")
    (tmp_path / "scores" / "added").write_text("gone with the old one")
    made = make(tmp_path / "scores", "scores", "new", replace=True)
    assert (made.path / "weights.bin").read_text() == "new"
    assert left_in(tmp_path) == ["scores"]


def test_replace_does_not_delete_what_is_no_artifact(tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "notes.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="exists and is not an artifact of ours"):
        make(tmp_path / "scores", "scores", replace=True)
    assert (tmp_path / "scores" / "notes.txt").read_text() == "precious"


def test_others_may_read_it_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        made = make(tmp_path / "adapter")
    finally:
        os.umask(before)
    for path in [made.path, *made.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    real, seen = os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (seen.append(os.path.realpath(f"/proc/self/fd/{descriptor}")), real(descriptor))
    )
    with artifact.writing(tmp_path / "adapter", "adapter") as draft:
        (draft.path / "weights.bin").write_text("weights")
    assert {"weights.bin", "llmtune.json"} <= {Path(path).name for path in seen}


# ---- reading


def test_what_is_unfinished_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        artifact.read(tmp_path / "nothing")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "weights.bin").write_text("weights")
    with pytest.raises(
        ArtifactError, match=r"half: has no llmtune.json, so it is unfinished or was not written by llmtune"
    ) as caught:
        artifact.read(tmp_path / "half")
    assert caught.value.exit_code == 2
    assert not artifact.complete(tmp_path / "half")


NO_MANIFESTS = ["", "{", "[]", "{}", '{"kind": "adapter"}', '"text"']
NO_FILES = pytest.param('{"kind": "adapter", "files": []}')


@pytest.mark.parametrize("manifest", [*NO_MANIFESTS, NO_FILES])
def test_what_is_no_manifest_is_refused(tmp_path, manifest):
    (tmp_path / "llmtune.json").write_text(manifest)
    with pytest.raises(ArtifactError, match="not a manifest of llmtune"):
        artifact.read(tmp_path)


def change(folder: Path) -> None:
    (folder / "weights.bin").write_text("Weights")


def remove(folder: Path) -> None:
    (folder / "deep" / "er" / "curve.svg").unlink()


def add(folder: Path) -> None:
    (folder / "deep" / "extra.py").write_text("")


@pytest.mark.parametrize(
    ("touch", "problem"),
    [
        (change, "weights.bin was changed"),
        (remove, r"deep/er/curve.svg is missing"),
        (add, r"deep/extra.py was added"),
    ],
)
def test_a_touched_file_is_noticed(tmp_path, touch, problem):
    made = make(tmp_path / "adapter")
    touch(made.path)
    with pytest.raises(ArtifactError, match=f"differs from its manifest: {problem}. Make it anew"):
        artifact.read(made.path)


def test_every_touched_file_is_named(tmp_path):
    made = make(tmp_path / "adapter")
    for touch in (change, remove, add):
        touch(made.path)
    with pytest.raises(ArtifactError, match=r"curve.svg is missing; deep/extra.py was added; weights.bin was changed"):
        artifact.read(made.path)


def test_kinds(tmp_path):
    make(tmp_path / "scores", "scores")
    assert artifact.read(tmp_path / "scores", "verdict", "scores").kind == "scores"
    with pytest.raises(ArtifactError, match="is a scores artifact, and adapter or model is needed here"):
        artifact.read(tmp_path / "scores", "adapter", "model")


# ---- a full disk


@pytest.fixture
def disk(small_disk, tmp_path):
    with small_disk(tmp_path / "disk", 64) as folder:
        yield folder


def test_a_full_disk_says_so_and_leaves_nothing(disk):
    with pytest.raises(MachineError) as caught:
        make(disk / "adapter", text="x" * 100_000)
    assert str(caught.value) == f"{disk / 'adapter'}: the disk is full. Free space and run the same command again"
    assert caught.value.exit_code == 1
    assert left_in(disk) == []
    assert make(disk / "adapter", text="x" * 10_000).kind == "adapter"


def test_a_disk_that_is_full_when_the_manifest_is_flushed(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="the disk is full"):
        make(tmp_path / "adapter")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)  # fmt: skip
def test_a_full_disk_in_every_wording(tmp_path, error):
    with pytest.raises(MachineError, match=f"{tmp_path}: the disk is full"), artifact.out_of_space_explained(tmp_path):
        raise error


def test_a_full_disk_as_safetensors_says_it(disk):
    import torch
    from safetensors.torch import save_file

    with pytest.raises(MachineError, match="the disk is full"), artifact.out_of_space_explained(disk):
        save_file({"weight": torch.zeros(100_000)}, disk / "model.safetensors")


def test_another_failure_is_left_as_it_is(tmp_path):
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("shape mismatch"), ValueError("no")):
        with pytest.raises(type(error)) as caught, artifact.out_of_space_explained(tmp_path):
            raise error
        assert caught.value is error


def test_write_atomically_keeps_the_old_text_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "note.json"
    artifact.write_atomically(file, "old é")
    assert file.read_text(encoding="utf-8") == "old é"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        artifact.write_atomically(file, "new")
    assert file.read_text(encoding="utf-8") == "old é"
    assert left_in(tmp_path) == ["note.json"]
