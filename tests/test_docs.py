"""The documentation says what the code does: its run files load, its commands parse, its links lead somewhere, its tables are complete."""

import argparse
import ast
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic_core import PydanticUndefined

import llmtune
from llmtune import cli, config, gate, paired, stats
from llmtune.config import Section
from llmtune.config.data import ColumnMap
from llmtune.config.eval import EvalConfig, Rule, SuiteConfig
from llmtune.config.judges import JudgeConfig
from llmtune.config.metrics import METRICS
from llmtune.config.sft import SftConfig
from llmtune.config.train import AdapterConfig
from llmtune.data.chats import load_chats

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOP = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data_templates/README.md", "evals/README.md")
]
PAGES = sorted(DOCS.glob("*.md"))
MARKDOWN = [file for file in [*TOP, *PAGES] if file.name not in ("log.md", "acceptance.md")]
FREE = {"README.md", "dependencies.md", "log.md", "acceptance.md"}  # the others share their headings
HEADINGS = ["What it does", "Smallest (config|command)", "What it writes", "What can go wrong"]
TABLES = [  # every key of a section stands in the table with this heading, with its default
    ("sft.md", "key", SftConfig),
    ("eval.md", "key", EvalConfig),
    ("eval.md", "suite key", SuiteConfig),
    ("data.md", "map key", ColumnMap),
    ("eval.md", "judge key", JudgeConfig),
    ("gate.md", "rule key", Rule),
]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def each(*files: Path) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=name)


@cache
def blocks(file: Path, language: str) -> list[str]:
    """The texts of the file's fenced blocks in `language`."""
    found, inside, lines = [], None, []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside == language:
                found.append("\n".join(lines))
            inside, lines = (None if inside is not None else line[3:].strip()), []
        else:
            lines.append(line)
    assert inside is None, f"{name(file)}: a block is not closed"
    return found


def title(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0]


def prose(file: Path) -> str:
    """The file without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def table(file: Path, heading: str) -> list[list[str]]:
    """The cells of every table of the file whose first heading is `heading`."""
    found, inside = [], False
    for line in [*prose(file).splitlines(), ""]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        inside = bool(cells) and (inside or cells[0] == heading)
        if inside and cells[0] != heading and not set(cells[0]) <= set("-:"):
            found.append(cells)
    return found


def commands(file: Path) -> list[list[str]]:
    """The words of every command in the file's shell blocks."""
    lines = [
        line
        for language in ("sh", "console")
        for text in blocks(file, language)
        for line in text.replace("\\\n", "").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def keys_of(section: type[Section], prefix: str = "") -> dict[str, object]:
    """Dotted key -> default of every setting; of an optional section the section itself as well."""
    found: dict[str, object] = {}
    for key, field in section.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        default = field.get_default(call_default_factory=True)
        if nested is None or default is not PydanticUndefined:
            found[prefix + key] = default
        if nested not in (None, ColumnMap, AdapterConfig, JudgeConfig) and not field.default_factory:
            found |= keys_of(nested, f"{prefix}{key}.")
    return found


def verbs() -> dict[str, argparse.ArgumentParser]:
    """What can be typed after `llmtune`, such as `sft` and `data check`."""

    def below(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not nested:
            return {prefix.strip(): parser}
        return {k: v for verb, child in nested[0].choices.items() for k, v in below(child, f"{prefix} {verb}").items()}

    return below(cli._parser())


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each(*MARKDOWN)
def test_yaml_loads(file):
    for text in blocks(file, "yaml"):
        raw = yaml.load(text, Loader=config._Loader)
        if "stage" in raw:
            assert config.build(raw, file).stage == raw["stage"]
        elif "suite" in raw:
            assert config.validate(SuiteConfig, raw, file).suite == raw["suite"]
        elif "kind" in raw:
            config.validate(JudgeConfig, raw, file)
        elif "columns" in raw.get("data", {}):
            config.validate(ColumnMap, raw["data"]["columns"], file)


@each(*MARKDOWN)
def test_commands_parse(file):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(file):
        if any(Path(word).name == "llmtune" for word in words):
            given = words[[Path(word).name for word in words].index("llmtune") + 1 :]
            if "--help" in given or "--version" in given:
                continue
            try:
                arguments = cli._parser().parse_args(given)
            except SystemExit:
                pytest.fail(f"{shlex.join(words)} is no command")
            assert getattr(arguments, "run", None), f"{shlex.join(words)} names no command"
            written = {word.split("=")[0] for word in given if word.startswith("--")}
            verb = next(parser for key, parser in verbs().items() if given[: len(key.split())] == key.split())
            assert written <= verb._option_string_actions.keys(), f"{shlex.join(words)}: an option is abbreviated"
            for override in getattr(arguments, "overrides", []):
                assert re.fullmatch(r"[\w.]+=.*", override), f"{shlex.join(words)}: {override} is no override"
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, shlex.join(words)


@each(*MARKDOWN)
def test_inline_commands_exist(file):
    known = {key.split()[0] for key in verbs()}
    for words in re.findall(r"`llmtune ([a-z][\w-]*)", prose(file)):
        assert words in known, f"`llmtune {words}` is not a command"
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)", prose(file))) <= set(targets)


@each(*MARKDOWN)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{target} does not exist"
        assert there.is_relative_to(ROOT)
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(there), re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}: no such heading"


