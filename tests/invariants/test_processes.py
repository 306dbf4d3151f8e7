"""Several processes train what one trains, stop together, and say once what went wrong.

Each run of two takes about 15 s, most of it imports, so a run shows several things.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
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
    asked = [{"id": str(n), "prompt": f"How do I {'do ' * n}it?"} for n in range(21)]  # does not come out even either
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    suite = {"suite": "asked", "description": "made here", "licence": "own", "items": "./asked.jsonl"}
    (tmp_path / "asked.yaml").write_text(json.dumps(suite | {"metrics": ["refusal_margin"]}))

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


def start(
    *words: object,
    launcher: tuple[str, ...] = (),
    module: str = "llmtune",
    before: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    """`python LAUNCHER -m llmtune WORDS`, in a process group of its own."""
    python = [*before, sys.executable, *launcher, "-m", module, *map(str, words)]
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


def process_of(rank: int, parent: subprocess.Popen[str]) -> int:
    """The id of the process with this rank under `parent`."""
    for child in psutil.Process(parent.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return int(child.pid)
    raise LookupError(rank)


def wait_for_step(step: int, run: Path, parent: subprocess.Popen[str]) -> None:
    file = run / "checkpoints" / "metrics.jsonl"
    while not file.exists() or f'"step": {step},' not in file.read_text():
        if parent.poll() is not None:
            pytest.fail(finish(parent).err)
        time.sleep(0.01)


def told(run: Path) -> dict[str, object]:
    return json.loads((run / "exit.json").read_text())


def same(one: Path, two: Path) -> bool:
    before, after = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, two))
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_two_processes_train_what_one_trains(run_file, tmp_path: Path, packing: bool) -> None:
    """Losses, validation, margins, tokens and the best step; under accelerate's launcher, from the shipped configuration."""
    file = run_file(refusal_watch={"suite": "./asked.yaml", "items": 21, "every_steps": 4, "max_drop": 1000.0})
    words = ["data.packing=true", "data.max_length=96", "train.micro_batch_size=1"] if packing else []
    words += ["train.batch_size=4"] if packing else []
    one = sft.run(config.load(file, [*words, "output_dir=" + str(tmp_path / "one")]), file)
    shipped = ("--config_file", str(ROOT / "configs" / "accelerate" / "cpu_two_processes.yaml"))
    done = finish(start("sft", file, *words, launcher=("-m", "accelerate.commands.launch", *shipped)))
    assert done.code == 0, done.err
    assert done.err.count("step 10: validation loss") == 1
    assert done.err.count(f"train: {ROWS} rows") == 1
    two = artifact.read(tmp_path / "run" / "adapter")
    for key in ("loss", "validation_loss", "grad_norm"):
        assert of(two.path, key) == pytest.approx(of(one.path, key), abs=TOLERANCE * (10 if key == "grad_norm" else 1))
    assert len(of(one.path, "refusal_margin")) == 6
    assert of(two.path, "refusal_margin") == pytest.approx(of(one.path, "refusal_margin"), abs=1e-4)
    assert of(two.path, "tokens") == of(one.path, "tokens")
    assert two.manifest["processes"] == 2
    keys = ("steps", "best_step", "tokens", "trainable_parameters")
    assert [two.manifest["metrics"][key] for key in keys] == [one.manifest["metrics"][key] for key in keys]
    before, after = (load_file(made.path / "adapter_model.safetensors") for made in (one, two))
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]  # no lock, no note, no checkpoint


def test_a_signal_to_one_stops_both_and_the_resumed_run_is_the_whole_one_to_the_bit(run_file, tmp_path: Path) -> None:
    file = run_file(dropout=0.2, max_steps=200, eval_steps=100)
    whole = finish(start("sft", file, f"output_dir={tmp_path / 'whole'}", "--processes", 2))
    assert whole.code == 0, whole.err
    running = start("sft", file, "--processes", 2)
    wait_for_step(1, tmp_path / "run", running)
    second = process_of(1, running)
    wait_for_step(5, tmp_path / "run", running)
    os.kill(second, signal.SIGTERM)
    stopped = finish(running)
    assert stopped.code == 75, stopped.err
    assert stopped.message.startswith("stopped at step ") and told(tmp_path / "run")["code"] == 75
    assert not (tmp_path / "run" / "adapter").exists()
    resumed = finish(start("sft", file, "--processes", 2))
    assert resumed.code == 0 and "resuming from checkpoint-" in resumed.err
    assert same(tmp_path / "whole", tmp_path / "run")
    assert of(tmp_path / "run" / "adapter", "loss") == of(tmp_path / "whole" / "adapter", "loss")
    assert not (tmp_path / "run" / "exit.json").exists()


def test_both_end_when_the_refusal_margin_drops(run_file, tmp_path: Path) -> None:
    watch = {"suite": "./asked.yaml", "items": 21, "every_steps": 1, "max_drop": 0.01}
    done = finish(start("sft", run_file(refusal_watch=watch, max_steps=200, eval_steps=100), "--processes", "2"))
    assert done.code == 1
    assert "the refusal margin on 21 prompts" in done.message
    assert told(tmp_path / "run")["code"] == 1
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_process_that_is_killed_ends_the_other_within_a_minute(run_file, tmp_path: Path) -> None:
    running = start("sft", run_file(max_steps=100_000, eval_steps=10_000), "--processes", 2)
    wait_for_step(3, tmp_path / "run", running)
    os.kill(process_of(1, running), signal.SIGKILL)
    began = time.monotonic()
    done = finish(running, 60)
    assert time.monotonic() - began < 60
    assert done.code == 1
    assert done.message.startswith("process 1 of 2 was ended by SIGKILL; the kernel does that when memory runs out")
    assert told(tmp_path / "run") == {"code": 1, "message": done.message, "rank": 1}


