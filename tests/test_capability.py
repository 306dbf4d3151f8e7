"""lm-eval's tasks: found strictly, scored as its own command scores them, and nothing of them lost."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import tiny
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from llmtune import config, scores
from llmtune.config.eval import SuiteConfig
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.evaluate import arms, capability, observations, tasks
from llmtune.model import load

DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, train: shots.jsonl}}
test_split: test
training_split: train
fewshot_split: train
"""
CHOICES = """
include: data.txt
task: t_choices
tag: t_tag
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: answer
num_fewshot: 2
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
WRITES = """
include: data.txt
task: t_writes
tag: t_tag
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices[answer]}}"
num_fewshot: 1
process_results: !function score.process_results
generation_kwargs: {until: ["Q:"], max_gen_toks: 12, do_sample: false}
filter_list:
  - {name: start, filter: [{function: regex, regex_pattern: "^(.{0,3})"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list:
  - {metric: letters, aggregation: mean, higher_is_better: true}
  - {metric: parts, aggregation: !function score.share, higher_is_better: true}
  - {metric: overlap, aggregation: bleu, higher_is_better: true}
  - {metric: threes, aggregation: nanmean, higher_is_better: true}
"""
SCORE = """
def process_results(doc, results):
    text = results[0]
    if doc.get("broken"):
        raise KeyError("no such field")
    about = float(len(text)) if "3" in doc["question"] else float("nan")
    return {"letters": sum(c.isalpha() for c in text), "parts": [c.isascii() for c in text] or [False],
            "overlap": (doc["text"], text), "threes": about, "extra": about}

def short(doc, results):
    return {key: value for key, value in process_results(doc, results).items() if key in ("letters", "parts")}

def share(items):
    flat = [part for parts in items for part in parts]
    return sum(flat) / len(flat)
"""
SHORT = "".join(line for line in WRITES.splitlines(True) if "overlap" not in line and "threes" not in line)
"""Without what lm-eval's command resamples a hundred thousand times for a standard error."""
ROLLS = """
include: data.txt
task: t_rolls
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
CORPUS = """
include: data.txt
task: t_corpus
output_type: multiple_choice
doc_to_text: question
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer % 2}}"
metric_list:
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: t_group
task: [t_choices, t_corpus]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A suite's path with task files beside it: twelve items, three of them with one question."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tasks").mkdir()
    words = "red green blue large small house tree river".split()
    rows = [
        {
            "id": f"q{i}",
            "cluster": f"c{i // 2}",
            "question": f"What is {i} plus {i + 1}?",
            "choices": [str(2 * i + 1), str(2 * i + 2), "a dozen", str(i)],
            "answer": 0 if i % 3 else 2,
            "text": f"Row {i}: " + " ".join(words[(i * k) % 8] for k in range(5 + i)),
        }
        for i in range(12)
    ]
    for name, given in (("rows.jsonl", rows), ("shots.jsonl", rows[:8])):
        (folder / "tasks" / name).write_text("".join(json.dumps(row) + "\n" for row in given))
    files = {"data.txt": DATA, "score.py": SCORE, "choices.yaml": CHOICES, "writes.yaml": WRITES, "rolls.yaml": ROLLS}
    short = SHORT.replace("t_writes", "t_short").replace("t_tag", "t_own").replace(".process_results", ".short")
    files["short.yaml"] = short
    for name, text in {**files, "corpus.yaml": CORPUS, "group.yaml": GROUP}.items():
        (folder / "tasks" / name).write_text(text)
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model whose answers differ from prompt to prompt."""
    return tiny.save(tmp_path_factory.mktemp("untied") / "base", tied=False)


@pytest.fixture(scope="module")
def subject(folder: Path):
    source = load.find(str(folder))
    return load.load_model(source, "float32"), load.load_tokenizer(source)


def one(place: Path, name: str | dict) -> object:
    (task,) = tasks.load([name], place).tasks.values()
    return task


def theirs(folder: Path, place: Path, name: str, **settings: object) -> dict:
    """lm-eval's own way from the folder to the table, in this process: it loads the model itself."""
    index = TaskManager(include_path=str(place.parent / "tasks"), include_defaults=False).task_index
    return by_lm_eval(folder, tasks._Factory(place, unsafe_code=False).build(index[name], registry=index), **settings)


def by_lm_eval(folder: Path, task: object, **settings: object) -> dict:
    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **settings,
    )


