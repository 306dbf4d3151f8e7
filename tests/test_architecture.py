"""The rules that keep the code readable: one direction of imports, small files, no output and no catch-all where they do not belong."""

import ast
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmtune"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    **dict.fromkeys(["errors", "ranks", "progress"], 0),
    **dict.fromkeys(["config", "artifact", "interruption", "scores", "verdict", "stats", "plots", "notes"], 1),
    **dict.fromkeys(["data", "model", "training"], 2),
    **dict.fromkeys(["stages"], 3),
    **dict.fromkeys(
        ["evaluate", "export", "paired", "cards", "audit", "gate", "registry", "report", "runs", "plan"], 4
    ),
    **dict.fromkeys(["cli", "quickstart", "pipeline"], 5),
}
HIGHEST_BELOW = {
    "evaluate": 2,
    "export": 2,
    "paired": 1,
    "cards": 1,
    "audit": 1,
    "gate": 1,
    "registry": 1,
    "report": 1,
    "runs": 1,
}  # else the layer below its own
ALSO = {  # imports within a layer, each for a reason
    "cli": {"quickstart", "pipeline"},
    "ranks": {"errors"},
    "progress": {"ranks"},  # of several processes one speaks
    "cards": {"paired"},
    "audit": {"paired"},
    "report": {"audit"},  # people's verdicts are summed up in one place
    "gate": {"paired", "cards"},
    "training": {"data", "model"},
    "model": {"data"},  # token rows are what a forward pass is measured on
}
LIGHT = [
    "config",
    "config.sft",
    "config.model",
    "config.data",
    "config.train",
    "config.eval",
    "config.judges",
    "config.metrics",
    "config.peft_methods",
    "config.transformers_names",
    "artifact",
    "scores",
    "stats",
    "plots",
    "errors",
    "ranks",
    "progress",
    "interruption",
]
LIGHT += [
    "verdict",
    "paired",
    "cards",
    "audit",
    "cli.audit",
    "gate",
    "report",
    "cli",
    "cli.tune",
    "cli.data",
    "cli.launch",
    "cli.resume",
    "cli.judge",
    "evaluate.judges",
    "evaluate.judges.pattern",
    "evaluate.judges.openers",
    "evaluate.judges.labelled",
    "evaluate.judges.validate",
    "evaluate.judges.endpoint",
    "evaluate.endpoint",
    "cli.judges",
    "cli.deploy",
    "cli.project",
    "quickstart",
]
LIGHT += ["notes", "runs", "cli.runs", "cli.plan", "cli.seeds"]
HEAVY = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "lm_eval", "scipy", "pandas", "matplotlib"]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(module: str) -> str:
    """`llmtune.config.sft` -> `config`; the package itself -> ``."""
    return module.partition(".")[2].partition(".")[0]


def imports(file: Path) -> list[tuple[str, int, bool]]:
    """Our own modules that `file` imports, with the line and whether that happens at import time."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = submodules if node.module == "llmtune" else [str(node.module)]
        found += [(name, node.lineno, node not in inside) for name in names if name.partition(".")[0] == "llmtune"]
    return found


def misplaced(file: Path) -> list[str]:
    """Imports of `file` that go upwards, sideways without a reason, or to the layer above at import time."""
    own = part(module_of(file))
    if own in ("", "__main__"):  # they start things and hold none
        return []
    limit, wrong = HIGHEST_BELOW.get(own, LAYERS[own] - 1), []
    for name, line, at_import in imports(file):
        other, place = part(name), f"{file.relative_to(ROOT)}:{line}"
        if other in ("", "__version__", own):
            continue
        if LAYERS[own] == 5 and at_import and LAYERS[other] > 1:
            wrong.append(f"{place}: {other} is imported at the top; import it inside the function that needs it")
        elif LAYERS[other] > limit and other not in ALSO.get(own, set()):
            wrong.append(f"{place}: {own} may not import {other}")
    return wrong


def test_every_module_has_a_layer():
    parts = {part(module_of(file)) for file in SOURCES} - {"", "__main__"}
    assert parts <= LAYERS.keys()


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downwards(file):
    assert misplaced(file) == []


def test_stages_do_not_know_each_other():
    stages = {f"llmtune.stages.{file.stem}" for file in (PACKAGE / "stages").glob("*.py")} - {"llmtune.stages.__init__"}
    for stage in stages:
        names = {name for name, _, _ in imports(PACKAGE / "stages" / f"{stage.rpartition('.')[2]}.py")}
        assert not names & (stages - {stage} | {"llmtune.stages"})


def test_a_misplaced_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "llmtune" / "config" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "def f():\n    from llmtune.stages import sft\n\nfrom llmtune import artifact\nimport llmtune.errors\n"
    )
    assert misplaced(bad) == [
        "llmtune/config/bad.py:4: config may not import artifact",
        "llmtune/config/bad.py:2: config may not import stages",
    ]
    late = tmp_path / "llmtune" / "cli.py"
    late.write_text("from llmtune import gate\n\n\ndef f():\n    from llmtune import quickstart\n")
    assert misplaced(late) == [
        "llmtune/cli.py:1: gate is imported at the top; import it inside the function that needs it"
    ]


def test_light_modules_load_nothing_heavy():
    code = "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(json.dumps(sorted(sys.modules)))"
    names = ["llmtune", *(f"llmtune.{name}" for name in LIGHT)]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert set(names) <= loaded
    assert not loaded & set(HEAVY)


def test_importing_the_package_loads_nothing():
    code = "import sys; before = set(sys.modules); import llmtune; print([m for m in set(sys.modules) - before if 'llmtune' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['llmtune']"


def test_files_and_functions_are_short():
    long = [
        f"{file}: {lines} lines"
        for file in SOURCES
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 400
    ]
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (node.end_lineno or 0) - node.lineno + 1 > 80
            ):
                long.append(f"{file}:{node.lineno}: {node.name} has more than 80 lines")
    assert long == []


def test_no_catch_all_without_a_reason():
    bare = []
    for file in SOURCES:
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ExceptHandler):
                kinds = (
                    {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
                    if node.type
                    else {"Exception"}
                )
                reason = lines[node.lineno - 1].partition("#")[2]
                if kinds & {"Exception", "BaseException"} and not reason:
                    bare.append(f"{file}:{node.lineno}")
    assert bare == []


def test_only_the_command_line_and_progress_print():
    for file in SOURCES:
        if part(module_of(file)) not in ("cli", "progress"):
            with file.open("rb") as stream:
                printed = [
                    token.start[0]
                    for token in tokenize.tokenize(stream.readline)
                    if token.type == tokenize.NAME and token.string == "print"
                ]
            assert printed == [], f"{file} prints in lines {printed}"


def test_shipped_folders_hold_no_python():
    for folder in ("configs", "data_templates", "evals"):
        assert (ROOT / folder).is_dir()
        assert list((ROOT / folder).rglob("*.py")) == []


def test_the_public_list_is_what_can_be_imported():
    import llmtune

    api = "Artifact LlmtuneError __version__ build_report load_config read_artifact run_eval run_gate run_merge run_sft"
    assert sorted(llmtune.__all__) == api.split()
    for name, target in llmtune._API.items():
        module, attribute = target.split(":")
        place = ROOT / module.replace(".", "/")
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8")) if module != "llmtune.config" else None
        assert tree is None or attribute in {getattr(node, "name", "") for node in tree.body}, (
            f"{name}: {module} has no {attribute}"
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmtune.nothing
