"""Ask an arm what a suite wants to know, unit by unit, and keep each answer: the only place where evaluation meets a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtune import artifact, ranks
from llmtune.config.metrics import METRICS
from llmtune.data.openers import encode_openers
from llmtune.data.tokens import IGNORED, TokenRow, encode_answer, encode_prompt
from llmtune.errors import ConfigError, DataError
from llmtune.evaluate.endpoint import EndpointError
from llmtune.evaluate.observations import Observation, Store
from llmtune.evaluate.subjects import Memory, Subject
from llmtune.evaluate.suites import Item, Suite, fingerprint
from llmtune.model import infer, load
from llmtune.progress import Progress, say

UNIT = 64
"""Items a unit where no batch size is asked for: losses are batched by their tokens."""
BATCHED = ("answer", "loss", "text")
"""Probes whose items are computed together; an item's choices and openers are computed alone, whatever the batch size."""
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """A way to answer: a model, example turns before the prompt, and how many items at once."""

    name: str
    subject: Subject
    batch_size: int
    examples: Turns = field(default_factory=list)
    again: bool = False
    """Measured a second time in other batches, to see what that alone changes."""

    def turns(self, item: Item) -> Turns:
        system = item.turns[:1] if item.turns and item.turns[0]["role"] == "system" else []
        return [*system, *self.examples, *item.turns[len(system) :]]


@dataclass(frozen=True)
class Unit:
    """What is done at once and kept at once: some items of one probe, or a task of lm-eval."""

    key: str
    probe: str
    items: list[int]
    task: str = ""


def plan(arm: Arm, suite: Suite, memory: Memory) -> list[Unit]:
    """The units of an arm on a suite, the same in every process and after every interruption."""
    subject = arm.subject
    words = subject.source.words_sha256 if subject.source else ""
    rest = [words, subject.source and subject.source.quantize, memory.dtype, memory.device, artifact.versions()]
    made = []
    for probe in probes(suite):
        if arm.again and probe not in BATCHED:
            continue
        shares: list[tuple[list[int], str]] = []
        if probe == "lm_eval":  # few-shot examples are drawn in order, so that a task is one piece
            shares = [([], name) for name in suite.tasks]
        else:
            asked = suite.drawn() if probe == "answer" else list(range(len(suite.items)))
            size = arm.batch_size if probe == "answer" else min(UNIT, len(asked)) // (1 + arm.again) or 1
            size = 1 if subject.kind == "endpoint" else size
            # by length, so that little is padded; the order of ties is that of the file
            asked.sort(key=lambda n: len(suite.items[n].prompt))
            shares = [(asked[start : start + size], "") for start in range(0, len(asked), size)]
        for items, task in shares:
            suite_sha256 = suite.task_sha256.get(task, suite.sha256)
            who = [arm.name, subject.sha256, arm.batch_size, arm.examples]
            key = fingerprint([*who, *rest, suite_sha256, probe, items, task])
            made.append(Unit(key, probe, items, task))
    return made


def probes(suite: Suite) -> list[str]:
    return ["lm_eval"] if suite.tasks else list(dict.fromkeys(METRICS[name].probe for name in suite.config.metrics))


def require_able(arm: Arm, suite: Suite, place: object) -> None:
    """Raise ConfigError where an endpoint is asked for what it cannot give."""
    if arm.subject.kind != "endpoint":
        return
    if lacking := sorted(set(probes(suite)) - {"answer"}):
        wanted = ", ".join(name for name in suite.config.metrics if METRICS[name].probe in lacking) or "lm-eval's tasks"
        raise ConfigError(
            place, f"{arm.subject.name}: an endpoint only answers, and suite '{suite.name}' wants {wanted}"
        )
    if any(item.prefill for item in suite.items):
        raise ConfigError(place, f"{arm.subject.name}: an endpoint cannot be made to begin an answer ('{suite.name}')")


Encoded = dict[str, dict[int, Any]]