def require_equal(result: capability.Result, row: dict, samples: list[dict], names: dict[str, list[str]]) -> None:
    """Every value of every item and the aggregates, to the last digit."""
    require_same_scores(result, row)
    mine = {item.item_id.split("/")[1]: item for item in result.items}
    assert len(samples) == len(mine) * len({sample["filter"] for sample in samples})
    for sample in samples:
        for metric in names:
            value = mine[sample["doc"]["id"]].metrics[tasks.name_of(metric, sample["filter"])]
            assert value == pytest.approx(sample[metric], abs=0)
        assert mine[sample["doc"]["id"]].prompt == sample["arguments"][0][0]


def require_same_scores(result: capability.Result, row: dict) -> None:
    scores = {key: value for key, value in row.items() if "," in key and "_stderr" not in key}
    assert result.aggregates == {key: None if math.isnan(value) else value for key, value in scores.items()}


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("name", ["t_choices", "t_writes", "t_rolls"])
def test_the_scores_are_lm_evals_own(place, folder, subject, name, chat):
    result = capability.run(*subject, one(place, name), 5, chat_template=chat)
    expected = theirs(folder, place, name, batch_size=5, apply_chat_template=chat, fewshot_as_multiturn=chat)
    numbers = {"t_choices": ["acc", "acc_norm"], "t_writes": ["letters"], "t_rolls": []}[name]
    require_equal(result, expected["results"][name], expected["samples"][name], numbers)
    assert ("<|im_start|>" in result.items[0].prompt) == (chat and name != "t_rolls")


def test_every_metric_has_its_value_or_says_why_not(place, subject):
    result = capability.run(*subject, one(place, "t_writes"), 4)
    item = result.items[3]
    assert item.item_id == "t_writes/q3" and item.reference and item.response
    assert {
        f"{metric},{kind}" for metric in ("letters", "parts", "overlap", "threes") for kind in ("start", "whole")
    } <= (item.metrics.keys())
    whole = item.response.split("Q:")[0]
    assert item.metrics["parts,whole"] == sum(c.isascii() for c in whole) / len(whole)  # a list a item: its share
    assert item.metrics["threes,whole"] == len(whole)
    assert "threes,whole" not in result.items[0].metrics  # nanmean: not about this item
    assert (
        item.metrics["extra,whole"] == len(whole) and result.items[0].metrics["extra,whole"] is None
    )  # mean of no number
    assert any("extra has no direction" in note for note in result.notes)
    texts = capability.run(*subject, one(place, "t_rolls"), 4)
    (score,) = {round(texts.aggregates["bits_per_byte,none"], 9)}
    sizes = [len(item.prompt.encode()) for item in texts.items]
    weighted = sum(i.metrics["bits_per_byte"] * size for i, size in zip(texts.items, sizes, strict=True)) / sum(sizes)
    assert score == pytest.approx(weighted)
    corpus = capability.run(*subject, one(place, "t_corpus"), 4)
    assert corpus.without_items == ["mcc,none"] and "mcc" not in corpus.items[0].metrics
    assert any("mcc,none is computed over all items at once" in note for note in corpus.notes)


@pytest.mark.parametrize("name", ["t_choices", "t_corpus"])
def test_accuracy_follows_from_the_log_probabilities(place, subject, name):
    for item in capability.run(*subject, one(place, name), 4).items:
        assert len(item.logprobs) == len(item.choices)
        assert item.metrics["acc"] == float(int(np.argmax(item.logprobs)) == item.right)
        assert item.response == item.choices[int(np.argmax(item.logprobs))]
        assert item.reference == item.choices[item.right]
        if name == "t_choices":
            odds = np.exp(np.array(item.logprobs) - max(item.logprobs))
            odds /= odds.sum()
            target = np.eye(len(odds))[item.right]
            assert item.metrics["brier_score"] == pytest.approx(((odds - target) ** 2).sum())