@each(*(page for page in PAGES if page.name not in FREE))
def test_pages_share_their_headings(file):
    headings = re.findall(r"^## (.+)$", prose(file), re.MULTILINE)
    at = [next((i for i, heading in enumerate(headings) if re.fullmatch(wanted, heading)), None) for wanted in HEADINGS]
    assert None not in at
    assert at == sorted(at)


def test_every_command_has_its_page_and_every_page_its_line():
    titles = [title(file) for file in PAGES]
    for verb in verbs():
        assert any(f"llmtune {verb}" in title for title in titles), f"llmtune {verb} has no page"
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for file in PAGES:
        assert file.name in ("README.md", "log.md", "acceptance.md") or f"]({file.name})" in index, (
            f"{file.name} is not in the index"
        )


@pytest.mark.parametrize(("page", "heading", "section"), TABLES, ids=lambda value: getattr(value, "__name__", value))
def test_tables_of_keys_are_the_schema(page, heading, section):
    rows, known = table(DOCS / page, heading), keys_of(section)
    assert [cells[0].strip("`") for cells in rows] == list(known)
    for key, written, *_ in rows:
        default = known[key.strip("`")]
        if default is PydanticUndefined:
            assert written == "required", key
        elif default is None:
            assert written == "none", key
        else:
            stated = yaml.load(written.strip("`"), Loader=config._Loader)
            assert (type(default)(**stated) if isinstance(default, Section) else stated) == default, key


def test_every_option_and_metric_is_documented():
    for verb, parser in verbs().items():
        page = next(file for file in PAGES if f"llmtune {verb}" in title(file))
        for option in parser._option_string_actions:
            if option.startswith("--") and option not in ("--help", "--debug"):
                assert option in page.read_text(encoding="utf-8"), f"{verb} {option}"
    assert {cells[0].strip("`") for cells in table(DOCS / "eval.md", "metric")} == METRICS.keys()


SUITES = {file.stem: config.read_yaml(file) for file in (ROOT / "evals" / "suites").glob("*.yaml")}
PUBLISHED = {  # their items are not shipped
    name: suite
    for name, suite in SUITES.items()
    if not str(suite.get("items", ".")).startswith(".")
    or (suite.get("lm_eval", []) and not (ROOT / "evals" / "tasks" / f"{suite['lm_eval'][0]}.yaml").is_file())
}


