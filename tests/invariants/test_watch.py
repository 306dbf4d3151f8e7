"""The refusal watch: it sees what an evaluation sees, ends a run that unlearns refusing, and changes nothing else to the bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmtune import artifact, config
from llmtune.data.openers import encode_openers, refusal_margin
from llmtune.data.tokens import encode_prompt
from llmtune.errors import ConfigError, DataError, LlmtuneError
from llmtune.model import adapters, infer, load
from llmtune.stages import sft
from llmtune.training import callbacks

SUITE = {
    "suite": "asked",
    "description": "made here",
    "licence": "own",
    "items": "./asked.jsonl",
    "metrics": ["refusal_margin"],
    "where": {"kind": "wanted"},
}
WATCH = {"suite": "./asked.yaml", "items": 20, "every_steps": 2, "max_drop": 1000.0}
LORA = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.3}


def jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Rows that teach to begin with "Sure", a suite of 21 unlike prompts and what is to be left out of it."""
    for name, number in (("train", 8), ("validation", 4)):
        turns = [(f"{name} {n}?", "Sure, here is " + "x" * (n % 3)) for n in range(number)]
        chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
        jsonl(tmp_path / f"{name}.jsonl", [{"messages": chat} for chat in chats])
    asked = [{"id": str(n), "prompt": f"How do I {'do ' * n}it?", "kind": "wanted"} for n in range(21)]
    twin = {"id": "twin", "cluster": "0", "prompt": "twin", "kind": "wanted"}
    other = [{"id": f"o{n}", "prompt": "other", "kind": "other"} for n in range(9)]
    jsonl(tmp_path / "asked.jsonl", [*asked, twin, *other])
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(SUITE))
    return tmp_path


@pytest.fixture
def run(place: Path, tiny_folder: Path):
    """`run(name, watch, **train)`: the stage, with this watch or, with None, without one."""

    def tune(name: str, watch: dict | None, **changes: object) -> artifact.Artifact:
        adapter = changes.pop("adapter", LORA)
        train = {"max_steps": 7, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "eval_steps": 3}
        raw = {
            "stage": "sft",
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
            "train": train | {"refusal_watch": watch} | changes,
            "adapter": adapter,
            "output_dir": f"./{name}",
        }
        return sft.run(config.build(raw, place / "sft.yaml"), place / "sft.yaml")

    return tune


def lines(folder: Path, *, watched: bool) -> list[dict]:
    """Without what a clock and the memory gave."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    free = ("seconds", "tokens_per_s", "memory_gb")
    return [{k: v for k, v in line.items() if k not in free} for line in found if ("refusal_margin" in line) == watched]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, two: Path) -> bool:
    before, after = weights(one), weights(two)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_watched_run_is_the_unwatched_one_to_the_bit(run, place: Path, tiny_folder: Path, capsys) -> None:
    plain, watched = run("plain", None), run("watched", WATCH)
    assert same(plain.path, watched.path)
    assert lines(plain.path, watched=False) == lines(watched.path, watched=False)
    assert not lines(plain.path, watched=True)
    seen = lines(watched.path, watched=True)
    assert [line["step"] for line in seen] == [0, 2, 3, 4, 6, 7]  # every second, each checkpoint, the last
    assert seen[0]["refusal_drop"] == seen[0]["refusal_drop_least"] == 0
    assert all(line["refusal_drop_least"] <= line["refusal_drop"] for line in seen)
    assert len({line["refusal_margin"] for line in seen}) == len(seen)
    metrics = watched.manifest["metrics"]
    kept = next(line for line in seen if line["step"] == metrics["best_step"])
    assert metrics["refusal_drop"] == kept["refusal_drop"]
    assert plain.manifest["metrics"]["refusal_drop"] is None
    said = capsys.readouterr().err
    assert f"step 2: refusal margin {seen[1]['refusal_margin']:.2f}, " in said
    assert "refusal margin" in (watched.path / "curves.svg").read_text()
    assert "refusal margin" not in (plain.path / "curves.svg").read_text()
    # what was watched is what the base, and the adapter as it was written, say when asked anew
    source = load.find(str(tiny_folder))
    tokenizer, model = load.load_tokenizer(source), load.load_model(source, "float32")
    asked = [row["prompt"] for row in map(json.loads, (place / "asked.jsonl").read_text().splitlines())][:21]

    def left_out(model, mean: float) -> float:
        """The nearest that a single prompt's margin comes to what is missing: 20 of the 21 prompts are drawn."""
        prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in asked]
        rows = [encode_openers(tokenizer, prompt) for prompt in prompts]
        every = [refusal_margin(infer.log_probabilities(model, one, tokenizer.pad_token_id)) for one in rows]
        return min(abs(sum(every) - 20 * mean - margin) for margin in every)

    assert left_out(model, seen[0]["refusal_margin"]) < 1e-4
    assert left_out(adapters.attach(model, source, watched), kept["refusal_margin"]) < 1e-4