def test_groups_tags_and_variants(place, folder, subject, tmp_path):
    place.write_text("suite: mine\nlm_eval: [t_group]\ngate: {acc: {margin: 0.1}}\n")
    other = tiny.save(tmp_path / "other", seed=1, tied=False)
    raw = {"stage": "eval", "base": str(folder), "tuned": str(other), "suites": ["./mine.yaml"], "batch_size": 4}
    made = arms.run(config.build({**raw, "output_dir": "./out", "dtype": "float32"}, place), place)
    manager = TaskManager(include_path=str(place.parent / "tasks"), include_defaults=False)
    again = tasks._Factory(place, unsafe_code=False).build(manager.task_index["t_group"], registry=manager.task_index)
    lm = capability.HFLM(pretrained=subject[0], backend="causal", tokenizer=subject[1], batch_size=4)
    expected = lm_eval.simple_evaluate(
        model=lm, tasks=[again], task_manager=manager, bootstrap_iters=0, apply_chat_template=True
    )
    written = made.manifest["lm_eval"]["mine"]
    assert written["base"]["t_group"] == {"acc,none": expected["groups"]["t_group"]["acc,none"], "sample_len": 24}
    assert written["base"]["t_corpus"]["mcc,none"] == expected["results"]["t_corpus"]["mcc,none"]
    assert written["tuned"].keys() == written["base"].keys() == {"t_group", "t_choices", "t_corpus"}
    seen = observations.read(made.path / observations.FILE)
    assert all(one.logprobs and one.item["right"] is not None for one in seen) and len(seen) == 48
    records = scores.read(made.path / scores.FILE)
    accuracy = [one.value for one in records if (one.arm, one.metric) == ("base", "acc")]
    assert np.mean(accuracy) == pytest.approx(written["base"]["t_group"]["acc,none"])
    assert {one.slices["task"] for one in records} == {"t_choices", "t_corpus"}
    assert list(tasks.load(["t_tag"], place).tasks) == ["t_choices", "t_writes"]
    for name in ("t_tag", "t_choices", "t_group"):
        variant = tasks.load([{"task": name, "num_fewshot": 4}], place)
        assert {task.config.num_fewshot for task in variant.tasks.values()} == {4}
        assert variant.sha256() != tasks.load([name], place).sha256()
    shots = capability.run(*subject, one(place, {"task": "t_choices", "num_fewshot": 4}), 4).items[0].prompt
    assert shots.count("<|im_start|>assistant") == 5


def test_the_models_own_generation_settings_take_no_part(place, subject):
    model, tokenizer = subject
    expected = capability.run(model, tokenizer, one(place, "t_writes"), 4)
    assert max(len(item.response) for item in expected.items) <= 12  # bytes are tokens here, and 12 is max_gen_toks
    kept = model.generation_config
    model.generation_config = (
        dataclasses.replace(kept) if dataclasses.is_dataclass(kept) else type(kept)(**kept.to_dict())
    )
    model.generation_config.repetition_penalty, model.generation_config.max_new_tokens = 3.0, 40
    model.train()
    again = capability.run(model, tokenizer, one(place, "t_writes"), 4)
    assert model.training and model.generation_config.repetition_penalty == 3.0 and "tie_weights" not in vars(model)
    model.eval()
    model.generation_config = kept
    assert again.items == expected.items


def test_items_are_drawn_and_examples_do_not_depend_on_what_ran_before(place, subject, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")  # lm-eval's simple_evaluate gives None there
    task = one(place, "t_choices")
    first = capability.run(*subject, task, 4, limit=5)
    assert len(first.items) == 5 and [item.item_id for item in first.items] != [f"t_choices/q{i}" for i in range(5)]
    capability.run(*subject, task, 4)
    assert capability.run(*subject, task, 4, limit=5).items == first.items


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.parametrize(
    "settings",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["saves the head", "virtual tokens"],
)
def test_an_adapter_switched_off_is_the_base(place, folder, tiny_folder, settings):
    tied = settings.peft_type == "LORA"  # where `tie_weights` fails once the head is the adapter's
    source = load.find(str(tiny_folder if tied else folder))
    subject = load.load_model(source, "float32"), load.load_tokenizer(source)
    torch.manual_seed(0)
    model, tokenizer = get_peft_model(load.load_model(source, "float32"), settings), subject[1]
    size = 1 if settings.peft_type == "PROMPT_TUNING" else 4
    for name in ("t_choices", "t_writes"):
        task = one(place, name)
        base, tuned = capability.run(*subject, task, size), capability.run(model, tokenizer, task, 4)
        with model.disable_adapter():
            assert capability.run(model, tokenizer, task, 4).items == base.items
        assert capability.run(model, tokenizer, task, 4).items == tuned.items != base.items
        if size == 1:  # a padded row would be answered as another prompt
            assert capability.run(model, tokenizer, task, 1).items == tuned.items


def test_what_goes_wrong_in_a_task_names_it(place, subject):
    plain = tiny.tokenizer(chat_template=None)
    with pytest.raises(ConfigError, match="t_choices: the model has no chat template; write chat_template: false"):
        capability.run(subject[0], plain, one(place, "t_choices"), 4)
    assert capability.run(subject[0], plain, one(place, "t_choices"), 4, chat_template=False).sample_len == 12
    rows = place.parent / "tasks" / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + json.dumps({**json.loads(whole.splitlines()[0]), "id": "q12", "broken": True}) + "\n")
    try:
        with pytest.raises(
            LlmtuneError, match=r"the lm-eval task t_writes failed at item q12: KeyError: 'no such field'"
        ):
            capability.run(*subject, one(place, "t_writes"), 4)
        assert capability.run(*subject, one(place, "t_choices"), 4).sample_len == 13
    finally:
        rows.write_text(whole)


