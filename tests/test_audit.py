"""People's verdicts: the right answers are asked about, none is told from which arm, none is lost, and the arithmetic is that of a hand."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judged_run import GARBLED, HELP, SORRY, write

from llmtune import audit, stats
from llmtune.cli import main
from llmtune.cli.audit import visible

ROOT = Path(__file__).resolve().parent.parent
NASTY = "Sure.\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202egnp\u200b[bold]end[/bold]"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """24 harmful requests, 3 of which flip; 24 harmless ones, one of which becomes no words."""
    harmful = {f"h{n:02}": (SORRY, HELP if n < 3 else SORRY) for n in range(24)}
    benign = {f"b{n:02}": (HELP, GARBLED if n == 0 else HELP) for n in range(24)}
    write(tmp_path / "run", {"harmful": harmful, "benign": benign})
    return tmp_path / "run"


@pytest.fixture
def walk(run: Path, monkeypatch, capsys):
    """`walk("r", "c", ...)`: the command on a pipe with these lines; returns (code, stdout, stderr)."""

    def go(*keys: str, words: tuple[str, ...] = ("--by", "ada")) -> tuple[int, str, str]:
        read, write_end = os.pipe()
        os.write(write_end, "".join(f"{key}\n" for key in keys).encode())
        os.close(write_end)
        with os.fdopen(read) as pipe:
            monkeypatch.setattr("sys.stdin", pipe)
            code = main(["audit", str(run), *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


def lines(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]


def truth(run: Path, *, sample: int | None = 0, by: dict[str, str]) -> list[str]:
    """The keys of someone who calls each text what `by` says."""
    keys, shown = [], None
    for question in audit.load(run / "scores").questions(sample):
        if question.pair.hidden and question.pair != shown:
            keys.append("view")
        shown = question.pair
        keys.append(by[question.text])
    return keys


KEYS = {SORRY: "r", HELP: "c", GARBLED: "i"}


def test_flips_are_asked_about_and_every_verdict_is_kept(run: Path, walk) -> None:
    code, out, err = walk(*truth(run, by=KEYS))
    assert code == 0
    said = lines(run)
    assert len(said) == 8
    assert {one["item_id"] for one in said} == {"h00", "h01", "h02", "b00"}
    expected = {"scores_sha256", "suite", "metric", "item_id", "arm", "outcome", "verdict", "by", "at"}
    assert all(one.keys() == expected and one["outcome"] == one["verdict"] for one in said)
    assert {one["metric"] for one in said if one["suite"] == "harmful"} == {"complied"}
    assert {one["metric"] for one in said if one["suite"] == "benign"} == {"refused"}
    assert {one["scores_sha256"] for one in said} == {audit.load(run / "scores").sha256}
    assert "4 items flipped; people looked at 4 of them: 4 confirmed" in out
    assert "base: refused; the judge said refused" in err
    assert "8 answers to look at, 0 of them done by ada" in err


def test_the_arms_cannot_be_told_from_the_order(run: Path) -> None:
    first = [next(iter(pair.answers.values())) for pair in audit.load(run / "scores").pairs if pair.flipped]
    assert {"base", "tuned"} == {arms[0] for arms in first}
    both = next(pair for pair in audit.load(run / "scores").pairs if not pair.flipped)
    assert next(iter(both.answers.values())) in (("base", "tuned"), ("tuned", "base"))  # said alike, asked once


def test_it_goes_on_where_it_was_and_keeps_people_apart(run: Path, walk) -> None:
    keys = truth(run, by=KEYS)
    walk(*keys[:3])  # the input ends in the middle
    done = len(lines(run))
    assert 0 < done < 8
    _, _, err = walk("q")
    assert f"8 answers to look at, {done} of them done by ada" in err
    _, _, err = walk("q", words=("--by", "bob"))
    assert "0 of them done by bob" in err
    assert len(lines(run)) == done
    # verdicts on other scores are there, and no part of this
    with (run / "audit.jsonl").open("a") as stream:
        stream.write(json.dumps({**lines(run)[0], "scores_sha256": "0" * 64, "by": "carl"}) + "\n")
    _, out, _ = walk("q", words=("--by", "ada", "--json"))
    assert json.loads(out)["people"] == ["ada"]


def test_skip_back_and_keys_without_a_meaning(run: Path, walk) -> None:
    asked = audit.load(run / "scores").questions()
    at = next(n for n, question in enumerate(asked) if question.pair.hidden)
    before = truth(run, by=KEYS)[:at]  # the benign one, if it comes first
    walk(*before, "q")
    already = len(before)
    _, _, err = walk("view", "x", "", "R", "c", "b", "r", "s", "q")
    said = lines(run)[already:] if before else lines(run)
    assert [one["verdict"] for one in said] == ["complied", "refused"]  # the second takes the first's place
    assert said[0]["item_id"] == said[1]["item_id"] and said[0]["arm"] == said[1]["arm"]
    assert "the judge said" not in err.split("this text may be harmful")[1]  # not before both are given
    walk("s", "q")  # a pair that is not to be seen is passed over whole
    assert len(lines(run)) == already + 2


def test_a_line_cut_short_is_mended_and_a_broken_one_named(run: Path, walk, capsys) -> None:
    walk(*truth(run, by=KEYS)[:2])
    file = run / "audit.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"scores_sha256": "')
    walk("q")
    assert file.read_text() == whole
    file.write_text(whole[:-1])  # the line is whole, its end is not
    walk("q")
    assert file.read_text() == whole
    file.write_text("nonsense\n" + whole)
    code, _, err = walk("q")
    assert code == 2 and "audit.jsonl:1: is no verdict" in err


def test_the_summary_is_what_a_hand_counts(run: Path, tmp_path: Path) -> None:
    """The judge took two refusals for compliance: to a person only one of the three flips is one."""
    found = audit.load(run / "scores")
    log = audit.Log(run / "audit.jsonl", found.sha256)
    for question in found.questions():
        wrong = question.pair.item_id in ("h01", "h02")
        log.add(
            question,
            "refused" if wrong or question.text == SORRY else {HELP: "complied", GARBLED: "incoherent"}[question.text],
            "ada",
        )
    unflipped = [question for question in found.questions(8) if not question.pair.flipped]
    assert len(unflipped) == 8
    for question in unflipped:
        log.add(question, "partial" if question.pair.suite == "harmful" else "complied", "bob")
    told = audit.summary(found, log)
    assert told["flips_audited"] == {"confirmed": 2, "refuted": 2}
    tuned = told["agreement"]["tuned"]
    assert (tuned["flipped"]["answers"], tuned["flipped"]["agreed"]) == (4, 2)
    assert (tuned["not_flipped"]["answers"], tuned["not_flipped"]["audited"]) == (44, 8)
    agreed = sum(question.pair.suite == "benign" for question in unflipped)
    assert tuned["not_flipped"]["agreed"] == agreed
    low, high = stats.wilson_interval(agreed, 8, 0.95)
    assert tuned["not_flipped"]["low"] == low
    assert tuned["all"]["value"] == pytest.approx((4 * 0.5 + 44 * agreed / 8) / 48)
    assert tuned["all"]["high"] == pytest.approx((4 * 0.5 + 44 * high) / 48)  # every flip was looked at
    assert tuned["confusion"]["complied > refused"] == 2
    row = next(row for row in told["deltas"] if row["suite"] == "harmful")
    assert row["judge"]["delta"] == pytest.approx(3 / 24)
    assert row["people"]["delta"] == pytest.approx(1 / 24)
    write(tmp_path / "other", {"harmful": {f"h{n:02}": (SORRY, HELP if n < 1 else SORRY) for n in range(24)}})
    other = audit.load(tmp_path / "other" / "scores")  # a judge that says what people say comes to the same
    same = audit.summary(other, audit.Log(tmp_path / "other" / "audit.jsonl", other.sha256))["deltas"][0]
    assert row["people"] == same["judge"] == same["people"]
    text = audit.render(told)
    assert "2 confirmed, 2 refuted" in text
    unknown = dict.fromkeys(("delta", "low", "high"))
    assert "no item is scored in both arms" in audit.render(told | {"deltas": [row | {"judge": unknown}]})
    assert told["twice"] == {"answers": 0, "alike": 0}
    for question in unflipped[:2]:
        log.add(question, "refused", "ada")
    assert audit.summary(found, log)["twice"] == {"answers": 4, "alike": 0}


def test_all_and_sample(run: Path, walk) -> None:
    found = audit.load(run / "scores")
    assert len(found.questions()) == 8
    assert len(found.questions(None)) == 8 + 44  # an answer that both arms gave is asked about once
    small = [question.pair for question in found.questions(5)]
    assert {pair.item_id for pair in small} <= {question.pair.item_id for question in found.questions(9)}
    _, _, err = walk("q", words=("--by", "ada", "--sample", "5"))
    assert "13 answers to look at" in err
    code, _, err = walk("q", words=("--all", "--sample", "5"))
    assert code == 2 and "leave out one of them" in err


def test_what_is_hidden_is_the_suites_word_and_what_complies_with_harm(run: Path, tmp_path: Path) -> None:
    assert {pair.suite for pair in audit.load(run / "scores").pairs if pair.hidden} == {"harmful"}
    write(tmp_path / "other", {"secret": {"a": (SORRY, HELP)}})
    assert all(pair.hidden for pair in audit.load(tmp_path / "other" / "scores").pairs)


def test_what_cannot_be_audited_is_said(tmp_path: Path, capsys) -> None:
    (tmp_path / "trained" / "adapter").mkdir(parents=True)
    assert main(["audit", str(tmp_path / "trained"), "--by", "ada"]) == 2
    assert "holds no scores; 'llmtune eval' makes them" in capsys.readouterr().err
    made = write(tmp_path / "run", {"harmful": {"a": (SORRY, SORRY)}})
    file = made.path / "scores.jsonl"
    file.write_text("")
    facts = json.loads((made.path / "llmtune.json").read_text())
    facts["files"]["scores.jsonl"] = {
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "bytes": 0,
    }
    (made.path / "llmtune.json").write_text(json.dumps(facts))
    assert main(["audit", str(tmp_path / "run"), "--by", "ada"]) == 2
    assert "no answer in it was judged" in capsys.readouterr().err


def test_nothing_that_a_terminal_would_obey_reaches_it(tmp_path: Path, capsys, monkeypatch) -> None:
    assert visible("a\tb\nc é 漢 🙂 \u00a0[x]") == "a\tb\nc é 漢 🙂 \u00a0[x]"
    assert visible("\x1b\r\x9b\u202e\u200b\ud800\u2028\x7f") == r"\x1b\r\x9b\u202e\u200b\ud800\u2028\x7f"
    write(tmp_path / "run", {"benign": {"b\x1b[1m": (SORRY, NASTY)}})
    read, write_end = os.pipe()
    os.write(write_end, b"r\nc\n")
    os.close(write_end)
    with os.fdopen(read) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert main(["audit", str(tmp_path / "run"), "--by", "ada"]) == 0
    said = capsys.readouterr()
    shown = said.out + said.err
    assert not {
        letter for letter in shown if ord(letter) < 32 or 127 <= ord(letter) < 160 or letter in "\u202e\u200b"
    } - {"\n"}
    assert r"\x1b[2J" in shown and "[bold]end[/bold]" in shown


def test_on_a_terminal_a_key_is_enough_and_ctrl_c_loses_nothing(run: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtune", "audit", str(run), "--by", "ada"],
        stdin=slave,
        stdout=subprocess.DEVNULL,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(slave)
    seen = b""

    def until(text: bytes) -> bytes:
        nonlocal seen
        before = len(seen)
        while text not in seen[before:]:
            seen += os.read(master, 4096)
        time.sleep(0.1)  # the terminal is read key by key once the question stands there
        return seen[before:]

    try:
        question = audit.load(run / "scores").questions()[0]
        if question.pair.hidden:
            assert question.pair.prompt.encode() not in until(b"quit  ")
            os.write(master, b"v")
        until(b"quit  ")
        os.write(master, b"\x1b[C")  # an arrow is no verdict
        until(b"quit  ")
        os.write(master, KEYS[question.text].encode())
        until(b"quit  ")
        assert [one["verdict"] for one in lines(run)] == [one["outcome"] for one in lines(run)] != []
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        assert len(lines(run)) == 1
    finally:
        process.kill()
        process.wait()
        os.close(master)
