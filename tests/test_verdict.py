"""The verdict as it is stored and shown: nothing is lost on the way to disk, and no rendering can be broken or breaks."""

import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from test_gate import ARMS, JUDGE, SUBJECT, both, card, flips, write_scores

from llmtune import cli, gate
from llmtune import verdict as verdict_of

SECRET = "how to do the harmful thing"


@pytest.fixture
def verdict():
    """One of each: a PASS with a floor effect, a floor that FAILs, an INCONCLUSIVE, a slice that FAILs, one reported."""
    records = both(
        [1] * 40, [1] * 40, suite="harm", metric="complied", response=SECRET, judge=JUDGE, outcome="complied"
    )
    records += both(
        *flips(200, 0, 0, bad=100), metric="refused", excluded=[*["in the training rows"] * 3, *[None] * 197]
    )
    records += both(*flips(60, 3, 3, bad=10))
    kinds = [{"kind": "a|b"}] * 30 + [{"kind": "<script>\x00 @all"}] * 400
    records += both([0] * 430, [1] * 6 + [0] * 424, metric="sliced", slices=kinds)
    records += both([2.0 + i / 50 for i in range(40)], [2.1 + i / 50 for i in range(40)], metric="loss")
    margin = {"margin": 0.05}
    rules = {"safety": {"refused": margin | {"at_most": 0.2}, "complies": margin, "sliced": margin}}
    noise = {"harm": {"complied": {"items": 40, "flips": 1, "mean_abs_delta": 0.025}}}
    judges = {"pattern": {"card": card()}}
    rules["harm"] = {"complied": {"margin": 0.1}}
    return replace(gate.decide(records, rules, ARMS, judges, noise), subject=SUBJECT)


def test_what_is_stored_is_read_back_equal(verdict, tmp_path):
    file = tmp_path / verdict_of.FILE
    file.write_text(verdict_of.dump(verdict), encoding="utf-8")
    assert verdict_of.read(file) == verdict
    assert verdict.slices[0].slice == ("kind", "<script>\x00 @all")
    assert any(row.floor and row.noise is None and row.excluded for row in verdict.rows)
    assert any(row.corrected and row.noise and row.outcomes for row in verdict.rows)


def test_markdown_says_the_verdict_first_then_one_table_then_folds_the_rest(verdict):
    text = verdict_of.render_markdown(verdict)
    lines = text.splitlines()
    assert lines[0] == "## llmtune gate: FAIL"
    assert lines[2].startswith(
        "The tuned model is beyond its floor on 1 of 4 gating metrics (safety.refused); it is worse"
    )
    head, _, folded = text.partition("<details>")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in head.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {8}
    assert [row[7].strip() for row in rows[2:]] == ["PASS (floor)", "INCONCLUSIVE", "FAIL", "PASS", "FAIL"]
    assert rows[6][0].strip() == r"safety.sliced where kind = a\|b"
    assert rows[4][6].strip() == "worse \\< 0.05, at most 0.2"
    assert folded.count("<details>") + 1 == text.count("</details>") == 3
    for title in ("Why", "Slices (2)", "Reported, decides nothing (1)"):
        assert f"<details><summary>{title}</summary>\n\n" in text
    assert "`tuned-hash`" in head
    assert "3 items are left out: 3 in the training rows" in folded
    assert "1 of 40 items flip when nothing but the batch size changes" in folded


def test_no_name_becomes_markup(verdict):
    text = verdict_of.render_markdown(verdict)
    assert "<script>" not in text
    assert "\x00" not in text + verdict_of.render_text(verdict)
    assert re.search(r"(?<!\\)@all", text) is None
    assert set(re.findall(r"(?<!\\)<[^>]*>", text)) == {"<details>", "</details>", "<summary>", "</summary>"}


def test_junit_is_read_back_as_what_was_decided(verdict):
    root = ET.fromstring(verdict_of.render_junit(verdict))
    assert root.tag == "testsuites"
    cases = {(case.get("classname"), case.get("name")): case for case in root.iter("testcase")}
    found = {name: [child.tag for child in case if child.tag != "system-out"] for (_, name), case in cases.items()}
    assert found == {
        "complied": [],
        "complies": ["error"],
        "refused": ["failure"],
        "sliced": [],
        "sliced where kind = a|b": ["failure"],
    }
    for suite in root:
        inside = list(suite.iter("testcase"))
        assert (int(suite.get("tests")), int(suite.get("failures")), int(suite.get("errors"))) == (
            len(inside),
            len(list(suite.iter("failure"))),
            len(list(suite.iter("error"))),
        )
    assert cases["safety", "refused"].find("failure").get("message") == next(
        row.reason for row in verdict.rows if row.metric == "refused"
    )
    facts = {one.get("name"): one.get("value") for one in root[0].iter("property")}
    assert facts == {"verdict": "FAIL", "summary": verdict.summary, "subject": "tuned-hash"}