def test_a_task_that_fails_costs_the_others_nothing(place, folder, tmp_path, monkeypatch):
    file = place.parent / "two.yaml"
    file.write_text("suite: two\nlm_eval: [t_choices, t_short]\n")
    rows, asked, ask = place.parent / "tasks" / "rows.jsonl", [], capability.run
    whole = rows.read_text()
    broken = whole.replace('"id": "q7"', '"id": "q7", "broken": true')
    assert broken != whole
    other = tiny.save(tmp_path / "other", seed=1, tied=False)
    raw = {"stage": "eval", "base": str(folder), "tuned": str(other), "suites": ["./two.yaml"], "dtype": "float32"}

    def evaluate():
        return arms.run(config.build({**raw, "output_dir": str(tmp_path / "out")}, file), file)

    monkeypatch.setattr(
        capability, "run", lambda *given, **more: asked.append(given[2].task_name) or ask(*given, **more)
    )
    (place.parent / "tasks" / "own.jsonl").write_text(broken)  # one task has rows of its own
    text = (place.parent / "tasks" / "short.yaml").read_text()
    (place.parent / "tasks" / "short.yaml").write_text(text.replace("data.txt", "own.txt"))
    (place.parent / "tasks" / "own.txt").write_text(DATA.replace("rows.jsonl", "own.jsonl"))
    try:
        with pytest.raises(LlmtuneError, match="the lm-eval task t_short failed at item q7"):
            evaluate()
        assert asked == ["t_choices", "t_short"]
        (place.parent / "tasks" / "own.jsonl").write_text(whole)
        assert evaluate().manifest["lm_eval"]["two"].keys() == {"base", "tuned"}
    finally:
        (place.parent / "tasks" / "short.yaml").write_text(text)
    assert asked == ["t_choices", "t_short", "t_short", "t_choices", "t_short"]


@pytest.mark.parametrize(
    ("file", "text", "names", "message"),
    [
        ("a.yaml", "task: [", ["t_choices"], "is no task lm-eval can read"),
        ("a.yaml", CHOICES, ["t_choices"], "the task 't_choices' stands in a.yaml too"),
        ("a.yaml", ROLLS.replace("t_rolls", "a"), ["t_choices", {"num_fewshot": 2}], "names no task; write"),
        ("a.yaml", ROLLS.replace("t_rolls", "a"), ["a", "a"], "the task 'a' stands twice"),
        ("a.yaml", ROLLS.replace("t_rolls", "a"), [{"task": "a", "num_shots": 2}], "cannot be built .TypeError"),
        (
            "a.yaml",
            CHOICES.replace("t_choices", "a").replace("true", "false"),
            ["t_choices", "a"],
            "more is better in a",
        ),
        ("a.yaml", CHOICES.replace("t_choices", "a") + "test_split: gone", ["a"], "cannot be built .KeyError: 'gone'"),
        ("a.yaml", WRITES.replace("t_writes", "a").replace("score.", "gone."), ["a"], "Cannot import module 'gone'"),
        (
            "a.yaml",
            CHOICES.replace("t_choices", "a").replace("include: data.txt", DATA.replace("rows", "gone")),
            ["a"],
            "the data of the task a cannot be read .*correct its data_files",
        ),
    ],
)
def test_a_task_that_cannot_be_used_is_an_error_before_anything_runs(place, file, text, names, message):
    broken = place.parent / "tasks" / file
    broken.write_text(text)
    try:
        with pytest.raises(LlmtuneError, match=message):
            tasks.load(names, place)
    finally:
        broken.unlink()


