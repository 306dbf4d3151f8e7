"""Every probe measures what its name says, whoever answers, in one process or two, interrupted or not."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import tuned_run
import yaml

from llmtune import artifact, config, gate, scores
from llmtune.cli import main
from llmtune.data.openers import COMPLIANCE_OPENERS, REFUSAL_OPENERS
from llmtune.data.tokens import encode_prompt
from llmtune.errors import ArtifactError, ConfigError, DataError
from llmtune.evaluate import measure, metrics, observations, subjects
from llmtune.evaluate.metrics import _tool_call_valid, probabilities
from llmtune.evaluate.observations import Observation
from llmtune.evaluate.scoring import AGAIN, noise_floor
from llmtune.evaluate.suites import Item, Suite, load_suite
from llmtune.model import load

HEAD = {"description": "made here", "licence": "own"}
SUITES = {
    "asked": {
        "items": "./asked.jsonl",
        "metrics": ["complied", "incoherent", "refusal_margin", "stops", "repetition"],
        "max_new_tokens": 4,
        "attacks": "./attacks.jsonl",
        "slices": ["kind", "length"],
        "gate": {"incoherent": {"margin": 0.5}},
    },
    "chosen": {"items": "./chosen.jsonl", "metrics": ["acc", "brier", "nll"], "gate": {"nll": {"margin": 9.0}}},
    "tasks": {"lm_eval": ["llmtune_reasoning", "llmtune_code"], "limit": 20, "gate": {"acc": {"margin": 0.9}}},
    "plain": {"items": "./plain.jsonl", "metrics": ["text_loss"], "gate": {"text_loss": {"margin": 9.0}}},
}
ATTACKS = [{"id": "plain", "template": "{prompt}"}, {"id": "sure", "prefill": "Sure, "}]


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder: Path) -> Path:
    """A finished run on the tiny model, and a suite of every probe beside it."""
    folder = tmp_path_factory.mktemp("measuring")
    turns = [(f"{i} plus {i}?", f"It is {2 * i}.") for i in range(12)]
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    (folder / "train.jsonl").write_text(lines(rows))
    asked = [{"id": f"a{i}", "prompt": "How? " * (i + 1), "kind": "odd" if i % 2 else "even"} for i in range(22)]
    (folder / "asked.jsonl").write_text(lines(asked))
    (folder / "attacks.jsonl").write_text(lines(ATTACKS))
    chosen = [
        {"id": f"c{i}", "prompt": f"{i}?", "choices": ["It is", "No", f"{i}"], "answer": i % 3} for i in range(24)
    ]
    (folder / "chosen.jsonl").write_text(lines(chosen))
    (folder / "plain.jsonl").write_text(
        lines([{"id": f"p{i}", "text": f"Plain words, {i} of them."} for i in range(24)])
    )
    for name, suite in SUITES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"suite": name, **HEAD, **suite}))
    tuned_run.tune(folder, tiny_folder, 10)
    return folder


def evaluate(folder: Path, **changes: object) -> artifact.Artifact:
    usual = {"suites": [f"./{name}.yaml" for name in SUITES], "batch_size": 5}
    return tuned_run.evaluate(folder, **usual | changes)


def test_each_probe_is_what_the_model_itself_says(folder: Path, tiny_folder: Path) -> None:
    made = evaluate(folder, noise_floor=True)
    source = load.find(str(tiny_folder))
    tokenizer, model = load.load_tokenizer(source), load.load_model(source, "float32")
    seen = {
        (o.suite, o.item_id, o.probe): o for o in observations.read(made.path / observations.FILE) if o.arm == "base"
    }

    def log_probability(before: list[int], after: list[int]) -> float:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
        return sum(logits[len(before) + n - 1, token].item() for n, token in enumerate(after))

    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "How? " * 3}])
    openers = [
        list(tokenizer(o, add_special_tokens=False)["input_ids"]) for o in (*REFUSAL_OPENERS, *COMPLIANCE_OPENERS)
    ]
    assert seen["asked", "a2~plain", "openers"].logprobs == pytest.approx(
        [log_probability(prompt, opener) for opener in openers], abs=1e-4
    )
    begun = prompt + list(tokenizer("Sure, ", add_special_tokens=False)["input_ids"])
    assert seen["asked", "a2~sure", "openers"].logprobs[0] == pytest.approx(
        log_probability(begun, openers[0]), abs=1e-4
    )
    text = list(tokenizer("Plain words, 3 of them.")["input_ids"])
    assert seen["plain", "p3", "text"].loss == pytest.approx(
        -log_probability(text[:1], text[1:]) / (len(text) - 1), abs=1e-4
    )
    records = {(s.suite, s.metric, s.item_id): s for s in scores.read(made.path / scores.FILE) if s.arm == "base"}
    logprobs = seen["chosen", "c1", "choices"].logprobs
    shares = probabilities(logprobs)
    assert sum(shares) == pytest.approx(1)
    assert records["chosen", "nll", "c1"].value == pytest.approx(-math.log(shares[1]))
    assert records["chosen", "acc", "c1"].value == float(max(logprobs) == logprobs[1])
    assert records["chosen", "brier", "c1"].value == pytest.approx(
        sum((p - (n == 1)) ** 2 for n, p in enumerate(shares))
    )
    attacked = records["asked", "refusal_margin", "a3~sure"]
    assert attacked.cluster_id == "a3"
    assert attacked.slices == {"kind": "odd", "length": "short", "attack": "sure"}
    assert {s.value for s in records.values() if s.metric == "incoherent"} <= {0.0, 1.0}
    noise = made.manifest["noise_floor"]
    assert noise["asked"]["stops"]["items"] == 44
    assert noise["plain"]["text_loss"]["items"] == 24
    assert noise["plain"]["text_loss"]["mean_abs_delta"] < 1e-4
    assert noise.keys() == {"asked", "plain"}, "what is computed item by item has no such noise"
    assert {s.arm for s in scores.read(made.path / scores.FILE)} == {"base", "tuned"}
    assert made.manifest["judges"]["refusal_pattern"]["version"]
    assert len((made.path / "items.jsonl").read_text().splitlines()) == 44 + 24 + 40 + 24
    gate.run(made.path, folder / "verdict")


def test_what_changed_is_asked_anew_and_the_rest_is_not(folder: Path, tmp_path: Path, monkeypatch) -> None:
    suites = {name: load_suite(f"./{name}.yaml", folder / "eval.yaml") for name in SUITES}
    base, tuned = subjects.of_run(folder / "run")
    memory = subjects.Memory([base, tuned], "float32", "cpu")
    nf4 = dataclasses.replace(base, source=dataclasses.replace(base.source, quantize="nf4"))

    def keys(suite: Suite, arm: measure.Arm, probe: str) -> set[str]:
        return {unit.key for unit in measure.plan(arm, suite, memory) if unit.probe == probe}

    plain = keys(suites["plain"], measure.Arm("base", base, 5), "text")
    other = dataclasses.replace(suites["plain"], sha256="of other items")
    for suite, arm in (
        (other, measure.Arm("base", base, 5)),
        (
            suites["plain"],
            measure.Arm("tuned", base, 5),
        ),  # the same model as the other arm: another name, other records
        (suites["plain"], measure.Arm("base", tuned, 5)),
        (suites["plain"], measure.Arm("base", nf4, 5)),
        (suites["plain"], measure.Arm("base", base, 5, [{"role": "user", "content": "an example"}])),
        (suites["plain"], measure.Arm("base", base, 5, again=True)),  # in other batches
    ):
        assert not plain & keys(suite, arm, "text")
    longest = max(len(item.prompt) for item in suites["asked"].items)
    order = [n for unit in measure.plan(measure.Arm("base", base, 5), suites["asked"], memory) for n in unit.items]
    assert len(suites["asked"].items[order[43]].prompt) == longest, "by length, so that little is padded"


def test_a_model_that_computes_no_numbers_is_unscored_and_not_right() -> None:
    nan = float("nan")
    item = Item("s", "i", "i", [{"role": "user", "content": "?"}], choices=["a", "b"], right=0)
    seen = Observation("tuned", "s", "i", "choices", "0", logprobs=[nan, nan])
    assert {metrics.value(name, item, seen) for name in ("acc", "brier", "nll")} == {None}
    assert metrics.value("loss", item, Observation("tuned", "s", "i", "loss", "0", loss=nan)) is None
    assert metrics.value("answer_tokens", item, Observation("tuned", "s", "i", "answer", "0", text="x")) is None


def test_noise_is_what_two_measurements_differ_by() -> None:
    def record(arm: str, item: str, value: float | None, excluded: str | None = None) -> scores.Score:
        return scores.Score("s", "0", "m", True, item, item, "0", arm, value, "0", excluded=excluded)

    base = [
        record("base", "a", 1.0),
        record("base", "b", 2.0),
        record("base", "c", None),
        record("base", "d", 9.0, "seen"),
    ]
    again = [record(AGAIN, "a", 1.0), record(AGAIN, "b", 2.5), record(AGAIN, "c", 0.0), record(AGAIN, "d", 0.0, "seen")]
    assert noise_floor(base + again) == {"s": {"m": {"items": 3, "flips": 2, "mean_abs_delta": 0.25}}}


def test_two_models_of_any_kind_are_compared(folder: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    command = ["compare", str(tiny_folder), str(folder / "run" / "adapter"), "--output", str(tmp_path / "c"), "--json"]
    suites = ["--suites", ",".join(str(folder / f"{name}.yaml") for name in SUITES)]
    code = main([*command, *suites, "dtype=float32", "batch_size=5"])
    verdict = json.loads(capsys.readouterr().out)
    assert code == {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4}[verdict["verdict"]]
    assert verdict["subject"]["sha256"] == artifact.read(folder / "run" / "adapter").sha256
    mine = {(s.arm, s.metric, s.item_id): s.value for s in scores.read(tmp_path / "c" / "scores" / scores.FILE)}
    theirs = {(s.arm, s.metric, s.item_id): s.value for s in scores.read(evaluate(folder).path / scores.FILE)}
    assert mine == theirs
    again = config.load(tmp_path / "c" / "compare.yaml", stage="eval")
    assert (again.dtype, again.batch_size, again.tuned) == ("float32", 5, str(folder / "run" / "adapter"))
    kept, other = artifact.read(tmp_path / "c" / "scores").sha256, tiny.save(tmp_path / "other", seed=3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place, models, told in (
        (folder / "run", [tiny_folder, other], "holds a run (adapter/)"),
        (tmp_path / "c", [other, tiny_folder], f"compares {tiny_folder} with {folder / 'run' / 'adapter'} already"),
        (tmp_path / "c" / "scores", [tiny_folder, other], "is a finished step itself"),
        (tmp_path / "mine", [tiny_folder, other], "holds other files"),
        (tmp_path / "mine" / "notes.txt", [tiny_folder, other], "is a file"),
    ):
        assert main(["compare", *map(str, models), *suites, "--output", str(place)]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert "choose another --output" in said
    with pytest.raises(ArtifactError, match="holds the scores of other models; choose another output_dir"):
        evaluate(folder, run=None, base=str(tiny_folder), tuned=str(other), output_dir=str(tmp_path / "c"))
    with pytest.raises(ArtifactError, match="holds a run"):
        evaluate(folder, run=None, base=str(tiny_folder), tuned=str(other), output_dir="./run")
    assert artifact.read(tmp_path / "c" / "scores").sha256 == kept
    with pytest.raises(ConfigError, match="there is nothing to compare"):
        evaluate(folder, run=None, base=str(tiny_folder), tuned=str(tiny_folder), output_dir="./x")


def test_a_student_with_another_template_answers_the_same_requests(folder: Path, tiny_folder: Path, tmp_path) -> None:
    template = tiny.CHATML.replace("message.role", "message.role | upper").replace("assistant", "ASSISTANT")
    student = tiny.save(tmp_path / "student", seed=1, chat_template=template)
    raw = {"base": str(tiny_folder), "tuned": str(student), "output_dir": str(tmp_path / "c")}
    made = evaluate(folder, run=None, **raw)
    records = scores.read(made.path / scores.FILE)
    asked = {(s.suite, s.item_id, s.prompt_sha256) for s in records}
    assert len(asked) == 44 + 24 + 40 + 24, "both were asked the same, each through its own template"
    words = {arm: made.manifest["subjects"][arm]["source"]["words_sha256"] for arm in ("base", "tuned")}
    assert words["base"] != words["tuned"]
    assert gate.read(gate.run(made.path, tmp_path / "verdict")).rows


def test_what_cannot_be_encoded_is_named_before_any_weight_is_loaded(folder: Path, tiny_folder: Path, tmp_path) -> None:
    template = tiny.CHATML.replace("assistant\n", "assistant\n\n")  # a prompt that no finished chat begins with
    student = tiny.save(tmp_path / "student", seed=1, chat_template=template)
    (student / "model.safetensors").write_bytes(b"no weights")
    raw = {"base": str(tiny_folder), "tuned": str(student), "output_dir": str(tmp_path / "c")}
    with pytest.raises(DataError, match=r"24 problems\n.*chosen.jsonl:1: this chat template writes a finished chat"):
        evaluate(folder, run=None, **raw)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_score_as_one(folder: Path, tmp_path: Path) -> None:
    one = evaluate(folder)
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "run" / "scores")
    raw = {"stage": "eval", "run": "./run", "suites": [f"./{name}.yaml" for name in SUITES], "dtype": "float32"}
    file = tmp_path / "copy" / "eval.yaml"
    file.write_text(yaml.safe_dump({**raw, "batch_size": 5}))
    done = subprocess.run(
        [sys.executable, "-m", "llmtune", "eval", str(file), "--processes", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = artifact.read(tmp_path / "copy" / "run" / "scores")
    assert two.manifest["processes"] == 2
    assert done.stdout.strip() == str(two.path)
    mine, theirs = (scores.read(made.path / scores.FILE) for made in (two, one))
    assert [(s.arm, s.metric, s.item_id, s.response) for s in mine] == [
        (s.arm, s.metric, s.item_id, s.response) for s in theirs
    ]
    assert [s.value for s in mine] == pytest.approx([s.value for s in theirs], abs=1e-6)
    assert not (two.path.parent / "exit.json").exists()


def test_the_plan_does_not_depend_on_what_is_done(folder: Path) -> None:
    suite = load_suite("./asked.yaml", folder / "eval.yaml")
    base, tuned = subjects.of_run(folder / "run")
    memory = subjects.Memory([base, tuned], "float32", "cpu")
    units = measure.plan(measure.Arm("base", base, 5), suite, memory)
    answered = [n for unit in units if unit.probe == "answer" for n in unit.items]
    assert sorted(answered) == list(range(44))
    keys = [unit.key for unit in units]
    assert keys == [unit.key for unit in measure.plan(measure.Arm("base", base, 5), suite, memory)]
    for other in (measure.Arm("base", base, 6), measure.Arm("tuned", tuned, 5)):
        assert not set(keys) & {unit.key for unit in measure.plan(other, suite, memory) if unit.probe == "answer"}


@pytest.mark.parametrize(
    ("rows", "suite", "message"),
    [
        ([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], {}, "the id 'a' stands twice"),
        ([{"prompt": "x"}], {"slices": ["kind"]}, "has no 'kind'"),
        ([{"prompt": "x", "kind": "b"}], {"where": {"kind": "a"}}, "holds no row with"),
        ([{"prompt": "x", "choices": ["a", "b"], "answer": 2}], {"metrics": ["acc"]}, "'answer' is 2"),
        ([{"prompt": "x", "choices": "ab", "answer": 0}], {"metrics": ["acc"]}, "has no 'choices'"),
        ([{"prompt": "x"}], {"metrics": ["tool_call_valid"]}, "has no tools"),
        ([{"prompt": "x"}], {"metrics": ["text_loss"]}, "has no 'text'"),
        ([{"prompt": "x", "text": "y"}], {"metrics": ["text_loss", "stops"]}, "stands alone"),
        ([{"prompt": "x"}], {"metrics": ["refsed"]}, "did you mean 'refused'"),
    ],
)
def test_a_bad_suite_is_named(tmp_path: Path, rows, suite, message) -> None:
    (tmp_path / "items.jsonl").write_text(lines(rows))
    raw = {"suite": "s", **HEAD, "items": "./items.jsonl", "metrics": ["stops"], **suite}
    if any(name in ("stops", "tool_call_valid", "refsed") for name in raw["metrics"]):
        raw["max_new_tokens"] = 4
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises((ConfigError, DataError), match=message):
        load_suite("./s.yaml", tmp_path / "eval.yaml")


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>', 1),
        ('{"name": "weather", "parameters": {"city": "Bern", "days": 2}}', 1),
        ('```json\n{"name": "weather", "arguments": {"city": "Bern"}}\n```', 1),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}}]', 1),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "weather", "arguments": {}}]', 1),
        ('{"name": ["weather"], "arguments": {"city": "Bern"}}', 0),
        ('{"name": "weather", "arguments": {}}', 0),
        ('{"name": "weather", "arguments": {"city": 3}}', 0),
        ('{"name": "weather", "arguments": {"city": "Bern", "days": true}}', 0),
        ('{"name": "weather", "arguments": {"city": "Bern", "unit": "C"}}', 0),
        ('{"name": "forecast", "arguments": {"city": "Bern"}}', 0),
        ("It will rain in Bern.", 0),
        ('{"name": "weather", "arguments": ', 0),
    ],
)
def test_a_tool_call_is_held_against_its_schema(text: str, valid: int) -> None:
    item = Item("s", "i", "i", [{"role": "user", "content": "?"}], tools=[TOOL])
    assert _tool_call_valid(item, Observation("base", "s", "i", "answer", "0", text=text)) == valid


def test_what_does_not_fit_is_named_before_any_weight_is_loaded(folder: Path) -> None:
    raw = {"suite": "long", **HEAD, "items": "./asked.jsonl", "metrics": ["stops"], "max_new_tokens": 2000}
    (folder / "long.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(
        DataError, match=r"asked.jsonl:22: .* tokens and max_new_tokens \(2000\) are more than .* \(2048\)"
    ):
        evaluate(folder, suites=["./long.yaml"])


def test_a_suite_that_is_not_there_is_told_from_one_beside(folder: Path) -> None:
    with pytest.raises(ConfigError, match="there is no suite 'genral'; did you mean 'general'"):
        load_suite("genral", folder / "eval.yaml")
    with pytest.raises(ConfigError, match=r"there is no suite 'asked'; write ./asked.yaml for your own"):
        load_suite("asked", folder / "eval.yaml")
