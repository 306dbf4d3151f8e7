"""`llmtune runs`: every run in a folder is listed, whatever state it is in, and two are told apart by what differs."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from llmtune import artifact, config, runs
from llmtune.errors import ArtifactError, Preempted, UserError

CONFIG = {
    "stage": "sft",
    "model": {"name": "/base"},
    "data": {"train": "/train.jsonl"},
    "adapter": {"method": "lora", "r": 4},
    "train": {"epochs": 1.0, "learning_rate": 2e-4, "seed": 0},
}


@pytest.fixture
def finished(tmp_path):
    """`finished("runs/first", learning_rate=1e-3, loss=2.0)`: a finished run, written as a stage writes it."""

    def write(name: str, loss: float = 2.0, adapter: dict | None = CONFIG["adapter"], sha: str = "a", **train) -> Path:
        settings = {**CONFIG, "train": CONFIG["train"] | train, "output_dir": str(tmp_path / name), "adapter": adapter}
        split = {"sources": [{"path": "/train.jsonl", "sha256": sha}], "rows": 8, "tokens": 100}
        folder = tmp_path / name / ("adapter" if adapter else "model")
        with artifact.writing(folder, "adapter" if adapter else "model") as draft:
            (draft.path / "adapter_model.safetensors").write_bytes(b"weights")
            draft.facts.update(
                config={key: value for key, value in settings.items() if value is not None},
                base={"id": "/models/base", "sha256": "b"},
                data={"train": split, "validation": None, "batches": {"padding": 0.1}},
                metrics={
                    "steps": 10,
                    "train_loss": 1.5,
                    "validation_loss": loss,
                    "tokens_per_s": 310.4,
                    "peak_memory_gb": 1.25,
                },
            )
        return tmp_path / name

    return write


def dated(run: Path, day: int) -> None:
    """Set the day on which the run was finished."""
    file = next(run.glob("*/llmtune.json"))
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"created": f"2026-01-{day:02d}T12:00:00+00:00"}))


def test_finished_runs_newest_first_at_any_depth(finished, tmp_path):
    for day, name in ((1, "runs/old"), (3, "runs/new"), (2, "runs/deep/seed-0")):
        dated(finished(name), day)
    with artifact.writing(tmp_path / "runs" / "new" / "verdict", "verdict") as draft:
        draft.facts["verdict"] = "PASS"
    found = runs.find(tmp_path / "runs")
    assert [run.run for run in found] == ["new", "deep/seed-0", "old"]
    assert [run.verdict for run in found] == ["PASS", None, None]
    new = found[0].model_dump()
    expected = {"state": "finished", "stage": "sft", "method": "lora", "base": "/models/base", "rows": 8, "steps": 10}
    assert expected.items() <= new.items()
    assert (new["validation_loss"], new["tokens_per_s"], new["peak_memory_gb"]) == (2.0, 310.4, 1.25)
    head, first, *_ = runs.render_list(found).splitlines()
    assert head.split("  ")[0] == "run"
    assert first.split() == ["new", "sft", "lora", "base", "8", "10", "2.0000", "310", "1.25", "2026-01-03", "12:00", "PASS"]  # fmt: skip
    assert [run.run for run in runs.find(tmp_path / "runs" / "old")] == ["old"]  # a run itself may be named


def test_a_whole_model_is_listed_as_full(finished, tmp_path):
    finished("runs/whole", adapter=None)
    assert [(run.method, run.state) for run in runs.find(tmp_path / "runs")] == [("full", "finished")]


BROKEN = {
    "a file was cut": (lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"w"), "adapter_model.safetensors is missing or was changed"),
    "no manifest": (lambda run: (run / "adapter" / "llmtune.json").unlink(), "llmtune.json: is missing"),
    "not JSON": (lambda run: (run / "adapter" / "llmtune.json").write_text("{"), "cannot be read"),
    "a list": (lambda run: (run / "adapter" / "llmtune.json").write_text("[]"), "not a JSON object"),
    "of something else": (lambda run: (run / "adapter" / "llmtune.json").write_text('{"files": {}}'), "not a manifest of a run"),
    "a figure is a word": (lambda run: _edit(run, '"validation_loss": 2.0', '"validation_loss": "low"'), "not what llmtune writes"),
    "rows are a list": (lambda run: _edit(run, '"data": {', '"data": {"train": [], "x": {'), "cannot be read"),
    "bytes": (lambda run: (run / "adapter" / "llmtune.json").write_bytes(b"\xff\xfe"), "cannot be read"),
}  # fmt: skip


def _edit(run: Path, old: str, new: str) -> None:
    file = run / "adapter" / "llmtune.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_named_and_hides_no_other(finished, tmp_path, name):
    spoil, said = BROKEN[name]
    spoil(finished("runs/bad"))
    finished("runs/good")
    found = {run.run: run for run in runs.find(tmp_path / "runs")}
    assert (found["good"].state, found["bad"].state) == ("finished", "broken")
    assert said in found["bad"].problem
    assert f"broken: {found['bad'].problem}" in runs.render_list(list(found.values()))
    with pytest.raises(ArtifactError):
        runs.diff(tmp_path / "runs" / "bad", tmp_path / "runs" / "good")


def test_an_empty_folder_and_none_at_all(tmp_path):
    assert runs.find(tmp_path) == []
    assert runs.render_list([]) == "no runs here; 'llmtune sft CONFIG' makes one\n"
    with pytest.raises(UserError, match="no such folder; 'llmtune runs DIR'"):
        runs.find(tmp_path / "nowhere")


def test_a_diff_names_what_differs_and_shows_metrics_side_by_side(finished, tmp_path):
    first, second = (
        finished("runs/a"),
        finished("runs/b", loss=1.75, learning_rate=1e-3, sha="z", group_by_length=False),
    )
    found = runs.diff(first, second)
    assert found["config"] == {"train.learning_rate": (2e-4, 1e-3), "train.group_by_length": (None, False)}
    assert found["base"] == {}
    assert found["data"] == {"train.sources./train.jsonl": ("a", "z")}
    assert found["environment"] == {}
    assert found["metrics"]["validation_loss"] == (2.0, 1.75)
    assert found["metrics"]["steps"] == (10, 10)
    text = runs.render_diff(first, second, found)
    assert "base: the same" in text
    assert next(line for line in text.splitlines() if "validation_loss" in line).split() == [
        "validation_loss",
        "2",
        "1.75",
        "-0.25",
    ]


def test_a_diff_wants_two_runs(finished, tmp_path):
    first = finished("runs/first")
    with pytest.raises(ArtifactError, match=r"no such folder; did you mean 'first'\?"):
        runs.diff(first, tmp_path / "runs" / "frist")
    with pytest.raises(ArtifactError, match="holds no run"):
        runs.diff(first, tmp_path / "runs")


@pytest.fixture
def stopped(tmp_path, tiny_folder, chat_rows, monkeypatch):
    """A real run, stopped by SIGTERM at step 2 of 4."""
    from llmtune.stages import sft
    from llmtune.training import callbacks

    chat_rows(tmp_path)
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
        "data": {"train": "./train.jsonl"},
        "adapter": {"method": "lora", "r": 2, "target_modules": "all-linear"},
        "train": {"max_steps": 4, "batch_size": 4, "micro_batch_size": 4},
        "output_dir": "./runs/stopped",
    }

    def terminate(self, args, state, control, **_):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(callbacks.ProgressDisplay, "on_step_end", terminate)
    with pytest.raises(Preempted):
        sft.run(config.build(raw, tmp_path / "sft.yaml"))
    return tmp_path / "runs" / "stopped"


def test_an_unfinished_run_says_how_far_it_got(stopped, finished, tmp_path):
    (run,) = runs.find(tmp_path / "runs")
    assert (run.state, run.method, run.steps, run.total_steps) == ("unfinished", "lora", 2, 4)
    line = runs.render_list([run]).splitlines()[1]
    assert "2 of 4" in line
    assert line.endswith("unfinished")
    found = runs.diff(stopped, finished("runs/done"))
    assert found["config"]["train.max_steps"] == (4, None)
    assert found["metrics"]["steps"] == (2, 10)

    half = stopped / "checkpoints" / "checkpoint-3"  # half-written: the one before it counts
    shutil.copytree(stopped / "checkpoints" / "checkpoint-2", half)
    (half / "trainer_state.json").write_text('{"global_')
    assert runs.find(stopped)[0].steps == 2
    (stopped / "checkpoints" / "run.json").write_text("")
    assert [run.state for run in runs.find(stopped)] == ["broken"]