def test_a_rule_needs_a_metric_that_items_have(place):
    found = tasks.load(["t_choices", "t_corpus"], place).tasks

    def require(gate, given=found, **more):
        rules = {metric: {"margin": 0.1} for metric in gate}
        suite = config.validate(SuiteConfig, {"suite": "s", "lm_eval": ["t"], "gate": rules, **more}, place)
        tasks.require_usable(suite, given, place)

    require(["acc", "brier_score"])
    with pytest.raises(ConfigError, match=r"gate\.accc: is no metric of t_choices, t_corpus; did you mean 'acc'"):
        require(["accc"])
    with pytest.raises(ConfigError, match=r"gate\.mcc: is computed over all items at once"):
        require(["mcc"])
    require(["what it says"], {"t": one(place, "t_writes")})  # its own code names its metrics
    with pytest.raises(ConfigError, match="unsafe_code: has no effect: t_choices, t_corpus run no code of the model"):
        require([], unsafe_code=True)
    runs = {"t": one(place, {"task": "t_writes", "unsafe_code": True})}
    with pytest.raises(
        ConfigError, match="t runs the code that the model writes on this machine; write unsafe_code: true"
    ):
        require([], runs)
    require([], runs, unsafe_code=True)


def test_code_of_an_unsafe_task_is_not_even_imported_unasked(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "marks.py").write_text("open('imported', 'w')\ndef f(*_):\n    return {}\n")
    text = "task: t_unsafe\nunsafe_code: true\ndataset_path: json\nprocess_results: !function marks.f\n"
    (tmp_path / "tasks" / "t.yaml").write_text(text)
    with pytest.raises(ConfigError, match="t_unsafe runs the code that the model writes"):
        tasks.load(["t_unsafe"], tmp_path / "mine.yaml")
    assert "marks" not in sys.modules
    assert not list(tmp_path.rglob("imported")) and not Path("imported").exists()


def test_a_suite_of_three_lines(tmp_path):
    raw = {"suite": "mine", "items": "./items.jsonl", "metrics": ["exact_match"]}
    suite = config.validate(SuiteConfig, raw, tmp_path / "mine.yaml")
    assert (suite.description, suite.licence, suite.max_new_tokens) == ("", "not stated", 128)
    for key, value in (("chat_template", False), ("unsafe_code", True)):
        with pytest.raises(ConfigError, match=f"{key}: has no effect without lm_eval tasks"):
            config.validate(SuiteConfig, {**raw, key: value}, tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match="max_new_tokens: has no effect without a metric of the model's own answer"):
        config.validate(SuiteConfig, {**raw, "metrics": ["loss"], "max_new_tokens": 4}, tmp_path / "mine.yaml")


PUBLISHED = Path(os.environ.get("LLMTUNE_TEST_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))


def published(name: str) -> list[dict]:
    """A few rows of a published set, with the fields it has on the hub; skips where the set is absent."""
    file = {
        "gsm8k": "gsm8k/test.jsonl",
        "arc_challenge": "arc/ARC-Challenge-Dev.jsonl",
        "truthfulqa_mc1": "truthfulqa/validation_en_mc.json",
        "truthfulqa_mc2": "truthfulqa/validation_en_mc.json",
        "ifeval": "ifeval/input_data.jsonl",
    }[name]
    if not (PUBLISHED / file).is_file():
        pytest.skip(f"{file} is not on this machine")
    text = (PUBLISHED / file).read_text(encoding="utf-8")
    rows = json.loads(text)[:6] if text.startswith("[") else [json.loads(line) for line in text.splitlines()[:6]]
    for row in rows:
        if name == "arc_challenge":
            options = row["question"]["choices"]
            row["choices"] = {key: [option[key] for option in options] for key in ("text", "label")}
            row["question"] = row["question"]["stem"]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "arc_challenge", "truthfulqa_mc1", "truthfulqa_mc2"])
