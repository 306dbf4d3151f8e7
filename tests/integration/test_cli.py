"""The command line that needs no model: what it lists, what it loads, how it ends."""

import errno
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from llmtune import artifact, config
from llmtune.errors import ArtifactError, ConfigError, DataError, LlmtuneError, MachineError, Preempted, ProofError
from llmtune.scores import Score

VERBS = [
    "quickstart",
    "init",
    "data",
    "sft",
    "plan",
    "verify-resume",
    "eval",
    "compare",
    "gate",
    "judge",
    "audit",
    "merge",
    "chat",
    "report",
    "runs",
    "schema",
    "doctor",
]
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "scipy"}


# ---- what is there, and what it loads


def loaded_by(*arguments: object) -> tuple[int, set[str]]:
    """The exit code of a command in a process of its own, and the top-level packages it imported."""
    code = "import json, sys\nfrom llmtune.cli import main\n"
    code += "try: code = main(sys.argv[1:])\nexcept SystemExit as stop: code = stop.code\n"
    code += "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)"
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    exit_code, modules = json.loads(done.stderr.splitlines()[-1])
    return exit_code, {name.partition(".")[0] for name in modules}


def test_help_lists_every_verb_and_loads_nothing(llmtune):
    shown = llmtune("--help")
    assert shown.code == 0
    listed = [line.split()[0] for line in shown.out.splitlines() if line[:4] == "    " and line[4:5].isalpha()]
    assert listed == VERBS
    code, modules = loaded_by("--help")
    assert code == 0
    assert not modules & (HEAVY | {"pydantic", "yaml", "numpy", "rich", "jinja2"})


@pytest.mark.parametrize("arguments", [["sft", "--help"], ["data", "check", "--help"], ["chat", "--help"]])
def test_every_verb_has_its_own_help(llmtune, arguments):
    shown = llmtune(*arguments)
    assert shown.code == 0
    assert shown.out.startswith(f"usage: llmtune {' '.join(arguments[:-1])} ")


def test_no_verb_and_an_unknown_one_are_errors(llmtune):
    assert (llmtune().code, llmtune("train").code, llmtune("data").code) == (2, 2, 2)


def test_a_config_error_loads_no_torch(run_file):
    run_file.write_text(run_file.read_text().replace("max_steps", "max_stepz"))
    code, modules = loaded_by("sft", run_file)
    assert code == 2
    assert "pydantic" in modules
    assert not modules & HEAVY


# ---- the gate


@pytest.fixture
def scores_folder(tmp_path):
    """`scores_folder(change, spread)`: a run whose tuned loss is higher by `change`, give or take `spread`, on 60 items."""

    def write(change: float, spread: float = 0.01) -> Path:
        suite = {"suite": "s", "suite_sha256": "x", "metric": "loss", "higher_is_better": False}
        arms = {"base": "base", "tuned": "tuned", "few_shot": None}
        with artifact.writing(tmp_path / "run" / "scores", "scores") as draft:
            with (draft.path / "scores.jsonl").open("w", encoding="utf-8") as stream:
                for n in range(60):
                    item = {"item_id": f"i{n}", "cluster_id": f"i{n}", "prompt_sha256": f"p{n}"}
                    for arm, value in (("base", 2.0), ("tuned", 2.0 + change + spread * (-1) ** n)):
                        record = Score(**suite, **item, arm=arm, value=value, artifact_sha256=arm)
                        stream.write(json.dumps(asdict(record)) + "\n")
            draft.facts["suites"] = {"s": {"sha256": "x", "gate": {"loss": {"margin": 0.1}}}}
            draft.facts |= {"arms": arms, "subject": {"sha256": "tuned"}, "judges": {}}
        return tmp_path / "run"

    return write


def test_the_gate_loads_no_torch(scores_folder):
    code, modules = loaded_by("gate", scores_folder(0.0))
    assert code == 0
    assert "numpy" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("change", "spread", "verdict", "code"),
    [(0.0, 0.01, "PASS", 0), (0.5, 0.01, "FAIL", 3), (0.05, 1.0, "INCONCLUSIVE", 4)],
)
def test_the_gate_says_its_verdict_by_its_exit_code(llmtune, scores_folder, change, spread, verdict, code):
    run = scores_folder(change, spread)
    text, data = llmtune("gate", run), llmtune("gate", run / "scores", "--json")
    assert (text.code, data.code) == (code, code)
    assert text.out.startswith(verdict)
    assert json.loads(data.out)["verdict"] == verdict
    assert artifact.read(run / "verdict", "verdict").manifest["verdict"] == verdict
    refused = llmtune("gate", run, "--margin", "s.loss=much")
    assert refused.code == 2
    assert refused.message.startswith("--margin: 's.loss=much' is not SUITE.METRIC=NUMBER")


