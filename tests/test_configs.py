"""Every file that ships is valid, names files that ship too, and is found by the one finder of shipped files."""

import importlib.util
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from llmtune import cli, config
from llmtune.config.data import ColumnMap
from llmtune.config.eval import SuiteConfig
from llmtune.data.chats import FORMATS
from llmtune.data.rows import HUB_ID
from llmtune.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
RUN_FILES = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name in config.STAGES)
ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
SUITES = sorted((ROOT / "evals" / "suites").glob("*.yaml"))
LM_EVAL = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
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
        assert beside_its_rows or HUB_ID.match(suite.items) or Path(suite.items).is_file()
    for task in suite.lm_eval:
        named = re.compile(rf"^(task|group): {task}$", re.MULTILINE)
        theirs = (named.search(known.read_text()) for known in LM_EVAL.glob(f"{task[:3]}*/**/*{task[:4]}*.yaml"))
        assert (ROOT / "evals" / "tasks" / f"{task}.yaml").is_file() or any(theirs)


@pytest.mark.parametrize("file", sorted((ROOT / "evals" / "tasks").glob("*.yaml")), ids=name)
def test_tasks(file):
    task = yaml.safe_load(file.read_text(encoding="utf-8").replace("!function ", ""))
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
    launchers = {*ACCELERATE, *(ROOT / "configs" / "launch").glob("*.yaml")}
    assert shipped - kinds == launchers


# ---- launchers


@pytest.mark.parametrize("file", ACCELERATE, ids=name)
def test_accelerate_reads_its_configurations(file):
    """By its own classes: an unknown key is an error of theirs."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

    raw, found = yaml.safe_load(file.read_text(encoding="utf-8")), load_config_from_file(str(file))
    assert found.mixed_precision == "no"  # the run file decides
    assert found.distributed_type == DistributedType(raw["distributed_type"])
    assert (found.num_processes, found.num_machines) == (raw["num_processes"], raw["num_machines"])
    if settings := dict(found.fsdp_config):
        offload = settings.pop("fsdp_offload_params")
        plugin = FullyShardedDataParallelPlugin(
            **{key if key == "fsdp_version" else key.removeprefix("fsdp_"): value for key, value in settings.items()},
            cpu_offload=offload,
        )
        assert (plugin.fsdp_version, plugin.state_dict_type.name) == (2, "SHARDED_STATE_DICT")
    if found.deepspeed_config:
        assert DeepSpeedPlugin(**found.deepspeed_config).deepspeed_config["zero_optimization"]["stage"] == 3
    assert found.use_cpu == ("cpu" in file.stem)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "launch").glob("*.sbatch")), ids=name)
def test_slurm_scripts(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    lines = file.read_text(encoding="utf-8").splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append"} <= set(directives)
    assert any(re.fullmatch(r"--signal=(B:)?TERM@\d+", line) for line in directives)
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:])  # SLURM reads none after it
    text = "\n".join(lines)
    assert '-eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"' in text


@pytest.mark.parametrize(("ends", "requeued"), [(75, True), (2, False), (0, False)])
def test_a_slurm_job_is_queued_again_when_it_was_preempted(tmp_path, ends, requeued):
    """The script itself, with `llmtune` and `scontrol` of ours: SIGTERM to the shell reaches the run, whose code decides."""
    stopped = (
        f"trap 'exit {ends}' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done" if ends == 75 else f"exit {ends}"
    )
    for command, text in (("llmtune", stopped), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / command).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / command).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    script = ["bash", str(ROOT / "configs" / "launch" / "slurm.sbatch"), "sft.yaml"]
    job = subprocess.Popen(script, env=environment)
    if ends == 75:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        job.terminate()
    assert job.wait(timeout=20) == ends
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 17\n"


def test_the_kubernetes_job_starts_again_on_75_alone():
    job = yaml.safe_load((ROOT / "configs" / "launch" / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # the only one that podFailurePolicy allows
    rules = {rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert rules["Ignore"]["values"] == [75] and rules["FailJob"]["values"] == [2]
    names = {container["name"] for container in pod["containers"]}
    assert all(rule["operator"] == "In" and rule["containerName"] in names for rule in rules.values())
    assert spec["podReplacementPolicy"] == "Failed"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
    assert cli._parser().parse_args(pod["containers"][0]["command"][1:]).processes == 8


def test_the_skypilot_job_recovers_on_75():
    job = yaml.safe_load((ROOT / "configs" / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert job.keys() == {"name", "resources", "workdir", "file_mounts", "setup", "run"}
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    words = shlex.split(job["run"].removeprefix("exec llmtune ").replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8"))
    assert cli._parser().parse_args(words).processes == 8


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
