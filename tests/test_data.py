"""Rows and chats: every format from every kind of file, and every bad row named by its place."""

import csv
import json
import os
from pathlib import Path

import families
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from llmtune.config.data import ColumnMap
from llmtune.data.chats import Chat, load_chats
from llmtune.data.rows import fingerprint, read_rows
from llmtune.data.tokens import IGNORED, encode_chat
from llmtune.errors import ConfigError, DataError, LlmtuneError

QUESTION, ANSWER = {"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "Four, naïvely."}
PAIR = [QUESTION, ANSWER]
RULES = {"role": "system", "content": "Be brief."}
FORMATS = {  # format -> a row of it, its turns
    "messages": ({"messages": [RULES, *PAIR]}, [RULES, *PAIR]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2 and 2?"}, {"from": "gpt", "value": "Four, naïvely."}], "system": "Be brief."},
        [RULES, *PAIR],
    ),
    "alpaca": (
        {"instruction": "Add these.", "input": "2 and 2", "output": "Four, naïvely."},
        [{"role": "user", "content": "Add these.\n\n2 and 2"}, ANSWER],
    ),
    "prompt_completion": ({"prompt": "2 and 2?", "completion": "Four, naïvely."}, PAIR),
    "own columns": ({"question": "2 and 2?", "reply": "Four, naïvely."}, PAIR),
}  # fmt: skip
OWN = ColumnMap(user=["question"], assistant="reply")


def write(folder: Path, kind: str, rows: list, name: str = "rows") -> str:
    """`rows` as a file of that kind."""
    file = folder / f"{name}.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with file.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def chats(source, columns=None, format="auto", **more) -> list[Chat]:
    return list(load_chats(source, format, columns, **{"training": True, **more}))


def problems(source, **more) -> list[str]:
    with pytest.raises(DataError) as caught:
        chats(source, **more)
    assert caught.value.exit_code == 2
    return caught.value.problems


# ---- formats and files


KINDS = [(kind, format) for kind in ("json", "jsonl", "parquet") for format in FORMATS]
KINDS += [("csv", format) for format in ("alpaca", "prompt_completion", "own columns")]  # a cell holds no list of turns


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_every_format_from_every_kind_of_file(tmp_path, kind, format):
    row, turns = FORMATS[format]
    columns = OWN if format == "own columns" else None
    found = chats(write(tmp_path, kind, [row, row]), columns)
    assert [chat.turns for chat in found] == [turns, turns]
    first = 2 if kind == "csv" else 1  # the header is line 1
    between = ":" if kind in ("csv", "jsonl") else " row "
    assert [chat.row.place for chat in found] == [f"rows.{kind}{between}{first}", f"rows.{kind}{between}{first + 1}"]
    assert found[0].answer == "Four, naïvely."
    assert found[0].prompt == turns[:-1]
    if columns is None:
        assert chats(write(tmp_path, kind, [row]), format=format)[0].turns == turns


def test_alpaca_without_input(tmp_path):
    rows = [{"instruction": "Add.", "input": "", "output": "4"}, {"instruction": "Add.", "input": None, "output": "4"}]
    for chat in chats(write(tmp_path, "json", [*rows, {"instruction": "Add.", "output": "4"}])):
        assert chat.turns == [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "4"}]


def test_several_files_of_several_formats_in_order(tmp_path):
    one = write(tmp_path, "jsonl", [FORMATS["messages"][0]], "one")
    two = write(tmp_path, "csv", [FORMATS["prompt_completion"][0]], "two")
    assert [chat.row.place for chat in chats([one, two])] == ["one.jsonl:1", "two.csv:2"]


def test_an_answer_that_was_cut_off_keeps_its_mark(tmp_path):
    source = write(tmp_path, "parquet", [{"messages": [QUESTION, {**ANSWER, "cut_off": True}]}, {"messages": PAIR}])
    assert [chat.turns[-1].get("cut_off") for chat in chats(source)] == [True, None]


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps({"messages": PAIR}) + "\n\n")
    assert [chat.row.place for chat in chats(str(tmp_path / "rows.jsonl"))] == ["rows.jsonl:2"]


# ---- bad rows


