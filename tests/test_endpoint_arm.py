"""A served model as an arm: asked for several answers at once, its failures counted, asked again for those alone."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from llmtune import artifact, config, gate, scores
from llmtune.cli import main
from llmtune.config.eval import SuiteConfig
from llmtune.errors import ConfigError, UserError
from llmtune.evaluate import arms, endpoint, subjects
from llmtune.evaluate.observations import Observation, Store

ITEMS = 24
SUITE = {
    "suite": "asked",
    "description": "made here",
    "licence": "own",
    "items": "./items.jsonl",
    "metrics": ["refused", "incoherent", "answer_tokens"],
    "max_new_tokens": 8,
    "gate": {"refused": {"margin": 0.2}},
}


class Server(ThreadingHTTPServer):
    """Answers as two models do: "polite" refuses every fourth request, "blunt" none; `broken` prompts get garbage."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[tuple[str, str]] = Counter()
        self.broken: set[str] = set()
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, model = asked["messages"][-1]["content"], asked["model"]
        self.server.asked[model, prompt] += 1
        self.server.keys.add(self.headers.get("Authorization"))
        if model == "judge":  # likes the polite answers of prompts 0 to 11, and the first place elsewhere
            first, second = (prompt.index(f"<answer_{place}>") for place in "ab")
            refusal, number = prompt.find("I'm sorry"), int(prompt.split("</request>")[0].split()[-1])
            verdict = "A" if refusal < 0 or number > 11 else "A" if first < refusal < second else "B"
            self.reply(f"VERDICT: {verdict}")
            return
        refuses = model == "polite" and int(prompt.split()[-1]) % 4 == 0
        text = "I'm sorry, but I cannot help with that." if refuses else f"Here is an answer to {prompt}"
        self.reply(text, garbage=prompt in self.server.broken)

    def reply(self, text: str, *, garbage: bool = False) -> None:
        reply = {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": len(text.split())},
        }
        body = b"<html>" if garbage else json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    items = [{"id": f"i{n}", "prompt": f"How is it with number {n}"} for n in range(ITEMS)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(SUITE))
    return tmp_path


def evaluate(folder: Path, base: str, tuned: str, **changes: object) -> artifact.Artifact:
    raw = {
        "stage": "eval",
        "base": base,
        "tuned": tuned,
        "output_dir": "./out",
        "suites": ["./asked.yaml"],
        **changes,
    }
    return arms.run(config.build(raw, folder / "eval.yaml"), folder / "eval.yaml")


