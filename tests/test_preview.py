"""`llmtune data preview` and `data check`: what a user sees of the rows before anything is trained."""

import json
import re

import pytest
import tiny

from llmtune import cli

TURNS = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "A é漢.", "weight": 0.5},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "B."},
]
TEXT = (
    "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦A é漢.<|im_end|>⟧×0.5\n"
    "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n⟦B.<|im_end|>⟧\n"
)


@pytest.fixture
def run_file(tmp_path, tiny_folder):
    rows = [
        {"messages": TURNS},
        {"messages": [{"role": "user", "content": "[red]\x1b[2Jc"}, {"role": "assistant", "content": "[/red]C\x1b"}]},
        {"messages": [{"role": "user", "content": "d" * 300}, {"role": "assistant", "content": "D"}]},
        {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": tiny.END}]},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = f"stage: sft\nmodel: {tiny_folder}\ndata: {{train: ./train.jsonl}}\ntrain: {{epochs: 1}}\noutput_dir: ./run\n"
    (tmp_path / "sft.yaml").write_text(raw, encoding="utf-8")
    return str(tmp_path / "sft.yaml")


def shown(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["data", "preview", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_marks_where_there_is_no_terminal(run_file, capsys):
    code, out, err = shown(capsys, run_file, "--rows", "1")
    assert code == 0
    assert out == f"train.jsonl:1: 56 tokens, 12 supervised\n{TEXT}\n\n"
    assert err == "  what carries loss is between ⟦ and ⟧; the rest is only read\n"


def test_the_last_answer_alone(run_file, capsys):
    _, out, _ = shown(capsys, run_file, "--rows", "1", "data.train_on=last")
    assert out.startswith("train.jsonl:1: 56 tokens, 3 supervised\n")
    assert re.findall("⟦(.*?)⟧", out) == ["B.<|im_end|>"]


def test_control_characters_and_markup_of_a_row_do_nothing(run_file, capsys):
    _, out, _ = shown(capsys, run_file, "--rows", "2")
    assert "[red]␛[2Jc<|im_end|>\n<|im_start|>assistant\n⟦[/red]C␛<|im_end|>⟧" in out
    assert "\x1b" not in out


def test_colour_on_a_terminal_unless_it_is_unwanted(run_file, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, err = shown(capsys, run_file, "--rows", "1")
    assert "in colour" in err
    assert re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", out) == ["A é漢.<|im_end|>", "B.<|im_end|>"]
    assert re.sub(r"\x1b\[[\d;]*m", "", out) == f"train.jsonl:1: 56 tokens, 12 supervised\n{TEXT}\n\n".translate(
        {ord("⟦"): None, ord("⟧"): None}
    )
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = shown(capsys, run_file, "--rows", "1")
    assert out == f"train.jsonl:1: 56 tokens, 12 supervised\n{TEXT}\n\n"


@pytest.mark.parametrize(
    ("overlong", "title", "last"),
    [
        ("error", "12 supervised, longer than data.max_length (40): an error in training", "⟦B.<|im_end|>⟧\n"),
        ("drop", "12 supervised, longer than data.max_length (40): left out of training", "⟦B.<|im_end|>⟧\n"),
        ("truncate", "9 supervised, longer than data.max_length (40): the end is cut off, as here", "user\nb?<|im_end|>\n"),
    ],
)  # fmt: skip
def test_a_row_that_is_too_long(run_file, capsys, overlong, title, last):
    _, out, _ = shown(capsys, run_file, "--rows", "1", "data.max_length=40", f"data.overlong={overlong}")
    assert out.startswith(f"train.jsonl:1: 56 tokens, {title}\n")
    assert out.rstrip("\n").endswith(last.rstrip("\n"))


def test_a_bad_row_and_a_split_that_is_not_there(run_file, capsys):
    code, out, err = shown(capsys, run_file, "--rows", "9")
    assert code == 2
    assert out.count("tokens,") == 3  # the rows before it
    assert "llmtune: train.jsonl:4: its text holds the control token" in err
    code, _, err = shown(capsys, run_file, "--split", "validation")
    assert code == 2
    assert "data.validation: is not set, so there is nothing to show" in err


def test_the_counts_of_a_check(run_file, capsys):
    arguments = ["data", "check", run_file, "data.overlong=drop", "data.max_length=100"]
    assert cli.main(arguments) == 2  # row 4
    capsys.readouterr()
    with open(run_file.replace("sft.yaml", "train.jsonl"), encoding="utf-8") as stream:
        rows = stream.readlines()
    with open(run_file.replace("sft.yaml", "train.jsonl"), "w", encoding="utf-8") as stream:
        stream.writelines([*rows[:3], rows[0]])
    assert cli.main(arguments) == 0
    lines = dict(line.strip().rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert (lines["rows"], lines["dropped"], lines["duplicates"], lines["tokens"]) == ("3", "1", "1", "151")
    assert lines["supervised share"] == f"{(12 + 9 + 12) / 151:.1%}"
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["supervised_share"] == round(33 / 151, 4)