def turns(*given) -> dict:
    return {"messages": list(given)}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (turns(QUESTION), "has no answer"),
        (turns(), "has no answer"),
        (turns(QUESTION, {"role": "assistant", "content": "  \n"}), "has no answer"),
        (turns(*PAIR, QUESTION), "has no answer"),
        (turns({"role": "user", "content": ""}, ANSWER), "turn 1 is empty"),
        (turns(ANSWER), "turn 1 is the assistant's, and the user's is due"),
        (turns(QUESTION, QUESTION, ANSWER), "turn 2 is the user's, and the assistant's is due"),
        (turns(*PAIR, ANSWER), "turn 3 is the assistant's, and the user's is due"),
        (turns(QUESTION, {"role": "bot", "content": "4"}), "turn 2: unknown role 'bot'"),
        (turns(QUESTION, {"role": ["bot"], "content": "4"}), """turn 2: unknown role "['bot']\""""),
        (turns(QUESTION, {"role": "assistant", "content": 4}), "turn 2: its text is int, not a string"),
        (turns(QUESTION, {"role": "assistant", "content": None}), "turn 2: its text is NoneType, not a string"),
        (turns(QUESTION, {"role": "assistant", "content": [{"text": "4"}]}), "turn 2: its text is list, not a string"),
        (turns(QUESTION, {**ANSWER, "refusal": "no"}), "turn 2: 'refusal' is not supported on a turn of the assistant, and would be lost"),
        (turns({**QUESTION, "name": "Eve"}, ANSWER), "turn 1: 'name' is not supported on a turn of the user, and would be lost"),
        (turns(QUESTION, {"role": "assistant"}), "turn 2 lacks 'role' or 'content'"),
        (turns(QUESTION, "4"), "turn 2 lacks 'role' or 'content'"),
        ({"messages": "2 and 2?"}, "'messages' is not a list of turns"),
        ({"prompt": "2 and 2?", "completion": "4"}, "'messages' is not a list of turns"),
        (turns({**QUESTION, "weight": 0}, ANSWER), "turn 1: 'weight' is not supported on a turn of the user, and would be lost"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, row, problem):
    source = write(tmp_path, "jsonl", [{"messages": PAIR}, row])
    assert problems(source) == [f"rows.jsonl:2: {problem}"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q"}, "has no answer (no column 'completion'; it has prompt; data.columns can say which is which)"),
        ({"prompt": "q", "completion": None}, "has no answer"),
        ({"prompt": "q", "completion": ""}, "has no answer"),
        ({"completion": "a"}, "has no 'prompt'"),
        ({"prompt": "", "completion": "a"}, "turn 1 is empty"),
        ({"prompt": "q", "completion": {"text": "a"}}, "turn 2: its text is dict, not a string"),
        ({"prompt": {"text": "q"}, "completion": "a"}, "turn 1: its text is dict, not a string"),
    ],
)  # fmt: skip
def test_a_bad_row_of_columns_is_named(tmp_path, row, problem):
    assert problems(write(tmp_path, "json", [{"prompt": "q", "completion": "a"}, row])) == [
        f"rows.json row 2: {problem}"
    ]


def test_a_speaker_that_is_no_word(tmp_path):
    row = {"conversations": [{"from": "human", "value": "2 and 2?"}, {"from": ["gpt"], "value": "4"}]}
    assert problems(write(tmp_path, "json", [row])) == ["rows.json row 1: turn 2: unknown role \"['gpt']\""]


def test_every_bad_row_is_named_and_nothing_is_yielded_after_the_first(tmp_path):
    source = write(tmp_path, "jsonl", [turns(*PAIR), turns(QUESTION), turns(*PAIR), turns(ANSWER)])
    found = load_chats(source, training=True)
    assert next(found).row.place == "rows.jsonl:1"
    with pytest.raises(DataError) as caught:
        next(found)
    assert str(caught.value).splitlines() == [
        f"{source}: 2 problems",
        "  rows.jsonl:2: has no answer",
        "  rows.jsonl:4: turn 1 is the assistant's, and the user's is due",
    ]


def test_columns_that_no_format_has(tmp_path):
    (found,) = problems(write(tmp_path, "csv", [{"question": "q", "reply": "a"}]))
    assert found.startswith("has the columns question, reply, which are not those of messages or sharegpt or alpaca or")
    assert "data.columns, such as {user: [question], assistant: reply}" in found
    (found,) = problems(write(tmp_path, "csv", [{"question": "q", "reply": "a"}]), format="alpaca")
    assert "not those of alpaca;" in found
    with pytest.raises(ConfigError, match="unknown format 'alpacca'; did you mean 'alpaca'"):
        chats(write(tmp_path, "csv", [{"question": "q", "reply": "a"}]), format="alpacca")


