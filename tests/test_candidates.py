"""Merging an adapter that was trained on a quantised base: into which plain base, how far from what was evaluated, and when not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtune import artifact, config
from llmtune.cli import deploy
from llmtune.errors import ConfigError, ProofError
from llmtune.export import candidates, merge, proof
from llmtune.model import load, quantised
from llmtune.stages import sft

pytest.importorskip("bitsandbytes")
FULL, WRITTEN_OUT = "full-precision base", "dequantised base"


def train(where: Path, base: Path, kind: str | None, dtype: str) -> Path:
    """A short run with held-out rows enough for a proof; its folder."""
    where.mkdir()
    for split, number, most in (("train", 32, 500), ("validation", 24, 99)):
        rows = [
            [{"role": "user", "content": f"take {i} from {most}"}, {"role": "assistant", "content": str(most - i)}]
            for i in range(number)
        ]
        (where / f"{split}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    raw = {
        "stage": "sft",
        "model": {"name": str(base), "dtype": dtype} | ({"quantize": kind} if kind else {}),
        "data": {"train": "./train.jsonl", "validation": "./validation.jsonl"},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "eval_steps": 6},
        "output_dir": "./run",
    }
    return sft.run(config.build(raw, where / "sft.yaml")).path.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("runs")
    kinds = {"nf4": "bfloat16", "int8": "float32"}
    return {kind: train(where / kind, tiny_folder, kind, dtype) for kind, dtype in kinds.items()}


@pytest.fixture
def run(runs, tmp_path):
    """`run(kind)`: the finished run, in a folder that nothing was merged in yet."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(runs[kind], tmp_path / kind))

    return copy


def prefer(monkeypatch, name: str) -> None:
    """Make held-out loss speak for one base, whatever it says."""

    def losses(choose):
        def spoken(base, adapter, dtype, probes, measured):
            order = iter(each.name for each in candidates.of(base, dtype))
            return choose(
                base,
                adapter,
                dtype,
                probes,
                lambda model: [1.0 + (next_ != name) + i / 100 for next_ in [next(order)] for i in range(24)],
            )

        return spoken

    monkeypatch.setattr(candidates, "choose", losses(candidates.choose))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_run_is_merged_into_a_plain_base_with_every_figure(run, kind, capsys) -> None:
    folder = run(kind)
    made = merge.run(folder)
    facts = artifact.read(made.path).manifest
    bases, found = facts["bases"], facts["proof"]
    assert bases["losses"].keys() == {FULL, WRITTEN_OUT} and bases["taken"] in bases["losses"]
    assert bases["difference"] == pytest.approx(bases["losses"][FULL] - bases["losses"][WRITTEN_OUT])
    assert bases["interval"][0] <= bases["difference"] <= bases["interval"][1]
    assert found["algebra"]["holds"] and found["storage"]["holds"] and found["distance"]["holds"]
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())
    assert {type(module).__name__ for module in load.load_model(load.find(str(made.path))).modules()} & {
        "Linear4bit",
        "Linear8bitLt",
    } == set()
    deploy._say_bases(bases, found["distance"])
    said = capsys.readouterr().err
    assert f"merged into the {bases['taken']}" in said and f"{bases['losses'][FULL]:.4f} on the {FULL}" in said


def test_the_dequantised_base_is_the_evaluated_one_and_merging_into_it_keeps_it(run, monkeypatch) -> None:
    prefer(monkeypatch, WRITTEN_OUT)
    facts = merge.run(run("nf4"), "float32").manifest
    assert facts["bases"]["taken"] == WRITTEN_OUT
    assert facts["bases"]["dequantised_kl"] == 0.0  # in 4 bits to the last digit
    assert facts["proof"]["distance"]["kl"] < 1e-4  # what is left is the bfloat16 of the evaluation


def test_the_full_precision_base_is_taken_where_it_is_better(run, monkeypatch) -> None:
    prefer(monkeypatch, FULL)
    monkeypatch.setattr(proof, "distance", lambda evaluated, stored: proof.Distance(0, 0, 0, 0, 1, True))
    facts = merge.run(run("nf4")).manifest
    assert facts["bases"]["taken"] == FULL
    assert facts["bases"]["difference"] == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("losses", "taken"), [((-0.02, 0.0), FULL), ((-0.5, 0.45), WRITTEN_OUT), ((0.1, 0.1), WRITTEN_OUT)]
)
def test_a_lower_mean_is_not_enough(run, monkeypatch, losses, taken) -> None:
    """Lower by 0.025 on average and 0.5 worse on every other row: nobody knows."""
    adapter = artifact.finished_run(run("nf4"))
    base = load.find_again(adapter.manifest["base"])
    measured = iter([[2.0 + losses[i % 2] for i in range(24)], [2.0] * 24])
    chosen, facts = candidates.choose(base, adapter, "bfloat16", [[1, 2, 3]], lambda model: next(measured))
    assert chosen.name == facts["taken"] == taken


def test_a_dequantised_base_that_is_another_model_is_noticed(run, monkeypatch) -> None:
    whole = quantised.dequantised

    def spoiled(model, dtype):
        plain = whole(model, dtype)
        plain.model.layers[0].mlp.up_proj.weight.data.neg_()
        return plain

    folder = run("nf4")
    monkeypatch.setattr(quantised, "dequantised", spoiled)
    with pytest.raises(ProofError, match=r"dequantised, it is another model than quantised \(nf4\): KL"):
        merge.run(folder)
    assert not (folder / "merged").exists()


def test_what_is_worse_than_what_was_evaluated_is_not_written(run, monkeypatch) -> None:
    whole, folder = proof.distance, run("nf4")

    def worse(evaluated, stored):
        return whole(evaluated, proof.Readings(stored.logits, [loss + 0.02 for loss in evaluated.losses]))

    monkeypatch.setattr(proof, "distance", worse)
    with pytest.raises(
        ProofError, match=r"distance: held-out loss .* worse by up to 0\.02.*serve the adapter on its base"
    ):
        merge.run(folder)
    assert not (folder / "merged").exists()


def test_a_base_that_came_quantised_has_one_candidate(tiny_folder, tmp_path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    load.load_model(load.find(str(tiny_folder), quantize="nf4"), "bfloat16", "cpu").save_pretrained(tmp_path / "base")
    facts = merge.run(train(tmp_path / "on-disk", tmp_path / "base", None, "auto")).manifest
    assert facts["bases"]["losses"].keys() == {WRITTEN_OUT} and "difference" not in facts["bases"]
    assert facts["proof"]["distance"]["holds"]


def test_what_transformers_cannot_dequantise_is_said() -> None:
    class Gptq:
        config = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
        hf_quantizer = SimpleNamespace(pre_quantized=True)

        def dequantize(self, dtype):
            raise NotImplementedError

    with pytest.raises(ConfigError, match=r"cannot dequantise gptq weights.*serve the adapter on its base"):
        quantised.dequantised(Gptq(), torch.float32)