def test_two_served_models_are_compared(server: Server, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    models = [f"{server.url}?api_key_env=MY_KEY#blunt", f"{server.url}?api_key_env=MY_KEY#polite"]
    code = main(["compare", *models, "--suites", str(folder / "asked.yaml"), "--output", str(folder / "c"), "--json"])
    verdict = json.loads(capsys.readouterr().out)
    assert (code, verdict["verdict"]) == (3, "FAIL")
    row = next(row for row in verdict["rows"] if row["metric"] == "refused")
    assert (row["n"], row["base"], row["tuned"]) == (ITEMS, 0.0, 0.25)
    assert set(server.asked.values()) == {1}
    assert server.keys == {"Bearer secret-key"}
    assert "secret-key" not in "".join(f.read_text() for f in (folder / "c").rglob("*") if f.is_file())


def test_what_failed_is_unscored_and_asked_for_again_alone(server: Server, folder: Path, capsys) -> None:
    server.broken = {"How is it with number 3", "How is it with number 8"}
    blunt, polite = f"{server.url}#blunt", f"{server.url}#polite"
    made = evaluate(folder, blunt, polite)
    told = capsys.readouterr().err
    assert "4 answers failed" in told
    assert "2 of 24 answers are unscored" in told or "4 of 48 answers are unscored" in told
    lost = [s for s in scores.read(made.path / scores.FILE) if s.value is None and s.metric == "refused"]
    assert {(s.arm, s.item_id, s.outcome) for s in lost} == {
        (arm, item, "unscored") for arm in ("base", "tuned") for item in ("i3", "i8")
    }
    verdict = gate.read(gate.run(made.path, folder / "verdict"))
    assert sum(next(row for row in verdict.rows if row.metric == "refused").unscored.values()) == 4
    server.broken.clear()
    server.asked.clear()
    again = evaluate(folder, blunt, polite)
    assert sum(server.asked.values()) == 4
    assert not [s for s in scores.read(again.path / scores.FILE) if s.value is None]
    assert not (folder / "out" / ".scores-parts").exists()


def test_what_failed_in_any_process_is_forgotten_once_it_was_answered(tmp_path: Path, monkeypatch) -> None:
    def seen(error: str | None) -> list[Observation]:
        return [Observation("base", "s", "i", "answer", "0", text=None if error else "yes", error=error)]

    for rank, error in (("1", "timed out"), ("0", None)):  # the file of process 1 is read last
        monkeypatch.setenv("RANK", rank)
        Store(tmp_path).put("unit", seen(error))
    assert "unit" in Store(tmp_path)
    assert Store(tmp_path, failed=True)["unit"] == seen(None)


def test_models_exchanged_after_an_interruption_keep_their_answers_apart(server: Server, folder: Path) -> None:
    server.broken = {"How is it with number 3"}
    blunt, polite = f"{server.url}#blunt", f"{server.url}#polite"
    shutil.rmtree(evaluate(folder, blunt, polite).path)  # scores of others are not replaced
    server.broken.clear()
    made = evaluate(folder, polite, blunt)
    refusals = [s.arm for s in scores.read(made.path / scores.FILE) if s.metric == "refused" and s.value]
    assert refusals == ["base"] * 6


def test_requests_that_a_server_rejects_cost_no_other(server: Server, folder: Path) -> None:
    server.broken = {
        f"How is it with number {n}" for n in range(10)
    }  # in a row, and more than a server that is down gets
    made = evaluate(folder, f"{server.url}#blunt", f"{server.url}#polite", batch_size=1)
    scored = [s for s in scores.read(made.path / scores.FILE) if s.metric == "refused" and s.value is not None]
    assert len(scored) == 2 * (ITEMS - 10)


def test_a_server_that_is_down_ends_the_command_at_once_and_loses_nothing(
    server: Server, folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    down = "http://127.0.0.1:9/v1#gone"
    with pytest.raises((UserError, ConfigError), match=r"127\.0\.0\.1:9"):
        evaluate(folder, f"{server.url}#blunt", down, batch_size=2)
    assert len(server.asked) == ITEMS
    evaluate(folder, f"{server.url}#blunt", f"{server.url}#polite", batch_size=2)
    assert set(server.asked.values()) == {1}, "the first model's answers were kept"


def test_a_judge_of_preference_is_asked_in_both_orders(server: Server, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(folder / "cache"))
    suite = {**SUITE, "metrics": ["preferred", "answer_tokens"], "gate": {"answer_tokens": {"margin": 5}}}
    (folder / "asked.yaml").write_text(yaml.safe_dump(suite))
    judge = {"kind": "endpoint", "model": "judge", "base_url": server.url}
    made = evaluate(folder, f"{server.url}#blunt", f"{server.url}#polite", preference=judge)
    values = {
        s.item_id: s.value for s in scores.read(made.path / scores.FILE) if (s.arm, s.metric) == ("tuned", "preferred")
    }
    assert values == {f"i{n}": 1.0 if n in (0, 4, 8) else 0.5 for n in range(ITEMS)}
    assert "in 3 of 6 pairs the place decided" in capsys.readouterr().err
    row = next(r for r in gate.read(gate.run(made.path, folder / "verdict")).rows if r.metric == "preferred")
    assert row.delta == pytest.approx(2 * 3 * 0.5 / ITEMS)
    assert row.verdict is None, "no card says how often such a judge is right"
    with pytest.raises(ConfigError, match="a judge of preference has no card"):
        config.validate(SuiteConfig, {**suite, "gate": {"preferred": {"margin": 0.2}}}, folder / "asked.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://127.0.0.1:1/v1", "names no model"),
        ("http://127.0.0.1:1/v1?key=abc#m", "only api_key_env"),
        ("http://127.0.0.1:1/v1?api_key_env=NOT_SET_HERE#m", "NOT_SET_HERE is not set"),
    ],
)
def test_a_wrong_address_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        subjects.find(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["loss"], "max_new_tokens": None, "gate": {}}, "wants loss"),
        ({"attacks": "./attacks.jsonl"}, "cannot be made to begin an answer"),
    ],
)
def test_what_an_endpoint_cannot_do_is_said(server: Server, folder: Path, changes: dict, message: str) -> None:
    items = [{"id": f"i{n}", "prompt": f"number {n}", "answer": "x"} for n in range(ITEMS)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "attacks.jsonl").write_text('{"id": "sure", "prefill": "Sure, "}\n')
    suite = {key: value for key, value in {**SUITE, **changes}.items() if value is not None}
    (folder / "asked.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(ConfigError, match=message):
        evaluate(folder, f"{server.url}#blunt", f"{server.url}#polite")
    assert not server.asked
