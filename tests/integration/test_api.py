"""Through the ten lines of docs/api.md: the same run as by the command."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_files(tmp_path, tiny_folder, chat_rows):
    """sft.yaml and eval.yaml for the tiny model, in the working directory of the test."""
    chat_rows(tmp_path, 8)
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    train = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2}
    raw = {"stage": "sft", "model": {"name": str(tiny_folder), "dtype": "float32"}, "data": {"train": "./train.jsonl"}}
    raw |= {"adapter": adapter, "train": train, "output_dir": "./run"}
    (tmp_path / "sft.yaml").write_text(json.dumps(raw))
    items = [{"id": str(n), "prompt": f"say {n}", "answer": f"it is {n}"} for n in range(24)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    suite = {"suite": "own", "description": "own", "licence": "own", "items": "./items.jsonl", "metrics": ["loss"]}
    (tmp_path / "own.yaml").write_text(json.dumps({**suite, "gate": {"loss": {"margin": 9.0}}}))
    (tmp_path / "eval.yaml").write_text(json.dumps({"stage": "eval", "run": "./run", "suites": ["./own.yaml"]}))
    return tmp_path


def test_the_lines_of_the_api_page_run(run_files, monkeypatch, capsys):
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(run_files)
    names = {}
    exec(block, names)
    assert capsys.readouterr().out.startswith("PASS ")
    assert names["page"].read_text(encoding="utf-8").startswith("<!doctype html>")
