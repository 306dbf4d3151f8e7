"""Forward passes: batched, prefix-shared and head-saving, and still what a plain loop over full logits gives."""

import random

import pytest
import tiny
import torch
from transformers import GenerationConfig

from llmtune.config.train import AdapterConfig
from llmtune.data.tokens import IGNORED, TokenRow
from llmtune.model import adapters, infer

PAD = tiny.tokenizer().pad_token_id
NEW_TOKENS = 10


@pytest.fixture
def model():
    return tiny.model(tied=False)


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def prompts(lengths: tuple[int, ...], shared: int) -> list[list[int]]:
    """Random prompts, all beginning with the same `shared` tokens and with another one after them."""
    draw = random.Random(0)
    ahead = [draw.randrange(256) for _ in range(shared)]
    return [[*ahead, row, *(draw.randrange(256) for _ in range(length - 1))] for row, length in enumerate(lengths)]


def supervised_rows(shared: int) -> list[TokenRow]:
    """Rows with one supervised span, with two, and with one that does not reach the end."""
    rows = [TokenRow(ids, [IGNORED] * len(ids)) for ids in prompts((9, 30, 17, 12), shared)]
    for row, spans in zip(rows, ([(-3, 0)], [(-9, -6), (-2, 0)], [(-8, -5)], [(-1, 0)]), strict=True):
        for start, end in spans:
            where = range(len(row.input_ids) + start, len(row.input_ids) + end)
            for n in where:
                row.labels[n] = row.input_ids[n]
    return rows


def plain_losses(model, rows: list[TokenRow]) -> list[float]:
    losses = []
    for row in rows:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].float()
        scores = logits[-len(row.input_ids) :].log_softmax(-1)  # from the end: virtual tokens stand before the text
        each = [-scores[n - 1, label].item() for n, label in enumerate(row.labels) if label != IGNORED]
        losses.append(sum(each) / len(each))
    return losses


def plain_answer(model, prompt: list[int], stops: set[int]) -> list[int]:
    """The likeliest token, one at a time, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS:
        with torch.inference_mode():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


# ---- losses


@pytest.mark.parametrize("shared", [0, 40], ids=["nothing shared", "a shared prefix"])
@pytest.mark.parametrize("max_tokens", [1, 150, 4096])
def test_losses_equal_a_plain_loop_over_full_logits(model, shared, max_tokens):
    rows, done = supervised_rows(shared), []
    losses = infer.token_losses(model, rows, PAD, max_tokens=max_tokens, on_batch=done.append)
    assert losses == pytest.approx(plain_losses(model, rows), abs=1e-5)
    assert sum(done) == len(rows)
    assert len(done) == len(rows) if max_tokens == 1 else len(done) < len(rows)


def test_losses_of_a_model_that_cannot_leave_its_head_out(model, monkeypatch):
    rows = supervised_rows(40)
    monkeypatch.setattr(infer, "_can_keep", lambda _: False)
    assert infer.token_losses(model, rows, PAD) == pytest.approx(plain_losses(model, rows), abs=1e-5)


def test_a_prefix_ends_before_what_is_supervised(model):
    ids = prompts((60,), 0)[0]
    same = [TokenRow(ids, [IGNORED] * 20 + ids[20:]), TokenRow(ids, [IGNORED] * 50 + ids[50:])]
    assert infer.token_losses(model, same, PAD) == pytest.approx(plain_losses(model, same), abs=1e-5)


def test_one_row_and_none(model):
    rows = supervised_rows(0)[:1]
    assert infer.token_losses(model, rows, PAD) == pytest.approx(plain_losses(model, rows), abs=1e-5)
    assert infer.token_losses(model, [], PAD) == []


@pytest.mark.parametrize("shared", [0, 40], ids=["nothing shared", "a shared prefix"])
def test_losses_behind_virtual_tokens(model, shared):
    prompt_tuning = AdapterConfig(method="prompt_tuning", num_virtual_tokens=5)
    model = adapters.build_adapter(model, prompt_tuning, "float32", 1e-3, seed=0).eval()
    rows = supervised_rows(shared)
    assert infer.token_losses(model, rows, PAD) == pytest.approx(plain_losses(model, rows), abs=1e-5)


def test_supervised_logits_are_those_of_the_full_pass(model):
    inputs, labels = infer.pad(supervised_rows(0), PAD, "cpu")
    with torch.inference_mode():
        full = model(**inputs).logits
        logits, targets = infer.supervised_logits(model, inputs, labels)
    mask = labels[:, 1:] != IGNORED
    assert torch.equal(targets, labels[:, 1:][mask])
    torch.testing.assert_close(logits, full[:, :-1][mask], atol=1e-5, rtol=0)


def test_padding_is_on_the_right_and_without_loss():
    inputs, labels = infer.pad([TokenRow([5, 6, 7], [IGNORED, 6, 7]), TokenRow([8], [8])], PAD, "cpu")
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


# ---- answers


@pytest.mark.parametrize("shared", [0, 40], ids=["nothing shared", "a shared prefix"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_equal_one_at_a_time_without_a_cache(model, words, shared, batch_size):
    asked, done = prompts((3, 17, 9, 30, 1), shared), []
    answers = infer.generate(model, words, asked, NEW_TOKENS, batch_size, on_batch=done.append)
    expected = [plain_answer(model, prompt, {words.eos_token_id}) for prompt in asked]
    assert [answer.text for answer in answers] == [
        words.decode(ids, skip_special_tokens=True).strip() for ids in expected
    ]
    assert [answer.tokens for answer in answers] == [len(ids) for ids in expected]
    assert sum(done) == len(asked)
    assert len({answer.text for answer in answers}) > 1


def test_no_prompts_no_answers(model, words):
    assert infer.generate(model, words, [], NEW_TOKENS, 4) == []


def test_an_answer_ends_at_a_stop_token_of_the_model_or_of_the_tokenizer(model, words):
    asked = prompts((3, 17, 9), 0)
    first = plain_answer(model, asked[0], set())
    stop = next(token for n, token in enumerate(first) if n >= 2 and token not in first[:n])
    model.generation_config.eos_token_id = [stop, words.eos_token_id]
    answers = infer.generate(model, words, asked, NEW_TOKENS, 3)
    expected = [plain_answer(model, prompt, {stop, words.eos_token_id}) for prompt in asked]
    assert [answer.tokens for answer in answers] == [len(ids) for ids in expected]
    assert answers[0].ended
    assert 0 < answers[0].tokens < NEW_TOKENS
    assert [answer.ended for answer in answers] == [len(ids) < NEW_TOKENS for ids in expected]


OWN_SETTINGS = [
    {"do_sample": True, "temperature": 3.0, "top_k": 3},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(100))},
    {"bad_words_ids": [[token] for token in range(100)]},
    {"num_beams": 3},
]


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=lambda own: next(iter(own)))
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' remarks on such settings are not what is tested
def test_the_generation_config_of_the_model_takes_no_part(model, words, own):
    asked = prompts((3, 17, 9), 20)
    before = infer.generate(model, words, asked, NEW_TOKENS, 3)
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, **own)
    after = infer.generate(model, words, asked, NEW_TOKENS, 3)
    assert [answer.text for answer in after] == [answer.text for answer in before]
    assert model.generation_config.to_dict()[next(iter(own))] == next(iter(own.values()))


def test_sampled_answers_follow_their_seed(model, words):
    asked = prompts((3, 17, 9), 0)
    texts = [[a.text for a in infer.generate(model, words, asked, NEW_TOKENS, 3, seed=seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
