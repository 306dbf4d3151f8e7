"""A signal at any instant of a run: what is written, how the command ends, and that the resumed run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune import artifact, config
from llmtune.errors import Preempted
from llmtune.interruption import Interruption
from llmtune.stages import sft
from llmtune.training import checkpoints, rows, setup
from llmtune.training.trainer import SupervisedTrainer

RUN = """
stage: sft
model: {{name: {model}, dtype: float32, device: cpu}}
data: {{train: ./train.jsonl, validation: ./validation.jsonl}}
adapter: {{method: lora, r: 4, target_modules: all-linear, lora_dropout: 0.2}}
train: {{max_steps: 7, batch_size: 8, micro_batch_size: 2, learning_rate: 1e-2, eval_steps: 3}}
output_dir: ./{name}
"""


def write_rows(folder: Path) -> None:
    for split, number in (("train", 16), ("validation", 6)):
        turns = [
            [
                {"role": "user", "content": f"{split} {i} plus {i}?"},
                {"role": "assistant", "content": f"{2 * i}" + "!" * i},
            ]
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path):
    """`run(name)`: a run of 7 steps of 4 micro batches, 2 steps an epoch, validated in 3 batches after steps 3, 6 and 7."""
    write_rows(tmp_path)

    def start(name: str, *overrides: str) -> artifact.Artifact:
        (tmp_path / "sft.yaml").write_text(RUN.format(model=tiny_folder, name=name))
        return sft.run(config.load(tmp_path / "sft.yaml", list(overrides)), tmp_path / "sft.yaml")

    return start


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_folder: Path) -> artifact.Artifact:
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder)
    (folder / "sft.yaml").write_text(RUN.format(model=tiny_folder, name="whole"))
    return sft.run(config.load(folder / "sft.yaml"))


def weights(made: artifact.Artifact) -> dict[str, torch.Tensor]:
    return load_file(next(made.path.glob("*.safetensors")))


def logged(made: artifact.Artifact) -> list[tuple[int, float | None, float | None]]:
    lines = map(json.loads, (made.path / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]


def interrupting(patch: pytest.MonkeyPatch, owner: type, method: str, call: int, number: int) -> None:
    """Send this process a signal in call `call` of a method."""
    original, calls = getattr(owner, method), iter(range(1, 10_000))

    def interrupted(self, *arguments, **settings):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **settings)

    patch.setattr(owner, method, interrupted)


INSTANTS = {  # method, its call in which the signal comes, and the newest checkpoint after that
    "in the first step": ("training_step", 2, None),
    "in the last micro batch of a step": ("training_step", 8, 2),
    "between two micro batches": ("training_step", 22, 5),
    "in the first micro batch of an epoch": ("training_step", 17, 4),
    "in the first micro batch of a step": ("training_step", 21, 5),
    "in a validation": ("prediction_step", 5, 6),
    "in the validation after the last step": ("prediction_step", 8, 7),
    "while a checkpoint is written": ("_save_rng_state", 2, 6),
    "while the last checkpoint is written": ("_save_rng_state", 3, 7),
    "between two steps": ("_maybe_log_save_evaluate", 7, 5),  # the epoch's end counts, too
    "while the best weights are taken back": ("_load_best_model", 1, 7),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_signal_at_any_instant_and_the_run_ends_as_if_nothing_had_been(
    run, uninterrupted, tmp_path, instant, monkeypatch
):
    whole = uninterrupted
    method, call, step = INSTANTS[instant]
    with monkeypatch.context() as patched:
        interrupting(patched, SupervisedTrainer, method, call, signal.SIGTERM)
        with pytest.raises(Preempted, match=f"stopped at step {step}" if step else "nothing new to save"):
            run("cut")
    folder = tmp_path / "cut" / "checkpoints"
    newest = checkpoints.last_complete(folder)
    assert (newest and newest.name) == (f"checkpoint-{step}" if step else None)
    resumed = run("cut")
    before, after = weights(whole), weights(resumed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert logged(resumed) == logged(whole)
    same = ("steps", "train_loss", "validation_loss", "best_step", "tokens")
    assert [whole.manifest["metrics"][key] for key in same] == [resumed.manifest["metrics"][key] for key in same]


def test_a_run_stopped_in_every_step_comes_to_the_same_end(run, uninterrupted, monkeypatch):
    whole = uninterrupted
    for _ in range(10):
        with monkeypatch.context() as patched:
            interrupting(patched, SupervisedTrainer, "training_step", 6, signal.SIGUSR1)
            try:
                resumed = run("cut")
                break
            except Preempted:
                continue
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    assert logged(resumed) == logged(whole)


def test_a_moved_run_goes_on_with_the_best_checkpoint_it_had(run, tmp_path, monkeypatch):
    """transformers notes the best checkpoint by its absolute path, and forgets it without a word when that is gone."""
    evaluate = SupervisedTrainer.evaluation_loop

    def worse_and_worse(self, *arguments, **settings):
        output = evaluate(self, *arguments, **settings)
        output.metrics["eval_loss"] = float(self.state.global_step)
        return output

    monkeypatch.setattr(SupervisedTrainer, "evaluation_loop", worse_and_worse)
    whole = run("whole")
    assert whole.manifest["metrics"]["best_step"] == 3
    with monkeypatch.context() as patched:
        interrupting(patched, SupervisedTrainer, "training_step", 18, signal.SIGTERM)
        with pytest.raises(Preempted):
            run("cut")
    (tmp_path / "cut").rename(tmp_path / "moved")
    resumed = run("moved")
    assert resumed.manifest["metrics"]["best_step"] == 3
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_what_cannot_change_a_weight_may_change_and_is_said(run, uninterrupted, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupting(patched, SupervisedTrainer, "training_step", 18, signal.SIGTERM)
        with pytest.raises(Preempted):
            run("cut")
    (tmp_path / "train.jsonl").rename(tmp_path / "same.jsonl")
    (tmp_path / "cut").rename(tmp_path / "moved")
    capsys.readouterr()
    resumed = run("moved", f"data.train={tmp_path / 'same.jsonl'}", "train.log_steps=3")
    said = capsys.readouterr().err
    assert "train.log_steps was 1 and is 3" in said
    assert f"data.train was '{tmp_path / 'train.jsonl'}' and is '{tmp_path / 'same.jsonl'}'" in said
    assert f"output_dir was '{tmp_path / 'cut'}' and is '{tmp_path / 'moved'}'" in said
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(uninterrupted).items())
    assert [step for step, loss, _ in logged(resumed) if loss is not None] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)])
@pytest.mark.parametrize(
    ("owner", "function"), [(rows, "encode_splits"), (setup, "build_model")], ids=["rows", "model"]
)
def test_before_training_a_signal_ends_the_run_at_once(
    run, tmp_path, monkeypatch, capsys, owner, function, number, raised
):
    def interrupted(*_):
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    monkeypatch.setattr(owner, function, interrupted)
    with pytest.raises(raised) as told:
        run("cut")
    assert "nothing new to save" in str(told.value) + capsys.readouterr().err
    assert not list((tmp_path / "cut").glob("**/checkpoint-*"))
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_second_signal_ends_the_block_at_once(capsys):
    def twice() -> None:
        with Interruption() as stop, stop.gently():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert "once more to stop at once" in capsys.readouterr().err


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with Interruption() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGUSR2, before)