def test_a_process_that_hangs_is_given_up(run_file, tmp_path: Path) -> None:
    running = start("sft", run_file(max_steps=100_000, eval_steps=10_000), "--processes", 2, LLMTUNE_TIMEOUT_S="8")
    wait_for_step(3, tmp_path / "run", running)
    os.kill(process_of(1, running), signal.SIGSTOP)
    done = finish(running, 60)
    assert done.code == 1
    assert done.message.startswith("another process of this run did not answer for 8 s")
    assert told(tmp_path / "run")["rank"] == 0


def test_bad_rows_are_told_once_whoever_launched(run_file, tmp_path: Path) -> None:
    file = run_file()
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write('{"messages": [{"role": "user", "content": "and then?"}]}\n')
    done = finish(start("sft", file, "--processes", 2))
    assert done.code == 2
    assert done.message.endswith("train.jsonl:22: has no answer")
    assert told(tmp_path / "run")["code"] == 2
    before = (tmp_path / "run" / "exit.json").stat().st_mtime_ns
    done = finish(start("sft", file, launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2")))
    assert done.code == 1  # torchrun's own
    assert done.err.count("train.jsonl:22: has no answer") == 1
    assert told(tmp_path / "run")["code"] == 2 and (tmp_path / "run" / "exit.json").stat().st_mtime_ns > before
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")] == ["exit.json"]


def test_fsdp_shards_and_its_adapter_is_whole(run_file, tmp_path: Path, tiny_folder: Path) -> None:
    """From the shipped configuration, the adapter that one process trains; plain PEFT loads it in one process."""
    words = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "ACCELERATE_TORCH_DEVICE": "cpu"}
    spread(run_file(), tmp_path, tiny_folder, "fsdp2.yaml", "fsdp_on_cpu", words)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: docs/launch.md")
def test_zero_3_shards_and_its_adapter_is_whole(run_file, tmp_path: Path, tiny_folder: Path) -> None:
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        pytest.skip("TORCH_EXTENSIONS_DIR names no folder with DeepSpeed's compiled part: docs/launch.md")
    spread(run_file(), tmp_path, tiny_folder, "deepspeed_zero3.yaml", "llmtune", {"DS_ACCELERATOR": "cpu"})


def spread(file: Path, folder: Path, base: Path, shipped: str, module: str, words: dict[str, str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    one = sft.run(config.load(file, ["output_dir=" + str(folder / "one")]), file)
    launcher = ("--config_file", str(ROOT / "configs" / "accelerate" / shipped), "--num_processes", "2")
    done = finish(start("sft", file, launcher=("-m", "accelerate.commands.launch", *launcher), module=module, **words))
    assert done.code == 0, done.err
    made = artifact.read(folder / "run" / "adapter")
    for key in ("loss", "validation_loss"):
        assert of(made.path, key) == pytest.approx(of(one.path, key), abs=TOLERANCE)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (one.path, made.path))
    assert {name: weight.shape for name, weight in before.items()} == {name: w.shape for name, w in after.items()}
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.path)
    assert sum("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters()) == 14


def namespace(name: str, *words: str) -> list[str]:
    return ["ip", "netns", "exec", name, *words]


@pytest.fixture
def two_machines():
    """Two network namespaces joined by a cable: each a machine of its own to everything that speaks over the network."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    made = subprocess.run(["ip", "netns", "add", "llmtune-a"], check=False, capture_output=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.decode()}")
    try:
        for words in (
            "ip netns add llmtune-b",
            "ip link add cable-a netns llmtune-a type veth peer name cable-b netns llmtune-b",
            *(
                f"ip -n llmtune-{side} {what}"
                for side, number in (("a", 1), ("b", 2))
                for what in (
                    "link set lo up",
                    f"addr add 10.77.0.{number}/24 dev cable-{side}",
                    f"link set cable-{side} up",
                )
            ),
        ):
            subprocess.run(words.split(), check=True)
        yield
    finally:
        for side in "ab":
            subprocess.run(["ip", "netns", "delete", f"llmtune-{side}"], check=False, capture_output=True)


def test_two_machines_train_what_one_process_trains(run_file, tmp_path: Path, two_machines) -> None:
    """Each has an output folder of its own; the first alone writes the result."""
    file = run_file()
    one = sft.run(config.load(file, ["output_dir=" + str(tmp_path / "one")]), file)
    running = []
    for rank, side in enumerate("ab"):
        rendezvous = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29500", "--rdzv_id", "test")
        host = ("--rdzv_conf", f"is_host={int(not rank)}", "--local_addr", f"10.77.0.{rank + 1}")
        launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *rendezvous, *host)
        running.append(
            start(
                "sft",
                file,
                f"output_dir={tmp_path / side}",
                launcher=launcher,
                before=namespace(f"llmtune-{side}"),
                GLOO_SOCKET_IFNAME=f"cable-{side}",
            )
        )
    ended = [finish(process) for process in running]
    assert [done.code for done in ended] == [0, 0], "\n".join(done.err for done in ended)
    first = artifact.read(tmp_path / "a" / "adapter")
    for key in ("loss", "validation_loss"):
        assert of(first.path, key) == pytest.approx(of(one.path, key), abs=TOLERANCE)
    assert not (tmp_path / "b" / "adapter").exists()