def test_lm_evals_own_tasks_on_rows_that_lie_here(place, folder, subject, name):
    rows = published(name)
    (place.parent / "here.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_name": None, "num_fewshot": 1}
    files = dict.fromkeys(("train", "validation", "test"), "here.jsonl")
    task = one(place, {"task": name, **data, "dataset_kwargs": {"data_files": files}})
    result = capability.run(*subject, task, 3)
    (file,) = (Path(lm_eval.__file__).parent / "tasks").glob(f"*/{name}.yaml")
    files = {split: str(place.parent / file) for split, file in files.items()}
    again = ConfigurableTask(config={**load_yaml(file), **data, "dataset_kwargs": {"data_files": files}})
    expected = by_lm_eval(folder, again, batch_size=3, apply_chat_template=True, fewshot_as_multiturn=True)
    samples = expected["samples"][name]
    require_same_scores(result, expected["results"][name])
    for sample in samples:
        (item,) = (item for item in result.items if item.doc == sample["doc"])
        for metric in sample["metrics"]:
            assert item.metrics[tasks.name_of(metric, sample["filter"])] == float(sample[metric])
        assert item.prompt == sample["arguments"][0][0]
    if name == "gsm8k":
        assert result.items[0].metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    scored_by_itself = name in ("arc_challenge", "truthfulqa_mc1")
    assert all((item.right is not None) == scored_by_itself for item in result.items)


@pytest.mark.slow
def test_shipped_suites_name_tasks_that_lm_eval_has():
    known = tasks._installed()
    for file in (Path(__file__).parent.parent / "evals" / "suites").glob("*.yaml"):
        for name in config.read_yaml(file).get("lm_eval", []):
            assert name in known or (file.parent.parent / "tasks" / f"{name}.yaml").is_file(), name


@pytest.mark.slow
def test_ifeval_says_what_it_needs_or_scores_by_instruction(place, subject):
    rows = published("ifeval")
    (place.parent / "here.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"task": "ifeval", "dataset_path": "json", "dataset_kwargs": {"data_files": {"train": "here.jsonl"}}}
    spec["generation_kwargs"] = {"until": [], "max_gen_toks": 8}
    if importlib.util.find_spec("immutabledict") is None:
        with pytest.raises(
            LlmtuneError, match=r"the task ifeval needs a package that is missing; pip install 'llmtune\[ifeval\]'"
        ):
            tasks.load([spec], place)
        return
    result = capability.run(*subject, one(place, spec), 3)
    every = [
        share for item in result.items for share in [item.metrics["inst_level_strict_acc"]] * len(item.doc["kwargs"])
    ]
    assert result.aggregates["inst_level_strict_acc,none"] == pytest.approx(np.mean(every))


@pytest.mark.slow
def test_the_scores_are_those_of_the_command(place, folder, subject, tmp_path):
    """`lm_eval run` in a process of its own, on the same folder and task files, with examples and the chat template."""
    names = ["t_choices", "t_short", "t_rolls"]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", ",".join(names), "--batch_size", "3"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(place.parent / "tasks")]
    command += ["--apply_chat_template", "--log_samples", "--output_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, cwd=place.parent / "tasks", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = tmp_path.rglob("results_*.json")
    rows = json.loads(table.read_text())["results"]
    numbers = {"t_choices": ["acc", "acc_norm"], "t_short": ["letters"], "t_rolls": []}
    for name in names:
        (file,) = tmp_path.rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        require_command(capability.run(*subject, one(place, name), 3), rows[name], samples, numbers[name])


def require_command(result: capability.Result, row: dict, samples: list[dict], numbers: list[str]) -> None:
    require_same_scores(result, row)
    mine = {item.item_id.split("/")[1]: item for item in result.items}
    for sample in samples:
        item = mine[sample["doc"]["id"]]
        assert all(item.metrics[tasks.name_of(m, sample["filter"])] == sample[m] for m in numbers)
        if item.logprobs is not None:
            assert item.logprobs == [float(answer[0][0]) for answer in sample["resps"]]
        elif item.response is not None:
            assert item.response == sample["resps"][0][0]
    assert len(samples) == len(mine) * len({sample["filter"] for sample in samples})
