"""The command line in this process, and a run file for the tiny model."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmtune.cli import main

RUN_FILE = """\
stage: sft
model: {{name: {model}, device: cpu, dtype: float32}}
data: {{train: ./train.jsonl}}
adapter: {{method: lora, r: 2, target_modules: all-linear}}
train: {{max_steps: 2, batch_size: 4, micro_batch_size: 4, learning_rate: 1e-3}}
output_dir: ./run
"""


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What follows `llmtune: `, which stands there once and without a traceback."""
        assert "Traceback" not in self.err
        assert sum(line.startswith("llmtune: ") for line in self.err.splitlines()) == 1, self.err
        return self.err[self.err.index("llmtune: ") + len("llmtune: ") :]


@pytest.fixture
def llmtune(capsys, monkeypatch):
    """`llmtune("sft", file)`: the command in this process, under a copy of the environment."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def run_file(tmp_path, tiny_folder, chat_rows) -> Path:
    chat_rows(tmp_path, 8)
    file = tmp_path / "sft.yaml"
    file.write_text(RUN_FILE.format(model=tiny_folder), encoding="utf-8")
    return file
