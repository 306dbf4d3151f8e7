"""What is compared is what it says: the base arm is the base, the merged model is its adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import tuned_run
from safetensors.torch import load_file, save_file

from llmtune import artifact, config, gate, scores
from llmtune.data.chats import load_chats
from llmtune.data.tokens import TokenRow, encode_chat, encode_prompt
from llmtune.errors import ArtifactError, ConfigError, LlmtuneError, ProofError
from llmtune.evaluate import observations, suites
from llmtune.evaluate.observations import Store
from llmtune.export import merge
from llmtune.model import infer, load
from llmtune.stages import sft

SUITE = """
suite: sums
description: sums
licence: own
items: ./items.jsonl
metrics: [loss, rouge_l, answer_tokens]
max_new_tokens: 6
few_shot: true
gate:
  loss: {improves_by: 0.0}
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder: Path) -> Path:
    """A finished run on the tiny model, with a suite beside it."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} plus {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(24)
    ]
    for name, part in (("train", rows[:12]), ("validation", rows[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    items = [{"id": f"i{i}", "prompt": f"{i} plus one?", "answer": f"It is {i + 1}."} for i in range(30)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "sums.yaml").write_text(SUITE)
    tuned_run.tune(folder, tiny_folder, 30, validation="./validation.jsonl")
    return folder


def evaluate(folder: Path, **changes: object) -> artifact.Artifact:
    usual = {"suites": ["./sums.yaml"], "batch_size": 7}
    return tuned_run.evaluate(folder, **usual | changes)


def test_the_base_arm_is_the_base_freshly_loaded(tuned: Path, tiny_folder: Path) -> None:
    made = evaluate(tuned, few_shot={"examples": "./train.jsonl", "k": 2})
    records = scores.read(made.path / scores.FILE)
    source = load.find(str(tiny_folder))
    tokenizer, model = load.load_tokenizer(source), load.load_model(source, "float32")
    for index, chat in enumerate(load_chats(str(tuned / "items.jsonl"), columns=suites.ITEM_COLUMNS, training=False)):
        row, prompt = encode_chat(tokenizer, chat.turns), encode_prompt(tokenizer, chat.prompt)
        expected = infer.token_losses(model, [TokenRow(row.input_ids, row.labels)], tokenizer.pad_token_id)[0]
        said = infer.generate(model, tokenizer, [prompt], 6, 1)[0].text
        mine = {record.metric: record for record in records if record.arm == "base" and record.item_id == f"i{index}"}
        assert mine["loss"].value == pytest.approx(expected, abs=1e-5)
        assert mine["rouge_l"].response == said
    arms_seen = {record.arm for record in records}
    assert arms_seen == {"base", "base + 2 examples", "tuned"}
    tuned_loss = [record.value for record in records if (record.arm, record.metric) == ("tuned", "loss")]
    base_loss = [record.value for record in records if (record.arm, record.metric) == ("base", "loss")]
    assert sum(tuned_loss) < sum(base_loss)
    verdict = gate.read(gate.run(made.path, tuned / "verdict"))
    assert verdict.verdict == "PASS"
    assert verdict.subject["sha256"] == artifact.read(tuned / "run" / "adapter").sha256


def numbers(made: artifact.Artifact) -> list[tuple[object, ...]]:
    records = scores.read(made.path / scores.FILE)
    return [(r.arm, r.metric, r.item_id, r.value, r.response, r.prompt_sha256) for r in records]


def test_an_evaluation_goes_on_with_the_batch_it_was_at(tuned: Path, monkeypatch) -> None:
    whole = numbers(evaluate(tuned))
    put, kept = Store.put, []

    def killed(store, unit, observed):
        if len(kept) == 8:  # in the tuned arm: base has one unit of losses and five of answers
            raise KeyboardInterrupt
        kept.append(unit)
        put(store, unit, observed)

    monkeypatch.setattr(Store, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tuned)
    (left,) = (tuned / "run" / ".scores-parts").glob("*.jsonl")
    text = left.read_text(encoding="utf-8")
    left.write_text(text[:-100], encoding="utf-8")  # and the last line was cut short
    monkeypatch.setattr(Store, "put", lambda *given: (kept.append(given[1]), put(*given)))
    assert numbers(evaluate(tuned)) == whole
    assert len(kept) == 8 + 5
    assert len(set(kept)) == 12, "only the unit that was cut short was done twice"
    assert not (tuned / "run" / ".scores-parts").exists()


def test_two_evaluations_at_once_are_refused(tuned: Path) -> None:
    with (
        observations.alone(tuned / "run" / ".scores-parts", "x"),
        pytest.raises(ConfigError, match="another evaluation"),
    ):
        evaluate(tuned)
    evaluate(tuned)


def test_the_merged_model_is_evaluated_in_place_of_its_adapter(tuned: Path) -> None:
    made = artifact.finished_run(tuned / "run")
    if not artifact.complete(tuned / "run" / "merged"):
        merge.run(tuned / "run")
    measured = evaluate(tuned, tuned="./run/merged", output_dir="./shipped")
    assert measured.manifest["subject"]["sha256"] == artifact.read(tuned / "run" / "merged").sha256
    theirs, mine = (
        {(r.metric, r.item_id): r.value for r in scores.read(m.path / scores.FILE) if r.arm == "tuned"}
        for m in (evaluate(tuned), measured)
    )
    losses = [key for key in mine if key[0] == "loss"]
    assert [mine[key] for key in losses] == pytest.approx([theirs[key] for key in losses], abs=1e-4)
    assert made.sha256 != measured.manifest["subject"]["sha256"]


def test_an_adapter_without_effect_is_noticed(tuned: Path, tmp_path: Path) -> None:
    adapter = artifact.read(tuned / "run" / "adapter")
    with artifact.writing(tmp_path / "run" / "adapter", "adapter") as draft:
        draft.facts.update(
            {key: adapter.manifest[key] for key in ("base", "config", "data", "metrics", "template_sha256")}
        )
        for file in adapter.path.iterdir():
            if file.name not in {"llmtune.json", "adapter_model.safetensors"}:
                (draft.path / file.name).write_bytes(file.read_bytes())
        zero = {
            k: v * 0 if "lora_B" in k else v for k, v in load_file(adapter.path / "adapter_model.safetensors").items()
        }
        save_file(zero, draft.path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmtuneError, match="the adapter had no effect"):
        evaluate(tuned, run=str(tmp_path / "run"))


def test_an_adapter_for_another_base_is_refused(tuned: Path, tiny_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(load, "find", lambda name, find=load.find, **_: _another(find(name)))
    with pytest.raises(ArtifactError, match="was trained on"):
        evaluate(tuned)


def test_a_lily_adapter_is_not_scored(tuned: Path, monkeypatch) -> None:
    made = artifact.finished_run(tuned / "run")
    config_of_run = {**made.manifest["config"], "adapter": {"method": "lily"}}
    lily = dataclasses.replace(made, manifest={**made.manifest, "config": config_of_run})
    monkeypatch.setattr(artifact, "finished_run", lambda _: lily)
    with pytest.raises(ConfigError, match="lily mixes its experts by the mean over a batch"):
        evaluate(tuned)


def _another(source: load.Source) -> load.Source:
    return dataclasses.replace(source, sha256="0" * 64)


def test_a_merge_is_proven_from_disk(tuned: Path) -> None:
    shutil.rmtree(tuned / "run" / "merged", ignore_errors=True)
    made = merge.run(tuned / "run")
    proof = made.manifest["proof"]
    assert proof["algebra"]["holds"] and proof["storage"]["holds"]
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "model.safetensors"} <= {
        f.name for f in made.path.iterdir()
    }
    stored = load.load_model(load.find(str(made.path)), "float32")
    rows = [[1, 2, 3, 4, 5]]
    from llmtune.model import adapters

    base = load.find(made.manifest["base"]["id"])
    live = adapters.attach(load.load_model(base, "float32"), base, artifact.read(tuned / "run" / "adapter"))
    with torch.inference_mode():
        difference = (
            (stored(input_ids=torch.tensor(rows)).logits - live(input_ids=torch.tensor(rows)).logits).abs().max()
        )
    assert difference < 5e-4
    with pytest.raises(ArtifactError, match="finished already"):
        merge.run(tuned / "run")


@pytest.mark.parametrize(
    ("spoil", "message"), [("algebra", "algebra: logits differ"), ("stored", "tensors: model.layers.0")]
)
def test_a_merge_that_differs_is_not_written(
    tuned: Path, tmp_path: Path, monkeypatch, spoil: str, message: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(tuned / "run" / "adapter")
    whole = merge.merge_into_base if spoil == "algebra" else merge._shared_once

    def spoiled(model, *rest):
        made = whole(model, *rest)
        tensors = dict(made.named_parameters()) if spoil == "algebra" else made
        with torch.no_grad():
            tensors["model.layers.0.self_attn.q_proj.weight"] += 0.05
        return made

    monkeypatch.setattr(merge, whole.__name__, spoiled)
    with pytest.raises(ProofError, match=message):
        merge.run(run)
    assert [path.name for path in run.iterdir()] == ["adapter"]


def test_what_cannot_be_merged_says_why(tuned: Path, tmp_path: Path, tiny_folder: Path) -> None:
    raw = {
        "stage": "sft",
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {"train": str(tuned / "train.jsonl")},
        "adapter": {"method": "prompt_tuning", "num_virtual_tokens": 4},
        "train": {"max_steps": 2, "learning_rate": 1e-2},
        "output_dir": "./prompt",
    }
    sft.run(config.build(raw, tmp_path / "sft.yaml"))
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge.run(tmp_path / "prompt")


def test_a_chat_template_changed_after_training_is_noticed(tuned: Path, monkeypatch) -> None:
    changed = dataclasses.replace
    monkeypatch.setattr(load, "find", lambda name, find=load.find, **_: changed(find(name), words_sha256="0" * 64))
    with pytest.raises(ArtifactError, match="tokenizer or chat template was changed"):
        evaluate(tuned)


def test_a_float32_adapter_on_a_bfloat16_base_stays_float32(tuned: Path) -> None:
    from llmtune.model import adapters

    made = artifact.read(tuned / "run" / "adapter")
    base = load.find_again(made.manifest["base"])
    model = adapters.attach(load.load_model(base, "bfloat16"), base, made)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_a_suite_that_stands_twice_is_refused(tuned: Path) -> None:
    with pytest.raises(ConfigError, match="'sums' stands twice"):
        evaluate(tuned, suites=["./sums.yaml", "./sums.yaml"])