def has_the_rules(suite, text):
    for metric, rule in SUITES[suite]["gate"].items():
        assert f"`{metric}`" in text, suite
        assert f"{rule['margin']:.2f}" in text or f"than {rule['margin']:g}" in text, suite


def asked_by(suite):
    """The file of items of a shipped task of lm-eval."""
    return next(iter(SUITES[suite].get("lm_eval", [])), "").removeprefix("llmtune_")


def test_the_shipped_suites_are_described_as_they_are():
    rows = {cells[0].strip("`"): cells[1:] for cells in table(DOCS / "eval.md", "suite")}
    assert rows.keys() == SUITES.keys() - PUBLISHED.keys() - {"docstrings"}
    for suite, (items, text) in rows.items():
        prompts = ROOT / "evals" / "suites" / SUITES[suite].get("items", f"../prompts/{asked_by(suite)}.jsonl")
        lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
        where = SUITES[suite].get("where", {}).items()
        taken = [line for line in lines if all(line[field] == text for field, text in where)]
        assert int(re.match(r"\d+", items)[0]) == len(taken), suite
        if drawn := SUITES[suite].get("generate_items"):
            assert f"of {drawn} of them" in text, suite
        has_the_rules(suite, text)


def test_the_suites_on_published_sets_are_described_as_they_are():
    rows = {cells[0].strip("`"): cells[1:] for cells in table(DOCS / "eval.md", "published suite")}
    assert rows.keys() == PUBLISHED.keys()
    for suite, (items, licence, columns, text) in rows.items():
        shipped = SUITES[suite]
        assert f"`{shipped.get('items') or shipped['lm_eval'][0]}`" in items
        assert shipped["licence"].startswith(licence)
        assert str(shipped.get("limit", "")) in items
        named = shipped.get("columns", {}).get("user", []) + list(shipped.get("where", {})) + shipped.get("slices", [])
        assert columns == "as above" or all(f"`{column}`" in columns for column in named)
        has_the_rules(suite, text)