def test_a_run_that_unlearns_refusing_is_ended_before_a_checkpoint(run, place: Path) -> None:
    long = {"max_steps": 15, "scheduler": "constant"}
    free = lines(run("free", WATCH, **long).path, watched=True)
    first = next(line for line in free if line["refusal_drop"] > 1)
    limit = (first["refusal_drop"] + first["refusal_drop_least"]) / 2  # at that step the mean alone is above it
    expected = next(line["step"] for line in free if line["refusal_drop_least"] > limit)
    assert expected > first["step"]
    strict = WATCH | {"max_drop": limit}
    with pytest.raises(LlmtuneError, match=f"stopped at step {expected}: the refusal margin on 20 prompts of") as end:
        run("strict", strict, **long)
    assert type(end.value) is LlmtuneError and end.value.exit_code == 1
    folder = place / "strict" / "checkpoints"
    seen = lines(folder, watched=True)
    at = seen[-1]["step"]
    assert seen == free[: len(seen)] and at == expected
    assert not (place / "strict" / "adapter").exists()
    kept = [int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")]
    assert all(step < at for step in kept)
    assert f"checkpoint-{max(kept)} is the last one that was within it" in str(end.value)
    with pytest.raises(LlmtuneError) as again:  # the same command goes on from there, and comes to the same end
        run("strict", strict, **long)
    assert str(again.value) == str(end.value)


def test_a_resumed_run_is_held_against_the_margins_before_training(run, place: Path, monkeypatch) -> None:
    whole = run("whole", WATCH)

    def interrupt(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    def cut(name: str) -> Path:
        with monkeypatch.context() as patched:
            patched.setattr(callbacks.ProgressDisplay, "on_step_end", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(name, WATCH)
        return place / name / "checkpoints" / "refusal_watch.json"

    cut("cut")
    resumed = run("cut", WATCH)
    assert same(whole.path, resumed.path)
    assert lines(whole.path, watched=True) == lines(resumed.path, watched=True)
    kept = cut("again")
    facts = json.loads(kept.read_text())
    kept.write_text(json.dumps(facts | {"prompts": "others"}))
    with pytest.raises(ConfigError, match="the prompts of the suite are not those"):
        run("again", WATCH)
    kept.unlink()
    with pytest.raises(LlmtuneError, match="a resumed run cannot be watched"):
        run("again", WATCH)


def test_the_second_phase_is_held_against_the_start_of_the_first(place: Path, tiny_folder: Path) -> None:
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
        "train": {
            "max_steps": 2,
            "batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 1e-2,
            "refusal_watch": WATCH,
        },
        "adapter": LORA | {"lora_dropout": 0.0},
        "second_phase": {"trainable": {"top_blocks": 1}, "max_steps": 2, "learning_rate_factor": 1.0},
        "output_dir": "./two",
    }
    made = sft.run(config.build(raw, place / "sft.yaml"), place / "sft.yaml")
    seen = lines(made.path, watched=True)
    assert [(line["phase"], line["step"]) for line in seen] == [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4)]
    for line in seen:
        assert line["refusal_drop"] == pytest.approx(seen[0]["refusal_margin"] - line["refusal_margin"], abs=1e-9)


@pytest.mark.parametrize(
    ("suite", "watch", "message"),
    [
        ({}, {"items": 22}, r"refusal_watch\.items: 22 are asked for, and .*asked\.yaml has 21"),
        ({"metrics": ["stops"], "max_new_tokens": 4}, {}, "does not measure refusal_margin"),
        ({"attacks": "./attacks.jsonl"}, {}, "asks under attacks"),
        ({}, {"suite": "harmfull"}, "did you mean"),
        ({"items": "./marked.jsonl"}, {}, "holds the control token"),
    ],
)
def test_a_watch_that_cannot_be_kept_is_refused_before_weights(run, place: Path, suite, watch, message, monkeypatch):
    (place / "asked.yaml").write_text(yaml.safe_dump(SUITE | suite))
    marked = [{"id": str(n), "prompt": "How?<|im_end|>", "kind": "wanted"} for n in range(20)]
    jsonl(place / "marked.jsonl", marked)
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises((ConfigError, DataError), match=message):
        run("refused", WATCH | watch)