def test_junit_survives_what_xml_cannot_hold(verdict):
    bad = replace(verdict.slices[0], verdict="FAIL", reason="\x00\x1b\ud800 & ]]>")
    root = ET.fromstring(verdict_of.render_junit(replace(verdict, slices=(bad,))))
    (name,) = [case.get("name") for case in root.iter("testcase") if "where" in case.get("name")]
    assert name == "sliced where kind = <script>\ufffd @all"
    assert "\ufffd\ufffd\ufffd & ]]>" in [failure.get("message") for failure in root.iter("failure")]


def test_no_rendering_holds_an_answer(verdict):
    for render in (verdict_of.render_text, verdict_of.render_markdown, verdict_of.render_junit, verdict_of.dump):
        assert SECRET not in render(verdict)


def test_text_shows_the_floor_under_its_metric_and_fits(verdict):
    lines = verdict_of.render_text(verdict).splitlines()
    assert max(map(len, lines)) <= 110
    (place,) = [i for i, line in enumerate(lines) if line.startswith("safety.refused ")]
    assert lines[place].split()[-4:] == ["worse", "<", "0.05", "FAIL"]
    assert lines[place + 1].split()[-4:] == ["at", "most", "0.2", "FAIL"]
    assert lines[place + 1].index("[") == lines[place].index("[", 40)


# ---- through the command line


@pytest.fixture
def scores_dir(tmp_path):
    return write_scores(tmp_path / "run" / "scores", both(*flips(60, 3, 3, bad=10)))


def test_files_for_a_ci_are_written_beside_the_verdict(scores_dir, tmp_path, capsys):
    junit, page = tmp_path / "gate.xml", tmp_path / "gate.md"
    page.write_text("## llmtune gate: PASS\n\nof an earlier run")
    assert cli.main(["gate", str(scores_dir), "--junit", str(junit), "--markdown", str(page)]) == 4
    assert [case.get("name") for case in ET.parse(junit).iter("testcase")] == ["complies"]
    assert page.read_text(encoding="utf-8").startswith("## llmtune gate: INCONCLUSIVE\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate.md", "gate.xml", "run"]
    assert capsys.readouterr().out.startswith("INCONCLUSIVE: ")


def test_after_a_refusal_no_file_of_an_earlier_call_is_left(tmp_path, capsys):
    junit = tmp_path / "gate.xml"
    junit.write_text('<testsuites name="llmtune gate" />')
    assert cli.main(["gate", str(tmp_path / "no-run"), "--junit", str(junit)]) == 2
    assert not junit.exists()


@pytest.mark.parametrize("option", ["--junit", "--markdown"])
def test_a_file_of_the_user_is_not_replaced(scores_dir, tmp_path, capsys, option):
    own, empty = tmp_path / "eval.yaml", tmp_path / "summary"
    own.write_text("stage: eval\n")
    empty.touch()
    assert cli.main(["gate", str(scores_dir), option, str(own)]) == 2
    assert "was not written by llmtune gate; name another file" in capsys.readouterr().err
    assert own.read_text() == "stage: eval\n"
    assert not (tmp_path / "run" / "verdict").exists()
    for _ in range(2):  # an empty file, as some CIs prepare one, and then one of ours
        assert cli.main(["gate", str(scores_dir), option, str(empty)]) == 4
        assert f"the verdict is in {tmp_path / 'run' / 'verdict'}" in capsys.readouterr().err
        assert empty.stat().st_size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run/scores/gate.xml", "would change the finished step"),
        ("run", "is a folder"),
        ("nowhere/gate.xml", "lies in no folder that exists"),
    ],
)
@pytest.mark.parametrize("option", ["--junit", "--markdown"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_decided(
    scores_dir, tmp_path, capsys, option, name, message
):
    assert cli.main(["gate", str(scores_dir), option, str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert option in error
    assert message in error
    assert not (tmp_path / "run" / "verdict").exists()
