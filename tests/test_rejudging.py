"""Another judge on the same stored answers: new scores beside the old ones, what it judges otherwise counted both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from judged_run import GARBLED, HELP, LATE, SORRY, write

from llmtune import artifact, gate, scores
from llmtune.cli import main
from llmtune.errors import ArtifactError
from llmtune.evaluate import judges
from llmtune.evaluate.judges.pattern import RefusalPattern


@pytest.fixture
def run(tmp_path: Path) -> Path:
    answers = {f"h{n:02}": (SORRY, LATE if n < 5 else SORRY) for n in range(24)}
    write(tmp_path / "run", {"harmful": answers, "benign": {f"b{n:02}": (HELP, HELP) for n in range(24)}}, again=True)
    return tmp_path / "run"


def files(folder: Path) -> dict[str, str]:
    return {path.name: artifact.sha256_file(path) for path in folder.iterdir()}


def test_another_judge_judges_the_stored_answers(run: Path, tmp_path: Path, capsys) -> None:
    before = files(run / "scores")
    code = main(["judge", "again", str(run), "--judge", "openers", "--output", str(tmp_path / "o")])
    said = capsys.readouterr().out
    assert code == 0, said
    assert files(run / "scores") == before
    old, made = artifact.read(run / "scores"), artifact.read(tmp_path / "o" / "scores", "scores")
    assert made.manifest["parents"] == [old.parent()]
    assert made.manifest["subject"] == old.manifest["subject"]
    assert made.manifest["judges"].keys() == {"openers"}
    assert made.manifest["judged_before"].keys() == {"refusal_pattern"}
    assert said.startswith("5 of 96 answers are judged otherwise by openers 1 than by refusal_pattern")
    assert "refused to complied: 5" in said
    mine = {(s.suite, s.arm, s.metric, s.item_id): s for s in scores.read(made.path / scores.FILE)}
    theirs = {(s.suite, s.arm, s.metric, s.item_id): s for s in scores.read(old.path / scores.FILE)}
    assert mine.keys() == theirs.keys()
    changed = {key for key in mine if mine[key].outcome != theirs[key].outcome}
    assert {key[:2] + key[3:] for key in changed} == {("harmful", "tuned", f"h{n:02}") for n in range(5)}
    assert {s.judge["id"] for s in mine.values() if s.outcome} == {"openers"}
    assert made.manifest["noise_floor"]["harmful"]["complied"]["items"] == 24
    with pytest.raises(ArtifactError, match="the judge openers 1 has no card"):
        gate.run(made.path)


def test_the_same_judge_says_the_same(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"kind": "refusal_pattern"}))
    words = ["judge", "again", str(run / "scores"), "--judge", str(tmp_path / "judge.yaml"), "--json"]
    assert main([*words, "--output", str(tmp_path / "same")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["answers"], told["changed"], told["unscored"]) == (96, 0, 0)
    assert scores.read(tmp_path / "same" / "scores" / scores.FILE) == scores.read(run / "scores" / scores.FILE)
    verdict = gate.run(tmp_path / "same" / "scores")
    assert verdict.manifest["subject"] == artifact.read(run / "scores").manifest["subject"]
    assert main([*words, "--output", str(tmp_path / "same")]) == 2  # nothing is overwritten
    assert "is finished already" in capsys.readouterr().err


def test_a_judge_that_fails_on_one_answer_leaves_that_one_unscored(
    run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    class Crashing(RefusalPattern):
        def judge(self, cases):
            return judges.one_by_one(lambda case: {}["x"] if case.prompt.endswith("h07") else super_judge(case), cases)

    def super_judge(case):
        return RefusalPattern.judge(pattern, [case])[0]

    pattern = judges.load(judges.JudgeConfig(), "run.yaml")
    monkeypatch.setattr("llmtune.evaluate.judges.pattern.RefusalPattern", Crashing)
    words = ["judge", "again", str(run), "--judge", "refusal_pattern", "--output", str(tmp_path / "new"), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["changed"], told["unscored"]) == (2, 2)  # of both arms
    found = [s for s in scores.read(tmp_path / "new" / "scores" / scores.FILE) if s.item_id == "h07" and s.outcome]
    assert {(s.outcome, s.value) for s in found} == {("unscored", None)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "opners", "--output", "new"], "did you mean 'openers'"),
        (["--judge", "refusal_pattern", "--output", "run/scores/new"], "lies in the scores themselves"),
        (["--judge", "openers", "--output", "run/scores"], "is a finished step itself"),
        (["--judge", "openers", "--output", "new"], "goes by 'refusal_margin', which is not among"),
    ],
)
def test_what_cannot_be_judged_again_is_said(tmp_path: Path, capsys, monkeypatch, words, message) -> None:
    write(tmp_path / "run", {"harmful": {"a": (SORRY, GARBLED)}}, margin=False)
    monkeypatch.chdir(tmp_path)
    assert main(["judge", "again", "run", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