def encode(arm: Arm, suite: Suite, units: list[Unit], memory: Memory, done: Encoded) -> None:
    """Add to `done` every item of the units as tokens; arms that read alike share them. No weight is needed.

    Raises one DataError that names every item that cannot be encoded.
    """
    if arm.subject.kind == "endpoint":
        return
    for probe in dict.fromkeys(unit.probe for unit in units if unit.probe != "lm_eval"):
        key = _reading(arm, suite, probe)
        if key not in done:
            asked = [n for unit in units if unit.probe == probe for n in unit.items]
            done[key] = _encode(ENCODERS[probe], memory.tokenizer(arm.subject), arm, suite, asked)
        positions = arm.subject.source and load.positions(arm.subject.source)
        if probe == "answer" and positions and suite.config.max_new_tokens:
            most, item = max((len(prompt), n) for n, prompt in done[key].items())
            if most + suite.config.max_new_tokens > positions:
                told = f"{most} tokens and max_new_tokens ({suite.config.max_new_tokens}) are more than the model has positions for"
                raise DataError(suite.items[item].place, f"{told} ({positions}); lower max_new_tokens, or shorten it")


def _reading(arm: Arm, suite: Suite, probe: str) -> str:
    """What an item's tokens depend on."""
    words = arm.subject.source.words_sha256 if arm.subject.source else ""
    return fingerprint([words, arm.examples, suite.sha256, probe])


def observe(arm: Arm, suite: Suite, units: list[Unit], memory: Memory, store: Store, encoded: Encoded) -> None:
    """Do this process's share of the units that are not in the store."""
    mine = [unit for unit in units if unit.key not in store][ranks.rank() :: ranks.world_size()]
    for probe in dict.fromkeys(unit.probe for unit in mine):
        todo = [unit for unit in mine if unit.probe == probe]
        if arm.subject.kind == "endpoint":
            _from_endpoint(arm, suite, todo, store)
        elif probe == "lm_eval":
            with memory.active(arm.subject) as model:
                for unit in todo:
                    store.put(unit.key, _lm_eval(arm, suite, unit.task, model, memory.tokenizer(arm.subject)))
        else:
            _ask(arm, suite, todo, memory, store, encoded[_reading(arm, suite, probe)])


def _ask(arm: Arm, suite: Suite, units: list[Unit], memory: Memory, store: Store, encoded: dict[int, Any]) -> None:
    tokenizer, probe = memory.tokenizer(arm.subject), units[0].probe
    title, number = f"{arm.name}: {suite.name}, {TITLES[probe]}", sum(len(unit.items) for unit in units)
    with memory.active(arm.subject) as model, Progress(title, number) as bar:
        for unit in units:
            asked = [encoded[n] for n in unit.items]
            facts = PROBES[probe](model, tokenizer, asked, suite.config.max_new_tokens, bar.advance)
            store.put(unit.key, _observed(arm, suite, unit, facts))


def _observed(arm: Arm, suite: Suite, unit: Unit, facts: list[dict[str, Any]]) -> Iterator[Observation]:
    for n, fact in zip(unit.items, facts, strict=True):
        item = suite.items[n]
        yield Observation(arm.name, suite.name, item.item_id, unit.probe, request_sha256(arm, item), **fact)


def request_sha256(arm: Arm, item: Item) -> str:
    """What the model was asked, before its chat template wrote it: two models with unlike templates get the same."""
    return fingerprint([arm.turns(item), item.tools, item.prefill, item.choices, item.text])


def _encode(encode: Callable[..., Any], tokenizer: Any, arm: Arm, suite: Suite, asked: list[int]) -> dict[int, Any]:
    encoded, problems = {}, []
    for n in asked:
        try:
            encoded[n] = encode(tokenizer, arm, suite.items[n])
        except ValueError as error:
            problems.append(f"{suite.items[n].place}: {error}")
    if problems:
        raise DataError("items", problems)
    return encoded


def _prompt(tokenizer: Any, arm: Arm, item: Item) -> list[int]:
    ids = encode_prompt(tokenizer, arm.turns(item), item.tools)
    return ids + list(tokenizer(item.prefill, add_special_tokens=False)["input_ids"]) if item.prefill else ids


def _answer_row(tokenizer: Any, arm: Arm, item: Item) -> TokenRow:
    return encode_answer(tokenizer, [*arm.turns(item), {"role": "assistant", "content": item.reference}], item.tools)


def _choice_rows(tokenizer: Any, arm: Arm, item: Item) -> list[TokenRow]:
    """One row a choice, each supervised to its end of turn: a choice that begins like a likely longer text is not it."""
    said = ({"role": "assistant", "content": choice} for choice in item.choices or [])
    return [encode_answer(tokenizer, [*arm.turns(item), turn], item.tools) for turn in said]


def _opener_rows(tokenizer: Any, arm: Arm, item: Item) -> list[TokenRow]:
    return encode_openers(tokenizer, _prompt(tokenizer, arm, item))


