"""`llmtune sft --seeds N`: each seed its own run, finished ones kept, and the spread as it is worked out by hand."""

import json

import pytest
from safetensors.torch import load_file

from llmtune.cli import main, seeds


def one(validation: float | None, train: float = 1.0) -> dict:
    return {"steps": 4, "best_step": 4, "train_loss": train, "validation_loss": validation, "tokens_per_s": 1.0}


def test_the_spread_by_hand():
    found = seeds.summarise({5: one(2.0), 6: one(2.6), 7: one(2.3)})
    spread = found["spread"]["validation_loss"]
    assert (spread["mean"], spread["lowest"], spread["highest"]) == (pytest.approx(2.3), 2.0, 2.6)
    assert spread["standard_deviation"] == pytest.approx(0.3)  # n - 1
    assert found["median"] == 7
    assert seeds.summarise({0: one(None, 1.0), 1: one(None, 0.5)})["median"] == 1
    text = seeds.render(found, "runs/x")
    assert "mean 2.3000, standard deviation 0.3000, from 2.0000 to 2.6000 over 3 seeds" in text
    assert "the median run is runs/x/seed-7" in text
    assert "One seed is not a recipe" in text


@pytest.fixture
def command(tmp_path, tiny_folder, chat_rows, capsys):
    """`command("--seeds", 2)`: `llmtune sft` on a small run, its exit code, stdout and stderr."""
    chat_rows(tmp_path, 16)
    held_out = chat_rows(tmp_path, 20, "all.jsonl").read_text().splitlines()[16:]
    (tmp_path / "val.jsonl").write_text("\n".join(held_out) + "\n")
    (tmp_path / "sft.yaml").write_text(
        f"stage: sft\nmodel: {{name: {tiny_folder}, device: cpu, dtype: float32}}\n"
        "data: {train: ./train.jsonl, validation: ./val.jsonl}\n"
        "adapter: {method: lora, r: 2, target_modules: all-linear}\n"
        "train: {max_steps: 2, batch_size: 4, micro_batch_size: 4, learning_rate: 1e-2, seed: 3}\noutput_dir: ./run\n"
    )

    def run(*words: object):
        capsys.readouterr()
        code = main(["sft", str(tmp_path / "sft.yaml"), *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_seeds_are_trained_once_and_differ(command, tmp_path):
    code, out, err = command("--seeds", 2, "--json")
    assert code == 0
    found = json.loads(out)
    assert found == json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert [entry["seed"] for entry in found["seeds"]] == [3, 4]
    first, second = (
        load_file(tmp_path / "run" / f"seed-{n}" / "adapter" / "adapter_model.safetensors") for n in (3, 4)
    )
    assert any(not first[name].equal(second[name]) for name in first)
    assert found["spread"]["validation_loss"]["standard_deviation"] > 0

    written = (tmp_path / "run" / "seed-3" / "adapter" / "llmtune.json").read_bytes()
    code, out, err = command("--seeds", 3)
    assert (code, out) == (0, f"{tmp_path / 'run' / 'seeds.json'}\n")
    assert "seed 3: finished already" in err
    assert (tmp_path / "run" / "seed-3" / "adapter" / "llmtune.json").read_bytes() == written
    assert (tmp_path / "run" / "seed-5" / "adapter").is_dir()

    code, _, err = command("--seeds", 3, "train.learning_rate=1e-3")
    assert code == 2
    assert "was trained with other settings (train); choose another output_dir" in err


def test_seeds_of_two_phases_are_trained_once(command, tmp_path):
    words = ["--seeds", 2, "second_phase={trainable: {norms: true}, max_steps: 1}", "train.max_steps=1"]
    assert command(*words)[0] == 0
    assert (tmp_path / "run" / "seed-4" / "model").is_dir()
    code, _, err = command(*words)
    assert code == 0
    assert "seed 3: finished already" in err and "seed 4: finished already" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", 1], "--seeds 1 shows no spread"),
        (["--seeds", 2, "--processes", 2], "--seeds trains in one process"),
        (["--json"], "--json goes with --seeds"),
    ],
)
def test_what_does_not_go_together(command, words, said):
    code, _, err = command(*words)
    assert code == 2
    assert said in err
