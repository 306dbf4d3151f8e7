"""Suites and their items, read and checked before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtune.config.data import ColumnMap
from llmtune.config.eval import ITEM_COLUMNS, SuiteConfig, read_suite
from llmtune.config.metrics import METRICS
from llmtune.data.chats import Chat, load_chats
from llmtune.data.rows import Row, read_rows
from llmtune.errors import ConfigError, DataError, LlmtuneError, UserError

SEED = 0
CHOICE_COLUMNS = ColumnMap(user=["prompt"], assistant="completion")  # `answer` is the number of the right choice there
LENGTHS = ("short", "middle", "long")


@dataclass(frozen=True)
class Item:
    """One thing to ask: turns before an answer, or plain text, and what the answer is held against.

    text: what a plain text says; of an item of lm-eval its own question, which `turns` holds as its task writes it. prefill: what the
    answer is made to begin with. right: the number of the right one among `choices`. hidden: collapsed in
    a report. excluded: why it is asked and does not count.
    """

    suite: str
    item_id: str
    cluster_id: str
    turns: list[dict[str, Any]]
    reference: str | None = None
    choices: list[str] | None = None
    right: int | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    prefill: str = ""
    slices: dict[str, str] = field(default_factory=dict)
    hidden: bool = False
    excluded: str | None = None
    place: str = ""

    @property
    def prompt(self) -> str:
        """The last thing said to the model."""
        return str(self.turns[-1]["content"]) if self.turns else str(self.text)

    @property
    def question(self) -> str:
        """Its own words, without what a task of lm-eval and the chat template write around them."""
        return self.prompt if self.text is None else self.text


@dataclass(frozen=True)
class Suite:
    """A suite with its items read: our own, or lm-eval's tasks.

    task_sha256: of each task with the settings it is asked under, so that a task is not asked again because another changed.
    """

    config: SuiteConfig
    sha256: str
    items: list[Item]
    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    task_sha256: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.config.suite

    def drawn(self) -> list[int]:
        """The items that are answered in words."""
        most = self.config.generate_items or len(self.items)
        return sorted(random.Random(SEED).sample(range(len(self.items)), min(len(self.items), most)))


def load_suites(names: list[str], place: Path, items: dict[str, str]) -> list[Suite]:
    """The suites of a run file. items: suite -> where its rows lie on this machine.

    Raises ConfigError or DataError naming the place; every suite that is wrong is named, not the first alone.
    """
    suites: list[Suite] = []
    problems: list[UserError] = []
    for name in names:
        try:
            suites.append(load_suite(name, place, items))
        except (ConfigError, DataError) as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(place, [str(problem) for problem in problems])
    known = [suite.name for suite in suites]
    if twice := [name for name, number in Counter(known).items() if number > 1]:
        raise ConfigError(place, f"suites: '{twice[0]}' stands twice")
    if unknown := sorted(items.keys() - set(known)):
        raise ConfigError(place, f"items.{unknown[0]}: is none of the suites of this run ({', '.join(known)})")
    return suites


def load_suite(name: str, place: Path, items: dict[str, str] | None = None) -> Suite:
    """A shipped suite by its name, or one of your own by its path, relative to the folder of `place`."""
    suite, raw, file = read_suite(name, place)
    if elsewhere := (items or {}).get(suite.suite):
        if suite.lm_eval:
            raise ConfigError(place, f"items.{suite.suite}: has no effect: its items are those of lm-eval's tasks")
        suite = suite.model_copy(update={"items": elsewhere})
    if suite.lm_eval:
        from llmtune.evaluate import tasks

        theirs = tasks.load(suite.lm_eval, file, unsafe_code=suite.unsafe_code)
        tasks.require_usable(suite, theirs.tasks, file)
        asked = {key: raw[key] for key in ("suite", "limit", "chat_template", "slices") if key in raw}
        each = {name: fingerprint([asked, sha256]) for name, sha256 in theirs.sha256().items()}
        return Suite(suite, fingerprint([raw, each]), [], theirs.tasks, theirs.groups, each)
    try:
        found = _items(suite, file)
    except UserError:
        raise
    except LlmtuneError as error:  # the hub is out of reach
        raise LlmtuneError(f"{error}; the rows can be a file of yours: items: {{{suite.suite}: ./FILE}}") from None
    ids = Counter(item.item_id for item in found)
    if twice := [identity for identity, number in ids.items() if number > 1]:
        raise DataError(suite.items or "items", [f"the id {identity!r} stands twice" for identity in twice])
    # what is asked and what it is held against; not where it lies
    return Suite(suite, fingerprint([raw, [asdict(replace(item, place="")) for item in found]]), found)


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _items(suite: SuiteConfig, file: Path) -> list[Item]:
    needs: set[str] = {METRICS[name].need for name in suite.metrics}
    if "text" in needs and needs != {"text"}:
        raise ConfigError(file, "metrics: text_loss is measured on plain text, and stands alone in a suite")
    made = list(_plain_texts(suite) if needs == {"text"} else _asked(suite, needs))
    if not made:
        raise DataError(suite.items or "items", f"holds no row with {suite.where}" if suite.where else "holds no rows")
    if suite.limit and suite.limit < len(made):
        made = [made[n] for n in sorted(random.Random(SEED).sample(range(len(made)), suite.limit))]
    if suite.attacks:
        made = [attacked for item in made for attacked in _under(item, _attacks(suite.attacks))]
    return _by_length(made) if "length" in suite.slices else made


def _asked(suite: SuiteConfig, needs: set[str]) -> Iterator[Item]:
    columns = suite.columns or (CHOICE_COLUMNS if "choices" in needs else ITEM_COLUMNS)
    if "tools" in needs and columns.tools is None:
        columns = columns.model_copy(update={"tools": "tools"})
    problems: list[str] = []
    for chat in load_chats(str(suite.items), "auto", columns, training=False, answers="answer" in needs):
        if not _wanted(suite, chat.row):
            continue
        choices, right, wrong = _choices(chat) if "choices" in needs else (None, None, [])
        wrong += ["has no tools, which tool_call_valid needs"] if "tools" in needs and not chat.tools else []
        problems += [f"{chat.row.place}: {problem}" for problem in wrong]
        yield replace(
            _item(suite, chat.row),
            turns=chat.prompt,
            reference=chat.answer,
            tools=chat.tools,
            choices=choices,
            right=right,
        )
    if problems:
        raise DataError(suite.items or "items", problems)


def _plain_texts(suite: SuiteConfig) -> Iterator[Item]:
    for row in read_rows(str(suite.items)):
        text = row.fields.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(row.place, "has no 'text', which text_loss needs")
        if _wanted(suite, row):
            yield replace(_item(suite, row), text=text)


def _item(suite: SuiteConfig, row: Row) -> Item:
    """Identity, cluster and slices of a row."""
    named = [name for name in suite.slices if name != "length"]
    if missing := [name for name in [*named, *([suite.cluster] if suite.cluster else [])] if name not in row.fields]:
        raise DataError(row.place, f"has no '{missing[0]}', by which the suite wants to tell rows apart")
    identity = _named(row.fields.get("id"), row.place)
    cluster = _named(row.fields.get(suite.cluster or "cluster"), identity)
    slices = {name: str(row.fields[name]) for name in named}
    return Item(suite.suite, identity, cluster, [], slices=slices, hidden=suite.hidden, place=row.place)


def _named(value: object, otherwise: str) -> str:
    """A field's value as text; a row of a table that lacks it has None or nothing there."""
    return otherwise if value in (None, "") else str(value)


