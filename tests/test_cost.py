import dataclasses

import numpy as np
import pytest
import tiny
import torch

from llmtune import config
from llmtune.config.eval import CostConfig, SuiteConfig
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.evaluate import cost, subjects
from llmtune.evaluate.subjects import Memory
from llmtune.evaluate.suites import Item, Suite
from llmtune.model import load

ITEMS = [Item("s", str(i), str(i), [{"role": "user", "content": "count " * (1 + i)}]) for i in range(8)]

SUITE = {
    "suite": "s",
    "description": "d",
    "licence": "own",
    "items": "./i.jsonl",
    "metrics": ["answer_tokens"],
    "max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory):
    """Two whole models, of the same shape and unlike weights."""
    other = tiny.save(tmp_path_factory.mktemp("other") / "model", seed=1)
    return {"base": subjects.find(str(tiny_folder)), "tuned": subjects.find(str(other))}


def measured(two, monkeypatch, **settings):
    """The figures, and how many rows each call of `generate` had, in order."""
    calls, answer = [], cost._Bench._answer

    def counted(self, model, rows):
        calls.append((next(name for name, arm in two.items() if arm is self.subject), len(rows)))
        return answer(self, model, rows)

    monkeypatch.setattr(cost._Bench, "_answer", counted)
    memory = Memory(list(two.values()), "float32", "cpu")
    return cost.measure(CostConfig(**settings), two, ITEMS, memory, 4), calls


def test_arms_answer_in_turn_and_the_warm_up_is_not_counted(two, monkeypatch):
    figures, calls = measured(two, monkeypatch, prompts=6, new_tokens=3)
    alone = [name for name, rows in calls[:14]]
    assert alone == ["tuned", "base", "base", "tuned"] * 3 + ["tuned", "base"]
    assert calls[14:] == [("tuned", 4), ("base", 4), ("base", 2), ("tuned", 2)] * cost.ROUNDS
    weights = load.load_model(two["base"].source, "float32")
    for arm in figures.values():
        assert (arm["prompts"], arm["new_tokens"], arm["batch_size"], arm["adapter_bytes"]) == (6, 3, 4, None)
        assert arm["parameters"] == sum(weight.numel() for weight in weights.parameters())
        assert arm["weights_bytes"] >= 4 * arm["parameters"]
        assert arm["peak_bytes"] >= arm["weights_bytes"]
        assert "resident set" in arm["peak_is"]
        assert arm["size_bytes"] > arm["parameters"]
        assert 0 < arm["first_token_s"]["p50"] <= arm["first_token_s"]["p90"] <= arm["first_token_s"]["p99"]
        assert arm["tokens_per_s"] > 0 < arm["tokens_per_s_alone"]
    assert "ratio" not in figures["base"]
    assert figures["tuned"]["ratio"].keys() == {"first_token_s", "per_token_s"}


def test_one_token_has_no_time_between_tokens(two, monkeypatch):
    figures, _ = measured(two, monkeypatch, prompts=2, new_tokens=1)
    assert figures["base"]["per_token_s"] is None
    assert figures["tuned"]["ratio"].keys() == {"first_token_s"}


def test_every_arm_writes_as_many_tokens_whatever_its_stop_tokens(two):
    memory = Memory([two["base"]], "float32", "cpu")
    bench = cost._Bench(two["base"], memory, [[5, 6, 7], [8]], 20)
    with memory.active(two["base"]) as model:
        model.generation_config.eos_token_id = list(range(model.config.vocab_size))  # would end at once
        stamps = bench._answer(model, [[5, 6, 7], [8]])
    assert len(stamps) == 20
    assert stamps == sorted(stamps)
    assert stamps[0] > 0


def test_a_ratio_is_that_of_each_prompt():
    base = np.random.default_rng(0).uniform(1, 9, (12, 1)) * np.array([1.0, 2.0, 3.0])
    arms = [
        cost._Bench(None, None, [], 3, spent=stamps.tolist())
        for stamps in (base * np.array([3, 1.5] * 6)[:, None], base)
    ]
    found = cost._ratios(*arms)
    assert found["first_token_s"]["value"] == pytest.approx((3 * 1.5) ** 0.5)
    assert found["per_token_s"]["low"] < found["per_token_s"]["value"] < found["per_token_s"]["high"]
    assert cost._percentiles(np.arange(101) / 1000) == {"p50": 0.05, "p90": 0.09, "p99": 0.099}


def test_memory_that_was_needed_meanwhile_is_seen():
    with cost._Growth(torch.device("cpu")) as growth:
        held = torch.ones(20_000_000)
        cost.time.sleep(0.1)
        del held
    assert 70e6 < growth.bytes < 200e6


def test_what_cannot_be_measured_is_refused(two):
    suite = Suite(config.validate(SuiteConfig, SUITE, "s.yaml"), "", ITEMS)
    remote = dataclasses.replace(two["tuned"], name="http://127.0.0.1/v1#m", source=None)
    with pytest.raises(ConfigError, match="is an endpoint, whose seconds are those of its network"):
        cost.check(CostConfig(), {"base": two["base"], "tuned": remote}, [suite], "eval.yaml")
    with pytest.raises(ConfigError, match=r"cost.prompts: 9 are asked for, and the suites' own items hold 8"):
        cost.check(CostConfig(prompts=9), two, [suite], "eval.yaml")
    with pytest.raises(LlmtuneError, match=r"no suite has a prompt that leaves room for cost.new_tokens \(2040\)"):
        cost.measure(CostConfig(new_tokens=2040), two, ITEMS, Memory(list(two.values()), "float32", "cpu"), 4)