def test_a_prompt_without_an_answer_is_enough_where_none_is_asked_for(tmp_path):
    (chat,) = chats(write(tmp_path, "jsonl", [{"prompt": "q"}]), training=False, answers=False)
    assert chat.answer is None
    assert chat.prompt == chat.turns == [{"role": "user", "content": "q"}]


def test_a_sealed_row_is_for_evaluation_only(tmp_path):
    source = write(tmp_path, "jsonl", [turns(*PAIR), {**turns(*PAIR), "sealed": True}])
    assert problems(source) == ["is sealed: it belongs to a test split, which training must not see"]
    assert len(chats(source, training=False)) == 2


# ---- tool calls, results, reasoning, weights


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
RESULT = {"role": "tool", "content": "4"}
SCHEMA = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}


def one(folder: Path, row: dict, kind: str = "jsonl", **more) -> Chat:
    (chat,) = chats(write(folder, kind, [row]), **more)
    return chat


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "add", "arguments": '{"a": 2}'}},  # as OpenAI sends it
        {"name": "add", "arguments": {"a": 2}},
    ],
)
def test_a_tool_call_in_any_of_its_shapes(tmp_path, call):
    row = turns(QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, RESULT, ANSWER)
    chat = one(tmp_path, {**row, "tools": [SCHEMA]})
    assert chat.turns[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert chat.turns[2] == RESULT
    assert chat.tools == [{"type": "function", "function": SCHEMA}]
    assert one(tmp_path, {**row, "tools": json.dumps([{"type": "function", "function": SCHEMA}])}).tools == chat.tools
    assert one(tmp_path, {**row, "tools": "[]"}).tools is None
    bare = one(tmp_path, turns(QUESTION, {"role": "assistant", "tool_calls": [call]}))
    assert bare.turns[-1]["tool_calls"] == [CALL]  # an answer that is a call, with nothing said


def test_calls_and_results_that_name_each_other(tmp_path):
    called = {"role": "assistant", "content": "I add.", "tool_calls": [{**CALL, "id": "c1"}, {**CALL, "id": "c2"}]}
    results = [{**RESULT, "tool_call_id": "c2", "name": "add"}, {**RESULT, "tool_call_id": "c1"}]
    found = one(tmp_path, turns(QUESTION, called, *results, ANSWER)).turns
    assert [call["id"] for call in found[1]["tool_calls"]] == ["c1", "c2"]
    assert found[2:4] == results
    source = write(tmp_path, "jsonl", [turns(QUESTION, called, {**RESULT, "tool_call_id": "c3"}, ANSWER)])
    assert problems(source) == ["rows.jsonl:1: turn 3: its tool_call_id is none of the calls' (c1, c2)"]


def test_sharegpt_calls_and_observations(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "2 and 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "Four."},
        ],
        "tools": json.dumps([SCHEMA]),
    }
    chat = one(tmp_path, row)
    assert chat.turns[1:3] == [{"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]
    assert chat.tools == [{"type": "function", "function": SCHEMA}]


def test_what_an_answer_thought_and_what_it_weighs(tmp_path):
    row = turns(QUESTION, {**ANSWER, "reasoning_content": "Hm.", "weight": 0}, QUESTION, {**ANSWER, "weight": 2.5})
    first, last = one(tmp_path, row).turns[1::2]
    assert (first["reasoning_content"], first["weight"], last["weight"]) == ("Hm.", 0, 2.5)
    assert "weight" not in one(tmp_path, turns(QUESTION, {**ANSWER, "weight": None})).turns[1]


CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
NO_CALL = "turn 2: a tool call is an object with a name and arguments, such as {name: add, arguments: {a: 1}}"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (turns(QUESTION, CALLED, ANSWER), "turn 3 is the assistant's, and the tool's is due"),
        (turns(QUESTION, CALLED, RESULT, QUESTION, ANSWER), "turn 4 is the user's, and the tool's or the assistant's is due"),
        (turns(QUESTION, CALLED, RESULT), "has no answer"),
        (turns(QUESTION, RESULT, ANSWER), "turn 2 is the tool's, and the assistant's is due"),
        (turns(QUESTION, CALLED, {**RESULT, "content": {"sum": 4}}, ANSWER), "turn 3: its text is dict, not a string"),
        (turns(QUESTION, {**CALLED, "tool_calls": "add(2)"}), NO_CALL),
        (turns(QUESTION, {**CALLED, "tool_calls": [{"name": "add", "arguments": "{a: 2"}]}), NO_CALL),
        (turns(QUESTION, {**CALLED, "tool_calls": [{**CALL, "index": 0}]}), NO_CALL),
        (turns(QUESTION, {**CALLED, "tool_calls": [{"arguments": {}}]}), NO_CALL),
        (turns(QUESTION, {**ANSWER, "weight": -1}), "turn 2: its weight is -1, and a number from 0 up is needed"),
        (turns(QUESTION, {**ANSWER, "weight": True}), "turn 2: its weight is True, and a number from 0 up is needed"),
        (turns(QUESTION, {**ANSWER, "reasoning_content": ["Hm."]}), "turn 2: its reasoning_content is list, not a string"),
        (turns(QUESTION, {**ANSWER, "tool_call_id": "c1"}), "turn 2: 'tool_call_id' is not supported on a turn of the assistant, and would be lost"),
        ({**turns(*PAIR), "tools": "add"}, "its tools are not a list of JSON schemas"),
        ({**turns(*PAIR), "tools": [{"description": "adds"}]}, "its tool 1 has no name"),
    ],
)  # fmt: skip
def test_a_bad_turn_of_tools_is_named(tmp_path, row, problem):
    assert problems(write(tmp_path, "jsonl", [row])) == [f"rows.jsonl:1: {problem}"]