def test_python_calls_what_there_is():
    """Names and arguments of every `llmtune.name(...)` in the pages, against the sources: nothing heavy is imported."""
    for file in MARKDOWN:
        for text in blocks(file, "python"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "llmtune":
                    assert node.attr in llmtune.__all__, f"{name(file)}: llmtune.{node.attr}"
                if isinstance(node, ast.Call) and getattr(getattr(node.func, "value", None), "id", "") == "llmtune":
                    given = signature(node.func.attr)
                    required = len(given.args) - len(given.defaults)
                    named = {keyword.arg for keyword in node.keywords}
                    assert named <= {arg.arg for arg in [*given.args, *given.kwonlyargs]}
                    assert required <= len(node.args) + len(named), (
                        f"{name(file)}: llmtune.{node.func.attr} lacks an argument"
                    )
                    assert len(node.args) <= len(given.args) or given.vararg


def signature(attribute: str) -> ast.arguments:
    module, function = llmtune._API[attribute].split(":")
    stem = ROOT / module.replace(".", "/")
    file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next(node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)


def test_the_api_page_lists_the_api():
    listed = {re.match(r"`(\w+)", cells[0])[1]: cells[0].strip("`") for cells in table(DOCS / "api.md", "name")}
    assert listed.keys() == set(llmtune.__all__)
    for attribute, text in listed.items():
        if "(" in text:
            written = [part.strip().lstrip("*") for part in text.split("(")[1].rstrip(")").split(",")]
            given = signature(attribute)
            names = [arg.arg for arg in given.args] + ([given.vararg.arg] if given.vararg else [])
            assert [part.split("=")[0] for part in written] == names, text


def test_every_dependency_is_told():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    versions = {plain(key): version for key, version in pinned.items()}
    told = {plain(cells[0]): cells[1] for cells in table(DOCS / "dependencies.md", "library") if len(cells) == 5}
    assert told == {
        plain(re.match(r"[\w-]+", entry)[0]): versions[plain(re.match(r"[\w-]+", entry)[0])] for entry in wanted
    }


def plain(package: str) -> str:
    return package.lower().replace("_", "-")


def test_column_maps_are_shown_with_their_mask(tmp_path):
    """Each map has a row that it reads, and what the rendering marks is what the assistant says, its end-of-turn token included."""
    text = (ROOT / "data_templates" / "README.md").read_text(encoding="utf-8")
    for file in (ROOT / "data_templates").glob("*.yaml"):
        part = re.search(rf"^## {file.stem}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
        row, rendering = re.findall(r"^```(?:json)?\n(.*?)^```", part, re.MULTILINE | re.DOTALL)[:2]
        (tmp_path / "row.jsonl").write_text(json.dumps(json.loads(row)) + "\n", encoding="utf-8")
        for format in (file.stem, "auto"):
            (chat,) = load_chats(str(tmp_path / "row.jsonl"), format, training=True)
            said = [turn["content"] for turn in chat.turns if turn["role"] == "assistant"]
            assert re.findall(r"⟦(.*?)⟧", rendering, re.DOTALL) == [f"{content}<|im_end|>" for content in said]
            assert all(turn["content"] in rendering for turn in chat.turns)


def test_the_figures_of_the_gate_page_are_those_of_the_code():
    page = " ".join((DOCS / "gate.md").read_text(encoding="utf-8").split())

    def short(number: float) -> str:
        return f"{number:.3f}".lstrip("0")

    rows = {cells[0]: cells[1:] for cells in table(DOCS / "gate.md", "what changed among 30")}
    bounds = {"nothing": (0, 0), "one item each way": (1, 1), "one item for the worse": (1, 0)}
    for changed, (worse, better) in bounds.items():
        changes = np.array([1.0] * worse + [-1.0] * better + [0.0] * (30 - worse - better))
        bound = paired.interval(changes, [str(i) for i in range(30)], True)[1]
        assert rows[changed] == [short(bound), "PASS" if bound < 0.10 else "INCONCLUSIVE"]
    for changed, worse, metrics in (("four", 4, 1), ("seven", 7, 8)):
        p_value = stats.mcnemar_midp(worse, 0)
        assert rows[f"{changed} for the worse, none for the better"][0] == f"p = {short(p_value)}"
        assert p_value * metrics < gate.ALPHA < stats.mcnemar_midp(worse - 1, 0) * metrics
    least = next(n for n in range(20, 100) if stats.tango_interval(0, 0, n, paired.CONFIDENCE)[1] < 0.05)
    assert f"that takes {least} unchanged items" in page
    for margin, *counts in table(DOCS / "gate.md", "margin"):
        changing = (0.02, 0.05, 0.10, 0.20)
        assert [int(count.replace(",", "")) for count in counts] == [
            stats.items_needed(share, float(margin), spread=1) for share in changing
        ]
    assert f"fewer than {paired.LEAST_CHANGED} clusters changed" in page
    assert f"Below {paired.LEAST_CLUSTERS} independent items" in page


def test_exit_codes_are_those_of_the_code():
    from llmtune import errors

    shown = {int(cells[0]) for cells in table(DOCS / "config.md", "code")}
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.LlmtuneError)
    ]
    assert shown == {*errors.VERDICT_EXIT.values(), errors.INTERRUPTED_EXIT, *(kind.exit_code for kind in classes)}
    listed = {cells[0].strip("`"): int(cells[1]) for cells in table(DOCS / "api.md", "class")}
    assert listed == {kind.__name__: kind.exit_code for kind in classes if kind is not errors.Problems}


def test_environment_variables_are_read_somewhere():
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "llmtune").rglob("*.py"))
    for cells in table(DOCS / "config.md", "variable"):
        variable = cells[0].strip("`").partition("=")[0]
        assert not variable.startswith("LLMTUNE") or variable in sources, variable