def test_the_gate_wants_scores(llmtune, tmp_path):
    done = llmtune("gate", tmp_path)
    assert done.code == 2
    assert "has no llmtune.json, so it is unfinished" in done.message
    (tmp_path / "adapter").mkdir()
    assert llmtune("gate", tmp_path).message == f"{tmp_path}: holds no scores; 'llmtune eval' makes them\n"


# ---- init, schema, doctor


@pytest.mark.parametrize("stage", config.STAGES)
def test_init_writes_a_valid_file_and_never_over_another(llmtune, tmp_path, stage):
    done = llmtune("init", stage, tmp_path / "new")
    file = tmp_path / "new" / f"{stage}.yaml"
    assert (done.code, done.out.strip()) == (0, str(file))
    assert config.load(file).stage == stage
    file.write_text("mine")
    again = llmtune("init", stage, tmp_path / "new")
    assert again.code == 2
    assert again.message == f"{file}: exists already; name another folder for it, or move the file away\n"
    assert file.read_text() == "mine"


def test_init_of_an_unknown_stage(llmtune, tmp_path):
    done = llmtune("init", "sfd", tmp_path / "new")
    assert (done.code, done.message) == (2, "init: unknown stage 'sfd'; did you mean 'sft'?\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [*config.STAGES, "suite"])
def test_a_schema_describes_every_key(llmtune, name):
    done = llmtune("schema", name)
    schema = json.loads(done.out)
    assert done.code == 0
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    assert set(schema["required"]) <= schema["properties"].keys()
    references = {text for text in done.out.split('"') if text.startswith("#/$defs/")}
    assert references == {f"#/$defs/{kind}" for kind in schema["$defs"]}
    if name != "suite":
        started = config.read_yaml(config.shipped("configs", f"{name}/start.yaml"))
        assert started.keys() <= schema["properties"].keys()


def test_the_schema_knows_the_short_form_of_model(llmtune):
    assert '"string"' in json.dumps(json.loads(llmtune("schema", "sft").out)["properties"]["model"])


def test_a_schema_of_an_unknown_stage(llmtune):
    done = llmtune("schema", "suit")
    assert (done.code, done.message) == (2, "schema: unknown stage 'suit'; did you mean 'suite'?\n")


def test_doctor(llmtune):
    facts = json.loads(llmtune("doctor", "--json").out)
    assert {"python", "torch", "transformers", "cpu_count", "disk_free_gb", "optional"} <= facts.keys()
    assert facts["hub"] == "offline by HF_HUB_OFFLINE"
    shown = llmtune("doctor")
    assert shown.code == 0
    assert [line.split()[0] for line in shown.out.splitlines()] == list(facts)


# ---- how a command ends

ENDS = [
    (ConfigError("run.yaml", "no"), 2, "run.yaml: no"),
    (DataError("rows", ["one", "two"]), 2, "rows: 2 problems\n  one\n  two"),
    (ArtifactError("changed"), 2, "changed"),
    (MachineError("full"), 1, "full"),
    (ProofError("differs"), 1, "differs"),
    (Preempted("stopped"), 75, "stopped"),
    (LlmtuneError("other"), 1, "other"),
    (KeyboardInterrupt(), 130, "interrupted; the same command goes on from where it was"),
    (MemoryError(), 1, "out of memory; lower micro_batch_size or max_length"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory; lower micro_batch_size"),
    (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1, "/root/x: Permission denied"),
]


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)`: from now on `llmtune schema` raises it."""

    def install(error: BaseException) -> None:
        def fail(_):
            raise error

        monkeypatch.setattr("llmtune.cli.project.schema", fail)

    return install


@pytest.mark.parametrize(("error", "code", "message"), ENDS, ids=lambda value: type(value).__name__)
def test_an_error_becomes_its_exit_code_and_one_message(llmtune, failing, error, code, message):
    failing(error)
    done = llmtune("schema", "sft")
    assert done.code == code
    assert done.message.startswith(message)
    with pytest.raises(type(error)):
        llmtune("schema", "sft", "--debug")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), TypeError("no"), OSError("without a number")])
def test_a_mistake_of_ours_keeps_its_traceback(llmtune, failing, error):
    failing(error)
    with pytest.raises(type(error)):
        llmtune("schema", "sft")


def test_a_reader_that_has_gone_is_no_error():
    code = "import sys; from llmtune.cli import main; sys.exit(main(['schema', 'sft']))"
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")
