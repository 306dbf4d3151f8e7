"""The loss mask, token by token, and the account of every row. One token a byte: what is expected is written down by hand."""

import json

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmtune.data.chats import Chat, load_chats
from llmtune.data.rows import Row
from llmtune.data.tokens import (
    IGNORED,
    Counts,
    TokenRow,
    encode_answer,
    encode_chat,
    encode_chats,
    encode_prompt,
    write_dataset,
)
from llmtune.errors import DataError

END = tiny.END


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def pieces(words, *parts: tuple[str, bool]) -> TokenRow:
    """The row that is made of these texts, each with loss or without."""
    ids, labels = [], []
    for text, supervised in parts:
        new = words(text, add_special_tokens=False)["input_ids"]
        ids += new
        labels += new if supervised else [IGNORED] * len(new)
    return TokenRow(ids, labels)


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


# ---- where loss is taken


def test_one_answer_and_its_end_are_supervised_and_nothing_else(words):
    row = encode_chat(words, [user("2+2?"), says("4 é")])
    assert row == pieces(
        words,
        ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("4 é<|im_end|>", True),
        ("\n", False),
    )
    # the same by hand: 4, space, two bytes of é, the end mark
    assert row.supervised == 5
    assert row.labels[-2] == words.eos_token_id
    assert row.labels[-1] == IGNORED


def test_every_answer_of_several_turns_after_a_system_prompt(words):
    row = encode_chat(
        words, [{"role": "system", "content": "Be brief."}, user("a?"), says("A."), user("b?"), says("B.")]
    )
    assert row == pieces(
        words,
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n", False),
        ("A.<|im_end|>", True),
        ("\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n", False),
        ("B.<|im_end|>", True),
        ("\n", False),
    )
    assert words.decode([label for label in row.labels if label != IGNORED]) == "A.<|im_end|>B.<|im_end|>"


def test_pad_is_eos_and_still_every_answer_learns_to_end(words):
    assert words.pad_token_id == words.eos_token_id
    row = encode_chat(words, [user("a"), says("b"), user("c"), says("d")])
    ends = [label for token, label in zip(row.input_ids, row.labels, strict=True) if token == words.eos_token_id]
    assert ends == [IGNORED, words.eos_token_id, IGNORED, words.eos_token_id]  # the user's turns end too, without loss


