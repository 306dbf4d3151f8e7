"""Answers that people labelled, for measuring a judge: two published sets, read from a folder of the user's, and one's own.

None comes with llmtune. Each says under which licence it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtune.data.rows import read_rows
from llmtune.errors import ConfigError, DataError, did_you_mean
from llmtune.evaluate.judges import Case

Question = Literal["refused", "harmful"]
REFUSED, HARMFUL = {"refused": True, "partial": True, "complied": False}, {"harmful": True, "harmless": False}
"""What may stand as a label in a file of one's own, and whether it is the positive of its question."""


@dataclass(frozen=True)
class Labelled:
    """One answer and what people say of it. source: who answered. cluster: answers to one prompt are alike."""

    case: Case
    positive: bool
    source: str
    cluster: str


@dataclass(frozen=True)
class LabelledSet:
    """question: what the labels answer, is the answer a refusal (full or partial), or is it harmful?"""

    name: str
    licence: str
    question: Question
    answers: list[Labelled]
    left_out: int = 0
    """Entries without an answer to judge."""


def load(name: str, data: Path | None) -> LabelledSet:
    """The set `name`: a published one, from the folder `data`, or the path of a JSONL file of one's own.

    Raises ConfigError for an unknown set or a folder without it, DataError with every bad row.
    """
    if name.endswith(".jsonl"):
        if data is not None:
            raise ConfigError("--data", "has no effect with a file of your own; remove it")
        return _own(Path(name))
    if name not in SETS:
        raise ConfigError(
            "--set", f"there is no set '{name}'{did_you_mean(name, SETS)}; a file of your own ends in .jsonl"
        )
    published, pattern, read = SETS[name]
    if data is None:
        raise ConfigError("--data", f"{name} is read from a folder; get a copy of {published} and name it here")
    if not data.is_dir():
        raise ConfigError("--data", f"no such folder: {data}")
    files = sorted(file for file in data.rglob("*") if re.fullmatch(pattern, file.name) and file.is_file())
    try:
        found = read(files)
    except (KeyError, TypeError) as error:
        raise DataError(data, f"is not laid out as {published}: {error!r}") from None
    if not found.answers:
        raise ConfigError("--data", f"{data} holds no answers of {name}; it is in {published}")
    return found


def _xstest(files: list[Path]) -> LabelledSet:
    """Röttger et al. 2024: 450 prompts, five models, two people a label; a partial refusal counts as a refusal."""
    answers = [
        Labelled(
            Case(row.fields["prompt"], row.fields["completion"]),
            "refusal" in row.fields["final_label"],
            file.stem.rpartition("_")[2],
            row.fields["prompt"],
        )
        for file in files
        for row in read_rows(str(file))
    ]
    licence = "CC-BY-4.0 (prompts and labels); the answers under the terms of the models that wrote them"
    return LabelledSet("xstest_human", licence, "refused", answers)


def _jailbreaks(files: list[Path]) -> LabelledSet:
    """Chao et al. 2024: answers to jailbreak prompts; `jailbroken` is a language model's label, and a weak one."""
    answers, left_out = [], 0
    for document in _documents(files):
        model, method = document["parameters"]["model"], document["parameters"]["method"]
        for entry in document["jailbreaks"]:
            if not entry.get("response") or entry.get("jailbroken") is None:
                left_out += 1
                continue
            case = Case(entry.get("goal") or entry["prompt"], entry["response"])
            answers.append(Labelled(case, bool(entry["jailbroken"]), f"{method}, {model}", case.prompt))
    return LabelledSet("jbb_artifacts", "MIT; labels by a language model", "harmful", answers, left_out)


def _documents(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The files of attacks; the repository also has notes on attacks, and files for its own tests."""
    for file in files:
        if "test-artifact" in file.parts:
            continue
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(file, f"is not JSON: {error}") from None
        if isinstance(document, dict) and {"parameters", "jailbreaks"} <= document.keys():
            yield document


def _own(file: Path) -> LabelledSet:
    """Lines with prompt, response, label and, where wanted, source and cluster; what else they hold goes to the judge."""
    answers, problems, labels = [], [], set()
    for row in read_rows(str(file)):
        fields = dict(row.fields)
        texts = [fields.pop(key, None) for key in ("prompt", "response", "label")]
        if not all(isinstance(text, str) for text in texts):
            problems.append(f"{row.place}: needs the texts prompt, response and label")
            continue
        prompt, response, label = texts
        if label not in REFUSED | HARMFUL:
            problems.append(f"{row.place}: unknown label {label!r}{did_you_mean(label, REFUSED | HARMFUL)}")
            continue
        labels.add(label)
        source, cluster = str(fields.pop("source", "all")), str(fields.pop("cluster", prompt))
        answers.append(Labelled(Case(prompt, response, fields), (REFUSED | HARMFUL)[label], source, cluster))
    if labels & REFUSED.keys() and labels & HARMFUL.keys():
        problems.append("labels of refusal and labels of harm are two questions; put them into two files")
    if problems:
        raise DataError(file, problems)
    question: Question = "harmful" if labels & HARMFUL.keys() else "refused"
    return LabelledSet(file.stem, "your own", question, answers)


SETS: dict[str, tuple[str, str, Callable[[list[Path]], LabelledSet]]] = {
    # where it is published, which of its files hold labelled answers, and how they are read
    "xstest_human": (
        "https://github.com/paul-rottger/exaggerated-safety",
        r"(xstest_v2_)?completions_[a-z0-9]+\.csv",
        _xstest,
    ),
    "jbb_artifacts": ("https://github.com/JailbreakBench/artifacts", r".*\.json", _jailbreaks),
}
