"""What may be other when a run goes on, key by key."""

from __future__ import annotations

import copy
import json

import pytest
from test_docs import keys_of

from llmtune.config.sft import SftConfig
from llmtune.errors import ConfigError
from llmtune.training import checkpoints, resume

THEN = {
    "config": {"train": {"learning_rate": 0.1, "log_steps": 1}, "tracking": [], "output_dir": "/a", "adapter": None},
    "rows": {"train /d/a.jsonl": "11", "train /d/b.jsonl": "22", "validation /d/v.jsonl": "33"},
    "base": {"id": "org/name", "revision": "1", "sha256": "44", "words_sha256": "55"},
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "machine": {"processes": 1, "device": "cpu", "gpu": None, "threads": 2},
}


@pytest.fixture
def interrupted(tmp_path):
    """A folder with one sealed checkpoint of the run THEN."""
    folder = tmp_path / "checkpoints"
    resume.claim(folder, THEN, "sft.yaml")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "trainer_state.json").write_text("{}")
    checkpoints.seal(folder / "checkpoint-1")
    return folder


def changed(**places: object) -> dict[str, object]:
    now = copy.deepcopy(THEN)
    for place, value in places.items():
        *parents, last = place.split("__")
        target = now
        for parent in parents:
            target = target[parent]
        target[last] = value
    return now


def test_the_same_run_goes_on_without_a_word(interrupted, capsys):
    resume.claim(interrupted, THEN, "sft.yaml")
    assert capsys.readouterr().err == ""
    assert (interrupted / "checkpoint-1").exists()


ALLOWED = {
    "tracking": (changed(config__tracking=["tensorboard"]), "tracking was [] and is ['tensorboard']"),
    "log_steps": (changed(config__train__log_steps=5), "train.log_steps was 1 and is 5"),
    "folder": (changed(config__output_dir="/b"), "output_dir was '/a' and is '/b'"),
    "threads": (changed(machine__threads=8), "threads was 2 and is 8"),
    "a name of the base": (changed(base__id="./here"), "base.id was 'org/name' and is './here'"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cannot_break_the_equality_is_said(interrupted, capsys, name):
    now, said = ALLOWED[name]
    resume.claim(interrupted, now, "sft.yaml")
    assert capsys.readouterr().err == f"  going on with changes: {said}\n"
    resume.claim(interrupted, now, "sft.yaml")  # compared with the run as it went on
    assert capsys.readouterr().err == ""


def test_files_that_were_renamed_hold_the_same_rows(interrupted):
    moved = {"train /e/a.jsonl": "11", "train /e/b.jsonl": "22", "validation /e/v.jsonl": "33"}
    resume.claim(interrupted, changed(rows=moved), "sft.yaml")


REFUSED = {
    "a rate": (changed(config__train__learning_rate=0.2), "train.learning_rate was 0.1 and is 0.2"),
    "a section": (changed(config__adapter={"method": "lora"}), "adapter was None and is {'method': 'lora'}"),
    "a key of tomorrow": (changed(config__train__new=1), "train.new was None and is 1"),
    "other rows": (
        changed(**{"rows__train /d/b.jsonl": "99"}),
        "the rows of train was ['11', '22'] and is ['11', '99']",
    ),
    "rows in another order": (
        changed(rows={"train /d/b.jsonl": "22", "train /d/a.jsonl": "11", "validation /d/v.jsonl": "33"}),
        "['11', '22'] and is ['22', '11']",
    ),
    "other weights": (changed(base__sha256="0"), "base.sha256 was '44' and is '0'"),
    "processes": (changed(machine__processes=2), "processes was 1 and is 2"),
    "device": (changed(machine__device="cuda"), "device was 'cpu' and is 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_and_named(interrupted, name):
    now, said = REFUSED[name]
    with pytest.raises(ConfigError, match="To go on, undo that") as told:
        resume.claim(interrupted, now, "sft.yaml", other_versions=True)
    assert said in str(told.value)
    assert json.loads((interrupted / "run.json").read_text()) == THEN


def test_other_libraries_are_refused_unless_asked_for(interrupted, capsys):
    now = changed(versions__torch="2.14.0")
    with pytest.raises(ConfigError, match=r"torch was '2\.13\.0' and is '2\.14\.0'.*--other-versions"):
        resume.claim(interrupted, now, "sft.yaml")
    resume.claim(interrupted, now, "sft.yaml", other_versions=True)
    assert "going on with changes: torch was '2.13.0' and is '2.14.0'" in capsys.readouterr().err


def test_every_key_that_may_change_is_one_of_the_run_file():
    known = {f"config.{key}" for key in keys_of(SftConfig)}
    named = {key for key in resume.MAY_CHANGE if key.startswith("config.")}
    assert named <= known


def test_clearing_that_is_cut_short_leaves_nothing_that_counts(interrupted, monkeypatch):
    """Killed while it deletes: no checkpoint is sealed any more, and the note still says whose folder it is."""

    def killed(path, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(resume.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        resume.clear(interrupted)
    assert not checkpoints.begun(interrupted)
    monkeypatch.undo()
    resume.claim(interrupted, THEN, "sft.yaml")
    assert [path.name for path in interrupted.iterdir()] == ["run.json"]


def test_a_folder_of_the_user_is_refused_and_kept(tmp_path):
    mine = tmp_path / "checkpoints" / "checkpoint-500" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(ConfigError, match="holds files that are not this tool's"):
        resume.claim(tmp_path / "checkpoints", THEN, "sft.yaml")
    resume.clear(tmp_path / "checkpoints")
    assert mine.read_text() == "precious"
