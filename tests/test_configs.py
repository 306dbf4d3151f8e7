"""Every file that ships is valid, names files that ship too, and is found by the one finder of shipped files."""

from pathlib import Path

import pytest
import yaml

from llmtune import config
from llmtune.config.data import ColumnMap
from llmtune.config.eval import SuiteConfig
from llmtune.data.chats import FORMATS
from llmtune.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name in config.STAGES)
SUITES = sorted((ROOT / "evals" / "suites").glob("*.yaml"))
YOURS = {"data", "runs", "train.jsonl", "validation.jsonl"}  # what lies beside a run file and is not shipped


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def paths_in(value: object) -> list[str]:
    """Every string in a parsed YAML file that is a path of its own folder."""
    if isinstance(value, dict):
        return [path for item in value.values() for path in paths_in(item)]
    if isinstance(value, list):
        return [path for item in value for path in paths_in(item)]
    return [value] if isinstance(value, str) and value.startswith(("./", "../")) else []


@pytest.mark.parametrize("stage", config.STAGES)
def test_every_stage_has_a_file_to_start_from(stage):
    assert (ROOT / "configs" / stage / "start.yaml") in RUN_FILES


@pytest.mark.parametrize("file", RUN_FILES, ids=name)
def test_run_files(file):
    loaded = config.load(file)
    assert loaded.stage == file.parent.name
    assert len(file.read_text(encoding="utf-8").splitlines()) <= (100 if file.stem == "start" else 30)
    for path in paths_in(config.read_yaml(file)):
        assert Path(path).parts[0] in YOURS or (file.parent / path).exists(), f"{path} is not shipped"
    for suite in getattr(loaded, "suites", []):
        assert "/" in suite or (ROOT / "evals" / "suites" / f"{suite}.yaml") in SUITES


@pytest.mark.parametrize("file", SUITES, ids=name)
def test_suites(file):
    suite = config.validate(SuiteConfig, config.read_yaml(file), file)
    assert suite.suite == file.stem
    assert suite.gate
    if suite.items is not None:
        beside_its_rows = file.stem == "docstrings"  # the quickstart copies it to the rows it makes
        assert beside_its_rows or Path(suite.items).is_file()
    for task in suite.lm_eval:
        assert (ROOT / "evals" / "tasks" / f"{task}.yaml").is_file()


@pytest.mark.parametrize("file", sorted((ROOT / "evals" / "tasks").glob("*.yaml")), ids=name)
def test_tasks(file):
    task = config.read_yaml(file)
    assert task["task"] == file.stem
    for path in task["dataset_kwargs"]["data_files"].values():
        assert (file.parent / path).is_file()


def test_column_maps():
    files = sorted((ROOT / "data_templates").glob("*.yaml"))
    assert [file.stem for file in files] == sorted(FORMATS)
    for file in files:
        config.validate(ColumnMap, config.read_yaml(file), file)


def test_no_shipped_yaml_is_left_out():
    shipped = {file for folder in ("configs", "evals", "data_templates") for file in (ROOT / folder).rglob("*.y*ml")}
    kinds = {*RUN_FILES, *SUITES, *(ROOT / "data_templates").glob("*.yaml"), *(ROOT / "evals" / "tasks").glob("*.yaml")}
    launchers = set((ROOT / "configs" / "accelerate").glob("*.yaml"))
    assert shipped - kinds == launchers
    for file in launchers:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


# ---- shipped files


def test_shipped_is_found_in_a_checkout_and_misses_are_named():
    assert config.shipped("data_templates", "alpaca.yaml") == ROOT / "data_templates" / "alpaca.yaml"
    assert config.shipped("evals") == ROOT / "evals"
    with pytest.raises(
        ConfigError, match=r"data_templates/alpacca.yaml: is not shipped with llmtune; did you mean 'alpaca.yaml'\?"
    ):
        config.shipped("data_templates", "alpacca.yaml")


def test_shipped_from_a_wheel_and_from_a_broken_installation(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "llmtune"
    (package / "evals").mkdir(parents=True)
    monkeypatch.setattr(config, "__file__", str(package / "config" / "__init__.py"))
    assert config.shipped("evals") == package / "evals"
    with pytest.raises(ConfigError, match="configs: is missing from this installation; install llmtune again"):
        config.shipped("configs", "sft/start.yaml")
    (tmp_path / "site-packages" / "pyproject.toml").write_text('[project]\nname = "another"\n')
    (tmp_path / "site-packages" / "configs").mkdir()
    with pytest.raises(ConfigError, match="is missing from this installation"):
        config.shipped("configs", "sft/start.yaml")