def test_objects_in_parquet_have_the_keys_of_all_rows(tmp_path):
    other = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "sub", "arguments": {"b": 1}}}],
    }
    rows = [turns(QUESTION, CALLED), turns(QUESTION, other)]
    assert "tools or arguments hold null" in problems(write(tmp_path, "parquet", rows))[0]
    for row, turn in zip(rows, (CALLED, other), strict=True):
        call = turn["tool_calls"][0]["function"]
        row["messages"][1] = {**turn, "tool_calls": [{**call, "arguments": json.dumps(call["arguments"])}]}
    found = chats(write(tmp_path, "parquet", rows))
    assert [chat.turns[1]["tool_calls"][0]["function"]["arguments"] for chat in found] == [{"a": 2}, {"b": 1}]


GLAIVE = Path(os.environ.get("LLMTUNE_TEST_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))


@pytest.mark.skipif(not GLAIVE.is_dir(), reason="the public test data is not here")
def test_a_public_set_of_tool_calls():
    file = GLAIVE / "llamafactory" / "glaive_toolcall_en_demo.json"
    raw, found, words = json.loads(file.read_text()), chats(str(file)), families.tokenizer("qwen2_5")
    assert len(found) == len(raw) == 300
    for row, chat in zip(raw, found, strict=True):
        said = {
            role: [turn["value"] for turn in row["conversations"] if turn["from"] == role]
            for role in ("gpt", "function_call", "observation")
        }
        assert [turn["content"] for turn in chat.turns if turn["role"] == "tool"] == said["observation"]
        calls = [turn["tool_calls"][0]["function"] for turn in chat.turns if "tool_calls" in turn]
        assert calls == [json.loads(text) for text in said["function_call"]]
        encoded = encode_chat(words, chat.turns, chat.tools)
        supervised = words.decode([label for label in encoded.labels if label != IGNORED])
        answers = [turn["value"] for turn in row["conversations"] if turn["from"] in ("gpt", "function_call")]
        assert supervised.count("<|im_end|>") == len(answers)
        assert all(text in supervised for text in said["gpt"])
        assert not any(text in supervised for text in said["observation"] if len(text) > 20)
        assert all(tool["function"]["name"] in words.decode(encoded.input_ids) for tool in chat.tools or [])


# ---- bad files


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", b'{"messages": []}\n{"mess', r"rows.jsonl:2: is not JSON: "),
        ("rows.json", b'[{"a": 1},\n {"b": }]', r"rows.json:2: is not JSON: "),
        ("rows.json", b'{"a": 1}', "a .json file of rows is one list of objects; one object a line is .jsonl"),
        ("rows.jsonl", b"[1, 2]\n", "rows.jsonl:1: a row is an object with named fields"),
        ("rows.jsonl", b"", "rows.jsonl: holds no rows"),
        ("rows.jsonl", b"\n\n", "rows.jsonl: holds no rows"),
        ("rows.json", b"[]", "rows.json: holds no rows"),
        ("rows.csv", b"", "rows.csv: holds no rows"),
        ("rows.csv", b"prompt,completion\n", "rows.csv: holds no rows"),
        ("rows.csv", b"prompt,completion\na,b\nc\n", "rows.csv:3: has other than the 2 cells of its header"),
        ("rows.csv", b"prompt,completion\na,b,c\n", "rows.csv:2: has other than the 2 cells of its header"),
        ("rows.csv", b'prompt,completion\na,"b\nc', "is not CSV: unexpected end of data"),
        ("rows.csv", "prompt,completion\na,b\n".encode("utf-16"), "rows.csv: is not UTF-8 text"),
        ("rows.jsonl", b'{"prompt": "caf\xe9"}\n', "rows.jsonl: is not UTF-8 text"),
        ("rows.json", b'[{"prompt": "caf\xe9"}]', "rows.json: is not UTF-8 text"),
        ("rows.parquet", b"", "rows.parquet: is not a whole Parquet file"),
        ("rows.parquet", b"PAR1 and no more", "rows.parquet: is not a whole Parquet file"),
        ("rows.txt", b"hello", "rows.txt: is none of .json, .jsonl, .csv, .parquet"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(tmp_path / name)))
    assert str(caught.value).startswith(str(tmp_path / name)) or str(caught.value).startswith(f"{name}:")
    assert problem in str(caught.value)


def test_a_parquet_file_cut_short(tmp_path):
    source = Path(write(tmp_path, "parquet", [{"prompt": str(i), "completion": "a"} for i in range(3000)]))
    whole = source.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1):
        source.write_bytes(whole[:length])
        with pytest.raises(DataError, match="is not a whole Parquet file"):
            list(read_rows(str(source)))


