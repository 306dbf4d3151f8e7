"""Several processes train what one trains, stop together, and say once what went wrong.

Each run of two takes about 15 s, most of it imports, so a run shows several things.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune import artifact, config
from llmtune.stages import sft

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

ROOT = Path(__file__).resolve().parents[2]
STEPS, TOLERANCE = 10, 1e-6
"""Losses over so many steps agree within this in float32 without dropout."""
ROWS, VALIDATION = 21, 5  # neither comes out even: not by 2 x 2 rows a micro step, and not by 8 rows a step


@pytest.fixture
def run_file(tmp_path: Path, tiny_folder: Path):
    """`run_file(**train)` writes a run file with these settings on top of a small float32 LoRA run; returns its path."""
    for split, number in (("train", ROWS), ("validation", VALIDATION)):
        turns = [(f"{split} {i} plus {i}?", str(2 * i) + "!" * i) for i in range(number)]
        rows = [
            {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]}
            for ask, say in turns
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(dropout: float = 0.0, **train: object) -> Path:
        adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": dropout}
        settings = {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2, "eval_steps": 2}
        raw = {
            "stage": "sft",
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
            "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
            "adapter": adapter,
            "train": {**settings, **train},
            "output_dir": "./run",
        }
        (tmp_path / "sft.yaml").write_text(json.dumps(raw))
        return tmp_path / "sft.yaml"

    return write


@dataclass
class Done:
    code: int
    err: str

    @property
    def message(self) -> str:
        """What follows `llmtune: `, which stands there once and without a traceback."""
        assert "Traceback" not in self.err, self.err
        assert sum(line.startswith("llmtune: ") for line in self.err.splitlines()) == 1, self.err
        return self.err[self.err.index("llmtune: ") + len("llmtune: ") :].strip()


def start(*words: object, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """`python LAUNCHER -m llmtune WORDS`, in a process group of its own."""
    python = [sys.executable, *launcher, "-m", "llmtune", *map(str, words)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    return subprocess.Popen(
        python,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 180) -> Done:
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        pytest.fail(f"did not end within {seconds} s:\n{err}")
    return Done(process.returncode, err)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def of(run: Path, key: str) -> list[float]:
    return [line[key] for line in lines(run) if key in line]


def test_two_processes_train_what_one_trains(run_file, tmp_path: Path) -> None:
    """Losses, validation, tokens and the best step; under accelerate's launcher, from the shipped configuration."""
    file = run_file()
    one = sft.run(config.load(file, ["output_dir=" + str(tmp_path / "one")]), file)
    shipped = ("--config_file", str(ROOT / "configs" / "accelerate" / "cpu_two_processes.yaml"))
    done = finish(start("sft", file, launcher=("-m", "accelerate.commands.launch", *shipped)))
    assert done.code == 0, done.err
    assert done.err.count("training rows") <= 1 and done.err.count("step 10: validation loss") == 1
    two = artifact.read(tmp_path / "run" / "adapter")
    for key in ("loss", "validation_loss", "grad_norm"):
        assert of(two.path, key) == pytest.approx(of(one.path, key), abs=TOLERANCE * (10 if key == "grad_norm" else 1))
    assert of(two.path, "tokens") == of(one.path, "tokens")
    assert two.manifest["processes"] == 2
    same = ("steps", "best_step", "tokens", "trainable_parameters")
    assert [two.manifest["metrics"][key] for key in same] == [one.manifest["metrics"][key] for key in same]
    before, after = (load_file(made.path / "adapter_model.safetensors") for made in (one, two))
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]  # no lock, no note, no checkpoint