def _text_row(tokenizer: Any, _: Arm, item: Item) -> TokenRow:
    ids = list(tokenizer(item.text)["input_ids"])
    if len(ids) < 2:
        raise ValueError("has fewer than two tokens, so nothing to predict")
    return TokenRow(ids, [IGNORED, *ids[1:]])


def _answers(model: Any, tokenizer: Any, prompts: list[Any], most: int, done: Any) -> list[dict[str, Any]]:
    answers = infer.generate(model, tokenizer, prompts, most, len(prompts), on_batch=done)
    return [{"text": a.text, "tokens": a.tokens, "ended": a.ended, "latency_s": a.latency_s} for a in answers]


def _losses(model: Any, tokenizer: Any, rows: list[Any], _: int, done: Any) -> list[dict[str, Any]]:
    losses = infer.token_losses(model, rows, tokenizer.pad_token_id, on_batch=done)
    return [{"loss": loss, "tokens": row.supervised} for loss, row in zip(losses, rows, strict=True)]


def _logprobs(model: Any, tokenizer: Any, items: list[Any], _: int, done: Any) -> list[dict[str, Any]]:
    """Of each row of each item; what the rows of an item begin with is run once."""
    found = []
    for rows in items:
        found.append({"logprobs": infer.log_probabilities(model, rows, tokenizer.pad_token_id)})
        done(1)
    return found


TITLES = {"answer": "answers", "loss": "loss", "text": "loss", "choices": "choices", "openers": "openers"}
ENCODERS: dict[str, Callable[..., Any]] = {
    "answer": _prompt,
    "loss": _answer_row,
    "text": _text_row,
    "choices": _choice_rows,
    "openers": _opener_rows,
}
PROBES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "answer": _answers,
    "loss": _losses,
    "text": _losses,
    "choices": _logprobs,
    "openers": _logprobs,
}


def _from_endpoint(arm: Arm, suite: Suite, units: list[Unit], store: Store) -> None:
    """Answers over the network, `batch_size` requests at once. One that failed is observed as that, and asked for again when
    the command is."""
    endpoint, most = arm.subject.endpoint(), suite.config.max_new_tokens
    assert most is not None, "checked when the suite was read"

    def ask(unit: Unit) -> dict[str, Any]:
        try:
            item = suite.items[unit.items[0]]
            reply = endpoint.complete(arm.turns(item), most, item.tools)
        except EndpointError as error:
            return {"error": str(error)}
        return asdict(reply)

    with (
        Progress(f"{arm.name}: {suite.name}, answers", len(units)) as bar,
        ThreadPoolExecutor(arm.batch_size) as threads,
    ):
        try:
            asked = {threads.submit(ask, unit): unit for unit in units}
            for answered in as_completed(asked):
                unit = asked[answered]
                store.put(unit.key, _observed(arm, suite, unit, [answered.result()]))
                bar.advance()
        except BaseException:  # what is under way is let go, or the others would be waited for
            endpoint.stop()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def _lm_eval(arm: Arm, suite: Suite, name: str, model: Any, tokenizer: Any) -> Iterator[Observation]:
    """A task of lm-eval; with the first of its items lm-eval's own row of the whole task."""
    from llmtune.evaluate import capability

    say(f"  {arm.name}: {suite.name}, lm-eval's {name}")
    wanted = suite.config
    result = capability.run(
        model,
        tokenizer,
        suite.tasks[name],
        arm.batch_size,
        limit=wanted.limit,
        chat_template=wanted.chat_template,
        unsafe_code=wanted.unsafe_code,
    )
    for note in result.notes:
        say(f"  note: lm-eval's {name}: {note}")
    table: dict[str, float | None] | None = {**result.aggregates, "sample_len": result.sample_len}
    for item in result.items:
        slices = {field: str(item.doc[field]) for field in wanted.slices if field in item.doc}
        about = {
            "cluster_id": item.item_id if (own := item.doc.get("cluster")) in (None, "") else str(own),
            "turns": [{"role": "user", "content": item.prompt}],
            "slices": slices | ({"task": name} if len(suite.tasks) > 1 else {}),
            "text": item.question,
            "reference": item.reference,
            "choices": item.choices,
            "right": item.right,
        }
        yield Observation(
            arm.name,
            suite.name,
            item.item_id,
            "lm_eval",
            fingerprint([name, str(item.doc)]),
            text=item.response,
            measured=item.metrics,
            higher=item.higher_is_better,
            logprobs=item.logprobs,
            item={key: fact for key, fact in about.items() if fact is not None},
            table=table,
        )
        table = None