def test_a_parquet_file_with_a_damaged_page(tmp_path):
    source = Path(write(tmp_path, "parquet", [{"prompt": f"{i * 7919}", "completion": "a"} for i in range(3000)]))
    damaged = bytearray(source.read_bytes())
    damaged[20:40] = b"\xff" * 20
    source.write_bytes(damaged)
    with pytest.raises(DataError, match="is not a whole Parquet file"):
        list(read_rows(str(source)))


def test_no_file_a_folder_and_the_hub_offline(tmp_path):
    assert problems(str(tmp_path / "nope.jsonl")) == ["no such file"]
    assert problems(str(tmp_path)) == ["is a folder, and a file of rows is needed"]
    assert problems("no hub id") == [
        "is neither a file (.json, .jsonl, .csv, .parquet) nor a hub id like org/name@revision:split"
    ]
    with pytest.raises(
        LlmtuneError, match=r"^org/rows@v1:test: the hub cannot be reached .* is this machine offline\?$"
    ) as caught:
        chats("org/rows@v1:test")
    assert caught.value.exit_code == 1


def test_a_hub_dataset_in_several_configurations(tmp_path, monkeypatch):
    """`datasets` reads a folder of that name as it reads the hub."""
    folder = tmp_path / "org" / "rows"
    folder.mkdir(parents=True)
    for name in ("easy", "hard"):
        (folder / f"{name}.csv").write_text(f"prompt,completion\n{name}?,yes\n")
    configs = "".join(
        f"- config_name: {name}\n  data_files: [{{split: test, path: {name}.csv}}]\n" for name in ("easy", "hard")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    assert chats("org/rows:hard/test")[0].turns[0]["content"] == "hard?"
    with pytest.raises(DataError, match=r"(?s)cannot be read from the hub: .*'easy', 'hard'"):
        chats("org/rows:test")


def test_json_that_nests_without_end(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    assert "is not JSON" in problems(str(tmp_path / "deep.jsonl"))[0]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_byte_order_mark_is_no_error(tmp_path, kind):
    source = Path(write(tmp_path, kind, [{"messages": PAIR}]))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert chats(str(source))[0].turns == PAIR


def test_a_long_cell(tmp_path):
    assert (
        len(chats(write(tmp_path, "csv", [{"prompt": "x" * 200_000, "completion": "a"}]))[0].turns[0]["content"])
        == 200_000
    )


def test_a_fingerprint_follows_the_bytes(tmp_path):
    one, two = write(tmp_path, "jsonl", [turns(*PAIR)], "one"), write(tmp_path, "jsonl", [turns(*PAIR)], "two")
    assert fingerprint(one) == fingerprint(two)
    Path(two).write_text(Path(two).read_text() + "\n")
    assert fingerprint(one) != fingerprint(two)