def test_an_answer_that_was_cut_off_is_not_taught_to_end(words):
    row = encode_chat(words, [user("a"), says("b", cut_off=True), user("c"), says("d")])
    assert row == pieces(
        words,
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("b", True),
        ("<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("d<|im_end|>", True),
        ("\n", False),
    )


def test_the_text_of_an_answer_that_stands_in_the_question_too(words):
    row = encode_chat(words, [user("assistant\nyes"), says("yes")])
    assert row.supervised == len("yes") + 1
    assert row.labels[-5:-1] == words(f"yes{END}")["input_ids"]


def test_white_space_around_an_answer_is_part_of_it(words):
    row = encode_chat(words, [user("a"), says("  b\n")])
    assert words.decode([label for label in row.labels if label != IGNORED]) == f"  b\n{END}"


def test_the_prompt_is_what_the_row_begins_with(words):
    turns = [user("a"), says("b"), user("c"), says("d")]
    row, prompt = encode_chat(words, turns), encode_prompt(words, turns[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert words.decode(row.labels[len(prompt) : -1]) == f"d{END}"


def test_only_the_last_answer_where_that_is_asked_for(words):
    row = encode_chat(words, [user("a?"), says("A."), user("b?"), says("B.")], train_on="last")
    assert row == pieces(
        words,
        (
            "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("B.<|im_end|>", True),
        ("\n", False),
    )


def test_a_turn_weighs_what_it_says(words):
    turns = [user("a?"), says("A", weight=0.5), user("b?"), says("B", weight=0), user("c?"), says("C", weight=2)]
    row = encode_chat(words, turns)
    supervised = [
        (words.decode(label), weight) for label, weight in zip(row.labels, row.weights, strict=True) if label != IGNORED
    ]
    assert supervised == [("A", 0.5), (END, 0.5), ("C", 2.0), (END, 2.0)]
    assert {weight for weight, label in zip(row.weights, row.labels, strict=True) if label == IGNORED} == {0.0}
    assert encode_chat(words, [user("a?"), says("A", weight=1), user("b?"), says("B", weight=0)]).weights is None
    with pytest.raises(ValueError, match="none of its answers is trained: they have weight 0"):
        encode_chat(words, [user("a?"), says("A"), user("b?"), says("B", weight=0)], train_on="last")
    assert encode_answer(words, turns[:4]).supervised == 2  # a model is scored on it all the same


# ---- what cannot be proven is refused


@pytest.mark.parametrize("token", [tiny.START, tiny.END])
@pytest.mark.parametrize("place", [0, 1])
def test_a_control_token_in_the_text(words, token, place):
    turns = [user("a"), says("b")]
    turns[place]["content"] += token
    with pytest.raises(ValueError, match=r"holds the control token .* which the model would obey; remove it"):
        encode_chat(words, turns)


def test_a_control_token_that_no_role_names():
    words = tiny.tokenizer()
    words.add_tokens(["<|header|>"], special_tokens=True)
    with pytest.raises(ValueError, match=r"control token '<\|header\|>'"):
        encode_chat(words, [user("a<|header|>"), says("b")])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (  # as some do: the newest message is written in full
            tiny.CHATML.replace("{{ message.content }}", "{{ message.content if loop.last else '...' }}"),
            "the prompt goes on with 'c<|im_end|>\\n<|im_start|>assistant\\n', the finished chat with",
        ),
        (  # as reasoning models do: what an earlier answer thought is taken out
            tiny.CHATML.replace("{{ message.content }}", "{{ message.content if loop.last or message.role == 'user' else '...' }}"),
            "writes an answer differently once others follow, so its loss mask cannot be proven: what would be trained is not",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "does not end the assistant's turn with '<|im_end|>', so the model would not learn to stop",
        ),
        (tiny.CHATML.replace("{{ message.content }}", "{{ message.content | upper }}"), "drops or changes what the turn says"),
    ],
    ids=["rewrites all", "rewrites answers", "no end", "changes the answer"],
)  # fmt: skip
def test_a_template_whose_mask_cannot_be_proven(template, problem):
    with pytest.raises(ValueError) as caught:
        encode_chat(tiny.tokenizer(template), [user("a"), says("b"), user("c"), says("d")])
    assert problem in str(caught.value)


def test_a_template_that_rewrites_earlier_answers_trains_the_last_one():
    words = tiny.tokenizer(
        tiny.CHATML.replace(
            "{{ message.content }}", "{{ message.content if loop.last or message.role == 'user' else '...' }}"
        )
    )
    before = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    row = encode_chat(words, [user("a"), says("b"), user("c"), says("d")], train_on="last")
    assert row == pieces(words, (before, False), ("d<|im_end|>", True), ("\n", False))


def merging(*, trim_offsets: bool) -> PreTrainedTokenizerFast:
    """A tokenizer in which a space becomes part of the word after it, and a template that ends the prompt with a space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=265, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    backend.train_from_iterator([" hello"] * 9, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    made.chat_template = "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }} A: {% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    return made


@pytest.mark.parametrize(
    "trim_offsets",
    [
        False,
        pytest.param(True),
    ],
)  # fmt: skip
def test_an_answer_whose_first_token_begins_in_the_prompt(trim_offsets):
    words = merging(trim_offsets=trim_offsets)
    assert words.convert_ids_to_tokens(words(" hello")["input_ids"]) == ["Ġhello"]
    with pytest.raises(ValueError, match="begins with characters that merge with the chat template"):
        encode_chat(words, [user("x"), says("hello")])


# ---- every row is counted


def chat(question: str, answer: str, number: int = 1, **more) -> Chat:
    return Chat([user(question), says(answer, **more)], Row(f"rows.jsonl:{number}", {}))


FRAME = len("user\n") + len("assistant\n") + 6  # bytes and marks that every one-turn row of the tiny template has


def encode(chats: list[Chat], max_length: int = 1000, overlong: str = "error", template: str = tiny.CHATML):
    counts = Counts()
    return list(encode_chats(iter(chats), tiny.tokenizer(template), max_length, overlong, counts)), counts


def test_counts_add_up():
    rows, counts = encode([chat("q" * n, "a" * 3, n) for n in (5, 5, 30, 40, 100)], FRAME + 3 + 35, "drop")
    assert [len(row.input_ids) for row in rows] == [FRAME + 3 + n for n in (5, 5, 30)] == counts.lengths
    assert (counts.rows, counts.dropped, counts.truncated, counts.duplicates) == (3, 2, 0, 1)
    assert counts.tokens == sum(len(row.input_ids) for row in rows)
    assert counts.supervised_tokens == sum(row.supervised for row in rows) == 3 * 4
    facts = counts.facts()
    assert (facts["median_tokens"], facts["longest_tokens"]) == (FRAME + 8, FRAME + 33)
    assert "lengths" not in facts


def test_a_row_of_exactly_max_length_is_whole():
    rows, counts = encode([chat("q", "abc")], FRAME + 4)
    assert len(rows[0].input_ids) == FRAME + 4
    assert (counts.rows, counts.truncated) == (1, 0)


def test_truncated_rows_lose_their_end_and_are_counted():
    rows, counts = encode([chat("q", "abcdef"), chat("q", "a")], FRAME + 3, "truncate")
    assert [len(row.input_ids) for row in rows] == [FRAME + 3, FRAME + 2]
    assert rows[0].labels[-4:] == tiny.tokenizer()("abcd")["input_ids"]
    assert (counts.rows, counts.truncated, counts.dropped) == (2, 1, 0)


def test_overlong_rows_are_an_error_with_the_way_out():
    with pytest.raises(DataError) as caught:
        encode([chat("q", "a" * 50, 3), chat("q", "a", 4), chat("q", "a" * 60, 5)], 40)
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0] == (
        f"rows.jsonl:3: has {FRAME + 51} tokens, more than data.max_length (40); raise it, or set data.overlong to 'truncate' or 'drop'"
    )
    assert caught.value.problems[1].startswith("rows.jsonl:5: ")


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(DataError, match=r"rows.jsonl:1: no token of its answer is left after truncation to 20 tokens"):
        encode([chat("q" * 50, "a")], 20, "truncate")
    with pytest.raises(DataError, match=r"no row is left to train on \(2 dropped as longer than 20 tokens\)"):
        encode([chat("q" * 50, "a"), chat("q" * 51, "a")], 20, "drop")


def test_a_row_that_cannot_be_encoded_is_named():
    with pytest.raises(DataError, match=r"rows.jsonl:7: its text holds the control token"):
        encode([chat("q", "a", 6), chat("q", f"a{END}", 7)])
    picky = "{% if messages | length > 0 %}{{ raise_exception('only even days') }}{% endif %}" + tiny.CHATML
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses it: only even days"):
        encode([chat("q", "a")], template=picky)
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses it: 'nothing' is undefined"):
        encode([chat("q", "a")], template="{{ nothing.at.all }}" + tiny.CHATML)


def test_a_template_that_breaks_on_a_type():
    with pytest.raises(DataError, match=r"rows.jsonl:1: "):
        encode([chat("q", "a")], template=tiny.CHATML.replace("message.content", "message.content + 1"))


# ---- the Arrow file


def test_what_is_written_is_what_is_read(tmp_path):
    rows = [TokenRow(list(range(n)), [IGNORED] * (n - 1) + [n]) for n in range(1, 1203)]  # more than one record batch
    dataset = write_dataset(iter(rows), tmp_path / "new" / "train.arrow")
    assert len(dataset) == 1202
    for n in (0, 1, 999, 1000, 1201):
        assert dataset[n] == {"input_ids": rows[n].input_ids, "labels": rows[n].labels, "length": n + 1}


def test_weights_are_a_column_where_some_row_has_them(tmp_path):
    plain, weighted = TokenRow([1, 2, 3], [IGNORED, 2, 3]), TokenRow([4, 5], [IGNORED, 5], [0.0, 0.5])
    assert "weights" not in write_dataset(iter([plain, plain]), tmp_path / "plain.arrow").column_names
    dataset = write_dataset(iter([plain, weighted]), tmp_path / "weighted.arrow")
    assert dataset["weights"][:] == [[0.0, 1.0, 1.0], [0.0, 0.5]]
    assert weighted.cut(1) == TokenRow([4], [IGNORED], [0.0])


def test_rows_of_an_older_file_are_never_served(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": text}) + "\n")
        chats = load_chats(str(tmp_path / "rows.jsonl"), training=True)
        rows = encode_chats(chats, tiny.tokenizer(), 100, "error", Counts())
        labels = write_dataset(rows, tmp_path / "train.arrow")[0]["labels"]
        assert tiny.tokenizer().decode([label for label in labels if label != IGNORED]) == text + END
