"""A small run that is killed at random instants until it is finished, compared with one that is not. Its own process:

    python tests/killing.py FOLDER --kills 6 --seed 0

The parent loads the libraries and computes nothing; each life of a run is a child forked from it, so that it costs a second and
not ten. Prints one JSON object: how many kills there were over how many runs, and everything that was not as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny

from llmtune import cli
from llmtune.stages import sft
from llmtune.training import checkpoints

RUN = """
stage: sft
model: {{name: {folder}/base, dtype: float32, device: cpu}}
data: {{train: ./train.jsonl, validation: ./validation.jsonl}}
adapter: {{method: lora, r: 4, target_modules: all-linear, lora_dropout: 0.2}}
train: {{max_steps: 9, batch_size: 8, micro_batch_size: 2, learning_rate: 1e-2, eval_steps: 2}}
output_dir: ./run
"""


def write_run(folder: Path) -> Path:
    tiny.save(folder / "base")
    for split, number in (("train", 20), ("validation", 6)):
        turns = [
            [{"role": "user", "content": f"{split} {i}?"}, {"role": "assistant", "content": f"{i}" + "!" * i}]
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    (folder / "sft.yaml").write_text(RUN.format(folder=folder))
    return folder / "sft.yaml"


def live(file: Path, output: Path, seconds: float | None) -> int | None:
    """One life of a run: its exit code, or None when it was killed after `seconds`."""
    child = os.fork()
    if child == 0:
        log = os.open(output.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        with contextlib.suppress(BaseException):
            code = cli.main(["sft", str(file), f"output_dir={output}"])
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # of a child that has ended nothing is left to kill
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def result(output: Path) -> tuple[bytes, list[tuple[object, ...]]]:
    lines = map(json.loads, (output / "adapter" / "metrics.jsonl").read_text().splitlines())
    logged = [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]
    return (output / "adapter" / "adapter_model.safetensors").read_bytes(), logged


def damaged(output: Path) -> list[str]:
    """Sealed checkpoints that are not whole."""
    folder = output / "checkpoints"
    found = {path.parent.name: checkpoints.damage(path.parent) for path in folder.glob(f"*/{checkpoints.SEAL}")}
    return [f"{name}: {wrong}" for name, wrong in found.items() if wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder, draw = asked.folder.resolve(), random.Random(asked.seed)
    assert sft.run  # loaded here once, for all children
    folder.mkdir(parents=True, exist_ok=True)
    file = write_run(folder)
    began = time.monotonic()
    assert live(file, folder / "whole", None) == 0, (folder / "log").read_text()
    life_s = time.monotonic() - began
    expected, wrong, kills, runs, resumed = result(folder / "whole"), [], 0, 0, 0
    while kills < asked.kills:
        output, runs = folder / f"run-{runs}", runs + 1
        code = None
        while code is None:
            left = asked.kills - kills
            code = live(file, output, draw.uniform(0, life_s) if left > 0 else None)
            kills += code is None
            wrong += damaged(output)
            resumed += code is None and checkpoints.begun(output / "checkpoints")
        if code == 2:  # killed after the result was there: the next life says so
            code = 0 if (output / "adapter").is_dir() else 2
        if code or result(output) != expected:
            wrong.append(f"{output.name}: exit code {code}, or another result")
        if left_over := sorted(path.name for path in output.iterdir() if path.name not in ("adapter", ".llmtune.lock")):
            wrong.append(f"{output.name}: leaves {left_over}")
    print(json.dumps({"kills": kills, "runs": runs, "with_checkpoint": resumed, "wrong": wrong}))


if __name__ == "__main__":
    sys.exit(main())