def _wanted(suite: SuiteConfig, row: Row) -> bool:
    if missing := [name for name in suite.where if name not in row.fields]:
        raise DataError(row.place, f"has no '{missing[0]}', which the suite's 'where' names")
    return all(str(row.fields[name]) == text for name, text in suite.where.items())


def _choices(chat: Chat) -> tuple[list[str] | None, int | None, list[str]]:
    choices, right = chat.row.fields.get("choices"), chat.row.fields.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        return None, None, ["has no 'choices', a list of at least two texts"]
    if type(right) is not int or not 0 <= right < len(choices):
        return (
            None,
            None,
            [f"'answer' is {right!r}, and has to be the number of a choice, from 0 to {len(choices) - 1}"],
        )
    return choices, right, []


def _attacks(file: str) -> list[dict[str, Any]]:
    attacks = []
    for row in read_rows(file):
        kinds = {"template", "prefill"} & row.fields.keys()
        if len(kinds) != 1 or "id" not in row.fields:
            raise DataError(row.place, "an attack has an 'id', and a 'template' or a 'prefill'")
        if "{prompt}" not in str(row.fields.get("template", "{prompt}")):
            raise DataError(row.place, "its template does not hold {prompt}")
        attacks.append(row.fields)
    return attacks


def _under(item: Item, attacks: list[dict[str, Any]]) -> Iterator[Item]:
    """The item under each attack. They are one cluster: five wrappers of a request are no five requests."""
    for attack in attacks:
        turns = item.turns
        if "template" in attack:
            turns = [
                *turns[:-1],
                {**turns[-1], "content": attack["template"].replace("{prompt}", turns[-1]["content"])},
            ]
        yield replace(
            item,
            item_id=f"{item.item_id}~{attack['id']}",
            turns=turns,
            prefill=attack.get("prefill", ""),
            slices={**item.slices, "attack": str(attack["id"])},
        )


def _by_length(items: list[Item]) -> list[Item]:
    """Each item with the third it is in by its prompt's length in characters."""
    order = sorted(range(len(items)), key=lambda n: len(items[n].prompt))
    third = {n: LENGTHS[3 * place // len(items)] for place, n in enumerate(order)}
    return [replace(item, slices={**item.slices, "length": third[n]}) for n, item in enumerate(items)]
