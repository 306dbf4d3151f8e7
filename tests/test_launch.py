"""Launches that would not train what the run file says are refused before anything is loaded, and failures are told once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtune import ranks
from llmtune.config.train import TrainConfig, require_divisible
from llmtune.errors import ConfigError, DataError, LlmtuneError, Stopped
from llmtune.interruption import Interruption
from llmtune.training import callbacks, group, rows
from llmtune.training.trainer import LengthBuckets


@pytest.fixture
def environment(monkeypatch):
    """`environment(WORLD_SIZE="2")`: what a launcher sets, on top of an environment without one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}

    def launched(**words: str) -> None:
        monkeypatch.setattr(os, "environ", {**clean, **words})

    return launched


def launch(device: str = "auto") -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(device=device))


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}


@pytest.mark.parametrize(
    ("words", "gpus", "said"),
    [
        ({}, 2, "torch sees 2 GPUs, and one process trains on one; add '--processes 2'"),
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            2,
            "4 processes were launched on this machine.*launch at most 2",
        ),
        ({"WORLD_SIZE": "2", **SHARDED}, 0, "on a CPU accelerate trains with plain copies"),
        ({"WORLD_SIZE": "2", **SHARDED, "FSDP_VERSION": "1"}, 2, "set fsdp_version to 2"),
        ({"WORLD_SIZE": "2", **SHARDED, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, 2, "fsdp_state_dict_type: SHARDED"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 0, "sets mixed_precision to bf16, .* set it to 'no' there"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, 0, "sets dynamo_backend to inductor"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, 2, "for parallelism_config"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, 2, "asks for megatron_lm"),
    ],
)
def test_a_launch_that_trains_something_else_is_refused(environment, monkeypatch, words, gpus, said):
    environment(**words)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=said):
        group.check(launch(), "sft.yaml")


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 2), ("auto", 0), ("cuda", 2)])
def test_other_launches_are_not(environment, monkeypatch, device, gpus):
    environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="NO")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    group.check(launch(device), "sft.yaml")


def test_what_accelerate_does_not_do_is_noticed(environment):
    environment(**SHARDED)
    plain = SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_CPU"))
    with pytest.raises(ConfigError, match="FSDP is asked for, and accelerate would train with MULTI_CPU"):
        group.check_in_effect(plain, "sft.yaml")
    environment()
    group.check_in_effect(plain, "sft.yaml")


def test_processes_share_a_batch_evenly():
    train = TrainConfig(epochs=1, batch_size=8, micro_batch_size=4)
    require_divisible(train, 2, "sft.yaml")
    with pytest.raises(ConfigError, match=r"\(4\) x 4 processes; use 16, or a micro_batch_size of 2"):
        require_divisible(train, 4, "sft.yaml")
    with pytest.raises(ConfigError, match=r"8 is not a multiple of micro_batch_size \(4\) x 3 processes; use 12$"):
        require_divisible(train, 3, "sft.yaml")


def test_the_same_rows_meet_in_a_step_and_blanks_come_last():
    lengths = [3, 1, 2, 9, 8, 7, 5]
    alone, evened = (list(LengthBuckets(lengths, 4, seed=1, blanks=blanks)) for blanks in (0, 1))
    assert evened == [*alone, 7]


def test_rows_are_evened_with_blank_ones():
    import datasets

    real = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6], [7]] * 3, "labels": [[-100, 6], [7]] * 3, "length": [2, 1] * 3}
    )
    assert rows.evened(real, 1) is real and rows.evened(real, 3) is real
    evened = rows.evened(real, 4)
    assert len(evened) == 8
    assert evened[7] == {"input_ids": [5], "labels": [-100], "length": 1}


# ---- who speaks


def test_the_first_error_is_kept_and_the_others_keep_quiet(environment, tmp_path: Path):
    environment(LOCAL_RANK="0", RANK="0", WORLD_SIZE="2")
    with pytest.raises(DataError, match="row 3"), ranks.telling(tmp_path / "run"):
        raise DataError("a.jsonl", "row 3 has no answer")
    kept = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert kept == {"code": 2, "message": "a.jsonl: row 3 has no answer", "rank": 0}
    environment(LOCAL_RANK="1", RANK="1", WORLD_SIZE="2")
    with pytest.raises(ranks.ToldElsewhere) as told, ranks.telling(tmp_path / "run"):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert told.value.code == 1
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == kept


def test_a_lost_connection_and_a_silence_are_named(environment, tmp_path: Path):
    environment(LOCAL_RANK="0", WORLD_SIZE="2", LLMTUNE_TIMEOUT_S="9")
    for words, said in (
        ("Connection reset by peer", ranks.LOST),
        ("Timed out waiting 9000ms for recv", "for 9 s: it hangs"),
    ):
        with pytest.raises(LlmtuneError, match=said.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
            with ranks.telling(tmp_path / words[:5]):
                raise RuntimeError(words)


def test_an_exit_of_an_earlier_launch_is_cleared_and_one_of_this_launch_stays(environment, tmp_path: Path):
    environment(LOCAL_RANK="0", WORLD_SIZE="2")
    file = tmp_path / "exit.json"
    ranks.note(tmp_path, 1, "now", 0)
    ranks.clear(tmp_path)
    assert file.exists()
    os.utime(file, (1, 1))
    ranks.clear(tmp_path)
    assert not file.exists()
    ranks.note(tmp_path, 1, "an attempt before this one", 1)
    with ranks.telling(tmp_path):
        pass
    assert not file.exists()


def test_a_plain_command_leaves_no_exit_file(environment, tmp_path: Path):
    environment()
    with pytest.raises(DataError), ranks.telling(tmp_path):
        raise DataError("a.jsonl", "row 3 has no answer")
    assert list(tmp_path.iterdir()) == []


def test_a_timeout_is_a_number_of_seconds(environment):
    environment(LLMTUNE_TIMEOUT_S="soon")
    with pytest.raises(ConfigError, match="LLMTUNE_TIMEOUT_S: 'soon' is not a positive number of seconds"):
        ranks.timeout_s()


def test_a_signal_during_the_exchange_is_not_lost(monkeypatch):
    """Where a process waits for the others most of its time is where most signals come."""
    stop = Interruption()
    callback = callbacks.StopOnSignal(stop)

    def exchanged(value: float) -> float:
        stop.received = signal.SIGTERM
        return value

    monkeypatch.setattr(callbacks.group, "largest", exchanged)
    callback.check()
    with pytest.raises(Stopped):
        callback.check()
