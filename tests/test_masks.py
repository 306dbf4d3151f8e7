"""The loss mask on real model families, token by token: every expected text below is written by hand, never by the code.

`⟦` and `⟧` enclose what carries loss; a text that begins with `...` is the end of the row, and what comes before it carries
none. "refused: ..." is what the row is refused with.
"""

import random
import string

import families
import pytest
import tiny
from transformers import ByT5Tokenizer
from trl.chat_template_utils import get_training_chat_template, supports_tool_calling

from llmtune.data import template
from llmtune.data.tokens import IGNORED, TokenRow, encode_chat, encode_prompt

SYSTEM = {"role": "system", "content": "Rules."}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "zwei"}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


TOOLS = [
    user("2+2?"),
    says("", tool_calls=[CALL]),
    {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "4!"},
    says("four"),
]
CASES = {  # case -> turns, tools, train_on
    "single": ([user("q?"), says("yes")], None, "all"),
    "system": ([SYSTEM, user("q?"), says("yes")], None, "all"),
    "multi": ([user("q1"), says("a1"), user("q2"), says("a2")], None, "all"),
    "last": ([user("q1"), says("a1"), user("q2"), says("a2")], None, "last"),
    "system last": ([SYSTEM, user("q1"), says("a1"), user("q2"), says("a2")], None, "last"),
    "call": (TOOLS[:2], [TOOL], "all"),
    "tools": (TOOLS, [TOOL], "all"),
    "tools last": (TOOLS, [TOOL], "last"),
    "undeclared tools last": (TOOLS, None, "last"),
    "think": ([user("q?"), says("yes", reasoning_content="hm")], None, "all"),
    "think in text": ([user("q?"), says("<think>\nhm\n</think>\n\nyes")], None, "all"),
    "think last": (
        [user("q1"), says("<think>\nh1\n</think>\n\na1"), user("q2"), says("<think>\nh2\n</think>\n\na2")],
        None,
        "last",
    ),
}
REWRITES = "refused: this chat template writes an answer differently once others follow"
OTHER_PROMPT = "refused: this chat template writes a finished chat differently from the prompt that is served"
NO_REASONING = "refused: this chat template drops reasoning_content"
NO_TOOLS = "refused: this chat template drops tools and tool calls"
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "zwei"}}\n</tool_call>'
XML = "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\nzwei\n</parameter>\n</function>\n</tool_call>"
GLM_ADD = (
    "\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>b</arg_key>\n<arg_value>zwei</arg_value>\n"
    "</tool_call><|observation|>"
)
QWEN_DEFAULT = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
U1, U2 = (
    "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
)
UQ = "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n"
RESULT = "<|im_start|>user\n<tool_response>\n4!\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
LLAMA_END = "<|eot_id|><|start_header_id|>"
BOS = families.BEGIN
STOP = families.STOP


def headers(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"


def gemma(role: str, text: str) -> str:
    return f"<start_of_turn>{role}\n{text}<end_of_turn>\n"


def said(text: str) -> str:
    return f"<start_of_turn>model\n⟦{text}<end_of_turn>⟧\n"


LLAMA3_1 = {
    "single": "..." + headers("user", "q?<|eot_id|>") + headers("assistant", "⟦yes<|eot_id|>⟧"),
    "system": "...Rules.<|eot_id|>" + headers("user", "q?<|eot_id|>") + headers("assistant", "⟦yes<|eot_id|>⟧"),
    "multi": "..." + headers("user", "q1<|eot_id|>") + headers("assistant", "⟦a1<|eot_id|>⟧")
    + headers("user", "q2<|eot_id|>") + headers("assistant", "⟦a2<|eot_id|>⟧"),
    "last": "..." + headers("assistant", "a1<|eot_id|>") + headers("user", "q2<|eot_id|>") + headers("assistant", "⟦a2<|eot_id|>⟧"),
    "system last": "..." + headers("assistant", "a1<|eot_id|>") + headers("user", "q2<|eot_id|>") + headers("assistant", "⟦a2<|eot_id|>⟧"),
    "call": "...2+2?<|eot_id|>" + headers("assistant", '⟦{"name": "add", "parameters": {"a": 2, "b": "zwei"}}<|eot_id|>⟧'),
    "tools": "...2+2?<|eot_id|>" + headers("assistant", '⟦{"name": "add", "parameters": {"a": 2, "b": "zwei"}}<|eot_id|>⟧')
    + headers("ipython", '"4!"<|eot_id|>') + headers("assistant", "⟦four<|eot_id|>⟧"),
    "tools last": "..." + headers("ipython", '"4!"<|eot_id|>') + headers("assistant", "⟦four<|eot_id|>⟧"),
    "undeclared tools last": "..." + headers("ipython", '"4!"<|eot_id|>') + headers("assistant", "⟦four<|eot_id|>⟧"),
    "think": NO_REASONING,
    "think in text": "..." + headers("assistant", "⟦<think>\nhm\n</think>\n\nyes<|eot_id|>⟧"),
    "think last": "..." + headers("assistant", "⟦<think>\nh2\n</think>\n\na2<|eot_id|>⟧"),
}  # fmt: skip
NO_CALLS = {
    "call": NO_TOOLS,
    "tools": NO_TOOLS,
    "tools last": NO_TOOLS,
    "undeclared tools last": "refused: this chat template drops tool calls",
}
QWEN2_5 = {
    "single": f"{QWEN_DEFAULT}{UQ}⟦yes<|im_end|>⟧\n",
    "system": f"<|im_start|>system\nRules.<|im_end|>\n{UQ}⟦yes<|im_end|>⟧\n",
    "multi": f"{QWEN_DEFAULT}{U1}⟦a1<|im_end|>⟧\n{U2}⟦a2<|im_end|>⟧\n",
    "last": f"{QWEN_DEFAULT}{U1}a1<|im_end|>\n{U2}⟦a2<|im_end|>⟧\n",
    "system last": f"<|im_start|>system\nRules.<|im_end|>\n{U1}a1<|im_end|>\n{U2}⟦a2<|im_end|>⟧\n",
    "call": f"...2+2?<|im_end|>\n<|im_start|>assistant\n⟦{ADD}<|im_end|>⟧\n",
    "tools": f"...2+2?<|im_end|>\n<|im_start|>assistant\n⟦{ADD}<|im_end|>⟧\n{RESULT}⟦four<|im_end|>⟧\n",
    "tools last": f"...{ADD}<|im_end|>\n{RESULT}⟦four<|im_end|>⟧\n",
    "undeclared tools last": f"{QWEN_DEFAULT}<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{ADD}<|im_end|>\n{RESULT}⟦four<|im_end|>⟧\n",
    "think": NO_REASONING,
    "think in text": f"{QWEN_DEFAULT}{UQ}⟦<think>\nhm\n</think>\n\nyes<|im_end|>⟧\n",
    "think last": f"{QWEN_DEFAULT}{U1}<think>\nh1\n</think>\n\na1<|im_end|>\n{U2}⟦<think>\nh2\n</think>\n\na2<|im_end|>⟧\n",
}  # fmt: skip
PHI = {
    "single": "<|user|>\nq?<|end|>\n<|assistant|>\n⟦yes<|end|>⟧\n<|endoftext|>",
    "system": "<|system|>\nRules.<|end|>\n<|user|>\nq?<|end|>\n<|assistant|>\n⟦yes<|end|>⟧\n<|endoftext|>",
    "multi": "<|user|>\nq1<|end|>\n<|assistant|>\n⟦a1<|end|>⟧\n<|user|>\nq2<|end|>\n<|assistant|>\n⟦a2<|end|>⟧\n<|endoftext|>",
    "last": "<|user|>\nq1<|end|>\n<|assistant|>\na1<|end|>\n<|user|>\nq2<|end|>\n<|assistant|>\n⟦a2<|end|>⟧\n<|endoftext|>",
    "system last": "<|system|>\nRules.<|end|>\n<|user|>\nq1<|end|>\n<|assistant|>\na1<|end|>\n<|user|>\nq2<|end|>\n<|assistant|>\n⟦a2<|end|>⟧\n<|endoftext|>",
    **NO_CALLS,
    "undeclared tools last": "refused: this chat template drops tool calls and tool results",
    "think": NO_REASONING,
    "think in text": "...<|assistant|>\n⟦<think>\nhm\n</think>\n\nyes<|end|>⟧\n<|endoftext|>",
    "think last": "...<think>\nh1\n</think>\n\na1<|end|>\n<|user|>\nq2<|end|>\n<|assistant|>\n⟦<think>\nh2\n</think>\n\na2<|end|>⟧\n<|endoftext|>",
}  # fmt: skip
GEMMA3 = {
    "single": "<bos>" + gemma("user", "q?") + said("yes"),
    "system": "<bos>" + gemma("user", "Rules.\n\nq?") + said("yes"),
    "multi": "<bos>" + gemma("user", "q1") + said("a1") + gemma("user", "q2") + said("a2"),
    "last": "<bos>" + gemma("user", "q1") + gemma("model", "a1") + gemma("user", "q2") + said("a2"),
    "system last": "<bos>" + gemma("user", "Rules.\n\nq1") + gemma("model", "a1") + gemma("user", "q2") + said("a2"),
    **NO_CALLS,
    "think": NO_REASONING,
    "think in text": "..." + said("<think>\nhm\n</think>\n\nyes"),
    "think last": "..." + gemma("user", "q2") + said("<think>\nh2\n</think>\n\na2"),
}
EXPECTED = {
    "qwen2_5": QWEN2_5,
    "qwen3_instruct_2507": {
        case: text.replace(QWEN_DEFAULT, "") for case, text in QWEN2_5.items()
    },
    "qwen3": {
        "single": f"{UQ}⟦<think>\n\n</think>\n\nyes<|im_end|>⟧\n",
        "system": f"<|im_start|>system\nRules.<|im_end|>\n{UQ}⟦<think>\n\n</think>\n\nyes<|im_end|>⟧\n",
        "multi": REWRITES,
        "last": f"{U1}a1<|im_end|>\n{U2}⟦<think>\n\n</think>\n\na2<|im_end|>⟧\n",
        "system last": f"<|im_start|>system\nRules.<|im_end|>\n{U1}a1<|im_end|>\n{U2}⟦<think>\n\n</think>\n\na2<|im_end|>⟧\n",
        "call": f"...2+2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n{ADD}<|im_end|>⟧\n",
        "tools": REWRITES,
        "tools last": f"...{ADD}<|im_end|>\n{RESULT}⟦<think>\n\n</think>\n\nfour<|im_end|>⟧\n",
        "undeclared tools last": f"<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{ADD}<|im_end|>\n{RESULT}⟦<think>\n\n</think>\n\nfour<|im_end|>⟧\n",
        "think": f"{UQ}⟦<think>\nhm\n</think>\n\nyes<|im_end|>⟧\n",
        "think in text": f"{UQ}⟦<think>\nhm\n</think>\n\nyes<|im_end|>⟧\n",
        # as served: what an earlier answer thought is gone
        "think last": f"{U1}a1<|im_end|>\n{U2}⟦<think>\nh2\n</think>\n\na2<|im_end|>⟧\n",
    },
    "qwen3_5_think": {  # the prompt itself opens the reasoning
        "single": f"{UQ}<think>\n⟦\n</think>\n\nyes<|im_end|>⟧\n",
        "system": f"<|im_start|>system\nRules.<|im_end|>\n{UQ}<think>\n⟦\n</think>\n\nyes<|im_end|>⟧\n",
        "multi": REWRITES,
        "last": f"{U1}a1<|im_end|>\n{U2}<think>\n⟦\n</think>\n\na2<|im_end|>⟧\n",
        "system last": f"<|im_start|>system\nRules.<|im_end|>\n{U1}a1<|im_end|>\n{U2}<think>\n⟦\n</think>\n\na2<|im_end|>⟧\n",
        "call": f"...2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\n{XML}<|im_end|>⟧\n",
        "tools": f"...2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\n{XML}<|im_end|>⟧\n{RESULT}<think>\n⟦\n</think>\n\nfour<|im_end|>⟧\n",
        "tools last": f"...{XML}<|im_end|>\n{RESULT}<think>\n⟦\n</think>\n\nfour<|im_end|>⟧\n",
        "undeclared tools last": f"...{XML}<|im_end|>\n{RESULT}<think>\n⟦\n</think>\n\nfour<|im_end|>⟧\n",
        "think": f"{UQ}<think>\n⟦hm\n</think>\n\nyes<|im_end|>⟧\n",
        "think in text": f"{UQ}<think>\n⟦hm\n</think>\n\nyes<|im_end|>⟧\n",
        "think last": f"{U1}a1<|im_end|>\n{U2}<think>\n⟦h2\n</think>\n\na2<|im_end|>⟧\n",
    },
    "llama3": {
        "single": "<|begin_of_text|>" + headers("user", "q?<|eot_id|>") + headers("assistant", "⟦yes<|eot_id|>⟧"),
        "system": "<|begin_of_text|>" + headers("system", "Rules.<|eot_id|>") + headers("user", "q?<|eot_id|>") + headers("assistant", "⟦yes<|eot_id|>⟧"),
        "multi": "<|begin_of_text|>" + LLAMA3_1["multi"].removeprefix("..."),
        "last": "<|begin_of_text|>" + headers("user", "q1<|eot_id|>") + LLAMA3_1["last"].removeprefix("..."),
        "system last": "<|begin_of_text|>" + headers("system", "Rules.<|eot_id|>") + headers("user", "q1<|eot_id|>") + LLAMA3_1["last"].removeprefix("..."),
        **NO_CALLS,
        "think": NO_REASONING,
        "think in text": LLAMA3_1["think in text"],
        "think last": LLAMA3_1["think last"],
    },
    "llama3_1": LLAMA3_1,
    "llama3_2": LLAMA3_1,
    "gemma3": GEMMA3,
    "gemma": {
        **GEMMA3,
        "system": "refused: the chat template refuses it: System role not supported",
        "system last": "refused: the chat template refuses it: System role not supported",
    },
    "phi3": PHI,
    "phi3_5": PHI,
    "mistral": {
        "single": "<s>[INST] q?[/INST]⟦ yes</s>⟧",
        "system": "<s>[INST] Rules.\n\nq?[/INST]⟦ yes</s>⟧",  # the template leaves the system prompt out of a finished chat
        "multi": "<s>[INST] q1[/INST]⟦ a1</s>⟧[INST] q2[/INST]⟦ a2</s>⟧",
        "last": "<s>[INST] q1[/INST] a1</s>[INST] q2[/INST]⟦ a2</s>⟧",
        "system last": "<s>[INST] q1[/INST] a1</s>[INST] Rules.\n\nq2[/INST]⟦ a2</s>⟧",
        "call": '...[/AVAILABLE_TOOLS][INST] 2+2?[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": "zwei"}, "id": "abcdefghi"}]</s>⟧',
        "tools": '...[/AVAILABLE_TOOLS][INST] 2+2?[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": "zwei"}, "id": "abcdefghi"}]</s>⟧[TOOL_RESULTS] {"content": 4!, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ four</s>⟧',
        "tools last": '...</s>[TOOL_RESULTS] {"content": 4!, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ four</s>⟧',
        "undeclared tools last": '<s>[INST] 2+2?[/INST][TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": "zwei"}, "id": "abcdefghi"}]</s>[TOOL_RESULTS] {"content": 4!, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ four</s>⟧',
        "think": NO_REASONING,
        "think in text": "<s>[INST] q?[/INST]⟦ <think>\nhm\n</think>\n\nyes</s>⟧",
        "think last": "<s>[INST] q1[/INST] <think>\nh1\n</think>\n\na1</s>[INST] q2[/INST]⟦ <think>\nh2\n</think>\n\na2</s>⟧",
    },
    "deepseekv3": {  # the prompt opens a reasoning that a finished chat does not have
        **dict.fromkeys(["single", "system", "multi", "last", "system last", "think in text", "think last"], OTHER_PROMPT),
        "think": NO_REASONING,
        **dict.fromkeys(["call", "tools", "tools last"], "refused: this chat template drops tools without a word"),
        "undeclared tools last": f'{BOS}<｜User｜>2+2?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{{"a": 2, "b": "zwei"}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{STOP}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>4!<｜tool▁output▁end｜><｜tool▁outputs▁end｜>⟦four{STOP}⟧',
    },
    "deepseek_r1_distill": {  # reasoning in the text, as the model writes it; earlier answers are served without theirs
        **dict.fromkeys(["single", "system", "multi", "last", "system last"], OTHER_PROMPT),
        **NO_CALLS,
        "think": NO_REASONING,
        "think in text": f"{BOS}<｜User｜>q?<｜Assistant｜><think>\n⟦hm\n</think>\n\nyes{STOP}⟧",
        "think last": f"{BOS}<｜User｜>q1<｜Assistant｜>\n\na1{STOP}<｜User｜>q2<｜Assistant｜><think>\n⟦h2\n</think>\n\na2{STOP}⟧",
    },
    "glm4moe": {  # a turn ends with the token that opens the next one
        "single": "[gMASK]<sop><|user|>\nq?<|assistant|>⟦\n<think></think>\nyes<|user|>⟧",
        "system": "[gMASK]<sop><|system|>\nRules.<|user|>\nq?<|assistant|>⟦\n<think></think>\nyes<|user|>⟧",
        "multi": "[gMASK]<sop><|user|>\nq1<|assistant|>⟦\n<think></think>\na1<|user|>⟧\nq2<|assistant|>⟦\n<think></think>\na2<|user|>⟧",
        "last": "[gMASK]<sop><|user|>\nq1<|assistant|>\n<think></think>\na1<|user|>\nq2<|assistant|>⟦\n<think></think>\na2<|user|>⟧",
        "system last": "...<|assistant|>\n<think></think>\na1<|user|>\nq2<|assistant|>⟦\n<think></think>\na2<|user|>⟧",
        "call": f"...<|user|>\n2+2?<|assistant|>⟦\n<think></think>{GLM_ADD}⟧",
        "tools": f"...<|user|>\n2+2?<|assistant|>⟦\n<think></think>{GLM_ADD}⟧\n<tool_response>\n4!\n</tool_response><|assistant|>⟦\n<think></think>\nfour<|user|>⟧",
        "tools last": "...<|observation|>\n<tool_response>\n4!\n</tool_response><|assistant|>⟦\n<think></think>\nfour<|user|>⟧",
        "undeclared tools last": "...<|observation|>\n<tool_response>\n4!\n</tool_response><|assistant|>⟦\n<think></think>\nfour<|user|>⟧",
        "think": "[gMASK]<sop><|user|>\nq?<|assistant|>⟦\n<think>hm</think>\nyes<|user|>⟧",
        "think in text": "[gMASK]<sop><|user|>\nq?<|assistant|>⟦\n<think>hm</think>\nyes<|user|>⟧",
        "think last": "...<|assistant|>\n<think></think>\na1<|user|>\nq2<|assistant|>⟦\n<think>h2</think>\na2<|user|>⟧",
    },
    "gptoss": {
        "single": "...<|start|>user<|message|>q?<|end|><|start|>assistant⟦<|channel|>final<|message|>yes<|return|>⟧",
        "system": "...Rules.\n\n<|end|><|start|>user<|message|>q?<|end|><|start|>assistant⟦<|channel|>final<|message|>yes<|return|>⟧",
        "multi": REWRITES,  # an answer ends with <|return|> where it is the last, else with <|end|>
        "last": "...<|start|>assistant<|channel|>final<|message|>a1<|end|><|start|>user<|message|>q2<|end|><|start|>assistant⟦<|channel|>final<|message|>a2<|return|>⟧",
        "system last": "...<|start|>user<|message|>q2<|end|><|start|>assistant⟦<|channel|>final<|message|>a2<|return|>⟧",
        "call": '...<|message|>2+2?<|end|><|start|>assistant⟦ to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": "zwei"}<|call|>⟧',
        "tools": '...<|message|>2+2?<|end|><|start|>assistant⟦ to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": "zwei"}<|call|>⟧<|start|>functions.add to=assistant<|channel|>commentary<|message|>"4!"<|end|><|start|>assistant⟦<|channel|>final<|message|>four<|return|>⟧',
        "tools last": '...<|message|>"4!"<|end|><|start|>assistant⟦<|channel|>final<|message|>four<|return|>⟧',
        "undeclared tools last": '...<|message|>"4!"<|end|><|start|>assistant⟦<|channel|>final<|message|>four<|return|>⟧',
        "think": "...<|start|>assistant⟦<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>⟧",
        "think in text": "...<|start|>assistant⟦<|channel|>final<|message|><think>\nhm\n</think>\n\nyes<|return|>⟧",
        "think last": "...<|start|>assistant⟦<|channel|>final<|message|><think>\nh2\n</think>\n\na2<|return|>⟧",
    },
    "cohere": {
        "single": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦yes<|END_OF_TURN_TOKEN|>⟧",
        "system": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Rules.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦yes<|END_OF_TURN_TOKEN|>⟧",
        "multi": "...q1<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦a1<|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|USER_TOKEN|>q2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦a2<|END_OF_TURN_TOKEN|>⟧",
        "last": "...a1<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦a2<|END_OF_TURN_TOKEN|>⟧",
        "system last": "...q2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦a2<|END_OF_TURN_TOKEN|>⟧",
        **NO_CALLS,
        "think": NO_REASONING,
        "think in text": "...<|CHATBOT_TOKEN|>⟦<think>\nhm\n</think>\n\nyes<|END_OF_TURN_TOKEN|>⟧",
        "think last": "...<|CHATBOT_TOKEN|>⟦<think>\nh2\n</think>\n\na2<|END_OF_TURN_TOKEN|>⟧",
    },
    "cohere2": {
        "single": "...<|USER_TOKEN|>q?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>⟦yes<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        "system": "...\nRules.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>⟦yes<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        "multi": "...<|START_RESPONSE|>⟦a1<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|USER_TOKEN|>q2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>⟦a2<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        "last": "...<|START_RESPONSE|>a1<|END_RESPONSE|><|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>q2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>⟦a2<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        "system last": "...<|START_RESPONSE|>⟦a2<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        **NO_CALLS,
        "undeclared tools last": "refused: this chat template drops tool calls and tool results",
        "think": NO_REASONING,
        "think in text": "...<|START_RESPONSE|>⟦<think>\nhm\n</think>\n\nyes<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        "think last": "...<|START_RESPONSE|>⟦<think>\nh2\n</think>\n\na2<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
    },
    "lfm2_2_5": {  # it has generation marks of its own
        "single": f"<|startoftext|>{UQ}⟦yes<|im_end|>⟧\n",
        "system": f"<|startoftext|><|im_start|>system\nRules.<|im_end|>\n{UQ}⟦yes<|im_end|>⟧\n",
        "multi": f"<|startoftext|>{U1}⟦a1<|im_end|>⟧\n{U2}⟦a2<|im_end|>⟧\n",
        "last": f"<|startoftext|>{U1}a1<|im_end|>\n{U2}⟦a2<|im_end|>⟧\n",
        "system last": f"...{U1}a1<|im_end|>\n{U2}⟦a2<|im_end|>⟧\n",
        "call": "...2+2?<|im_end|>\n<|im_start|>assistant\n⟦<|tool_call_start|>[add(a=2, b='zwei')]<|tool_call_end|><|im_end|>⟧\n",
        "tools": "...2+2?<|im_end|>\n<|im_start|>assistant\n⟦<|tool_call_start|>[add(a=2, b='zwei')]<|tool_call_end|><|im_end|>⟧\n<|im_start|>tool\n4!<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧\n",
        "tools last": "...<|im_start|>tool\n4!<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧\n",
        "undeclared tools last": "...<|im_start|>tool\n4!<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧\n",
        "think": f"<|startoftext|>{UQ}⟦<think>hm</think>yes<|im_end|>⟧\n",
        "think in text": f"<|startoftext|>{UQ}⟦<think>\nhm\n</think>\n\nyes<|im_end|>⟧\n",
        "think last": f"<|startoftext|>{U1}a1<|im_end|>\n{U2}⟦<think>\nh2\n</think>\n\na2<|im_end|>⟧\n",
    },
}  # fmt: skip


def marked(words, text: str) -> TokenRow:
    """The row that a text with ⟦ and ⟧ stands for."""
    ids, labels = [], []
    for n, piece in enumerate(text.replace("⟧", "⟦").split("⟦")):
        new = words(piece, add_special_tokens=False)["input_ids"]
        ids += new
        labels += new if n % 2 else [IGNORED] * len(new)
    return TokenRow(ids, labels)


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    return {name: families.tokenizer(name) for name in families.FAMILIES}


@pytest.mark.parametrize(("family", "case"), [(f, c) for f in EXPECTED for c in CASES])
def test_what_carries_loss(tokenizers, family, case):
    words, expected = tokenizers[family], EXPECTED[family][case]
    turns, tools, train_on = CASES[case]
    if expected.startswith("refused: "):
        with pytest.raises(ValueError) as caught:
            encode_chat(words, turns, tools, train_on)
        assert str(caught.value).startswith(expected.removeprefix("refused: "))
        return
    row = encode_chat(words, turns, tools, train_on)
    want = marked(words, expected.removeprefix("..."))
    if expected.startswith("..."):
        start = len(row.input_ids) - len(want.input_ids)
        assert set(row.labels[:start]) == {IGNORED}
        row = TokenRow(row.input_ids[start:], row.labels[start:])
    assert words.decode(row.input_ids) == words.decode(want.input_ids)
    assert row == want
    prompt = encode_prompt(words, turns[:-1], tools)
    assert (
        encode_chat(words, turns, tools, train_on).input_ids[: len(prompt)] == prompt
    )  # what is served is what is trained


# ---- two derivations agree, and random chats


def trl_mask(words, turns: list[dict], tools: list[dict] | None) -> tuple[list[int], list[int]] | None:
    """The ids and the mask that TRL's training template gives, where TRL has one for this family."""
    try:
        patched = get_training_chat_template(words)
    except ValueError:
        return None
    made = words.apply_chat_template(
        turns, tools=tools, chat_template=patched, return_dict=True, return_assistant_tokens_mask=True
    )
    return made["input_ids"], made["assistant_masks"]


# what TRL's marks enclose although the served prompt holds it, or although it comes after the stop token
TRL_ALSO = {
    "deepseek_r1_distill": {"<｜Assistant｜>", "<think>"},
    "gptoss": {"<|start|>", *"assistant"},
    "phi3": {"<|endoftext|>"},
    "phi3_5": {"<|endoftext|>"},
    "qwen3_5_think": {"<think>"},
}


@pytest.mark.parametrize("family", sorted(EXPECTED.keys() - {"mistral", "llama3_1", "llama3_2", "deepseekv3"}))
def test_the_marks_of_trl_enclose_the_same_tokens(tokenizers, family):
    """An independent derivation: nothing of ours is outside TRL's marks, and what is only in theirs is named above."""
    words, compared = tokenizers[family], 0
    for case in ("single", "multi", "tools", "think", "think in text"):
        turns, tools, train_on = CASES[case]
        if EXPECTED[family][case].startswith("refused"):
            continue
        row, theirs = encode_chat(words, turns, tools, train_on), trl_mask(words, turns, tools)
        assert theirs is not None
        if row.input_ids != theirs[0][: len(row.input_ids)]:
            continue  # its training template writes this case otherwise than the served one
        compared += 1
        for label, token, mark in zip(row.labels, *theirs, strict=False):
            only_theirs = mark and label == IGNORED
            assert mark or label == IGNORED
            text = words.decode([token])
            assert not only_theirs or not text.strip() or text in TRL_ALSO.get(family, ()), text
    assert compared


LETTERS = string.ascii_letters + string.digits + " .,:;!?{}[]()<>|/\\\"'`#*_-=+\n\té漢🙂"


def text_of(rng: random.Random) -> str:
    """Any text that a template does not trim or take for reasoning."""
    while True:
        text = "".join(rng.choices(LETTERS, k=rng.randint(1, 30))).strip()
        if text and not any(mark in text for mark in ("<|", "<｜", "</")):
            return text


@pytest.mark.parametrize("family", sorted(EXPECTED.keys() - {"deepseekv3"}))  # which refuses every plain chat
def test_random_chats(tokenizers, family):
    """What carries loss is the answers with their ends, in order, and nothing else, whatever is said."""
    rng, words, expected = random.Random(7), tokenizers[family], EXPECTED[family]
    thinks = "<think>\n%s\n</think>\n\n" if family == "deepseek_r1_distill" else ""
    train_on = "last" if expected["multi"].startswith("refused") else "all"
    # what the template puts around an answer
    around = ["", families.STOP] if thinks else expected["last"].partition("⟦")[2].partition("⟧")[0].split("a2")
    for _ in range(25):
        turns = [{"role": "system", "content": text_of(rng)}] if rng.random() < 0.3 and family != "gemma" else []
        several = family != "mistral" or not turns  # with a system prompt it writes earlier prompts in another way
        for _ in range(rng.randint(1, 4 if several else 1)):
            thought = thinks % text_of(rng) if thinks else ""
            turns += [user(text_of(rng)), says(thought + text_of(rng))]
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        row = encode_chat(words, turns, None, train_on)
        said = words.decode([label for label in row.labels if label != IGNORED])
        wanted = answers if train_on == "all" else answers[-1:]
        wanted = [answer.removeprefix("<think>\n") if thinks else answer for answer in wanted]  # the prompt opens it
        assert said == "".join(around[0] + answer + around[1] for answer in wanted)
        assert all(label in (IGNORED, token) for label, token in zip(row.labels, row.input_ids, strict=True))


# ---- where an answer ends


@pytest.mark.parametrize(
    ("family", "unlisted"),
    [("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("phi3", "<|end|>")]
    + [(name, None) for name in ("llama3_1", "gemma3", "phi3_5", "qwen3", "glm4moe", "gptoss", "cohere2", "mistral")],
)
def test_the_end_of_a_turn_is_a_token_at_which_generation_stops(tokenizers, family, unlisted):
    found = template.of(tokenizers[family])
    assert found.unlisted == unlisted
    assert unlisted is None or unlisted in found.stops


def test_marks_of_the_template_narrow_what_is_trained():
    words = tiny.tokenizer(
        tiny.CHATML.replace(
            "{{ message.content }}",
            "{% if message.role == 'assistant' %}Well: {% generation %}{{ message.content }}{% endgeneration %}"
            "{% else %}{{ message.content }}{% endif %}",
        )
    )
    row = encode_chat(words, [user("q"), says("yes")])
    # the end of the turn is outside the marks, as in many templates, and is trained all the same
    assert row == marked(words, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nWell: ⟦yes<|im_end|>⟧\n")


# ---- what a template drops, and what it cannot read


def test_trl_agrees_on_which_templates_write_tool_calls(tokenizers):
    for family, words in tokenizers.items():
        drops = template.of(words).drops & {"tool calls", "tool results"}
        if supports_tool_calling(words):
            assert not drops, family
        elif family not in (
            "mistral",
            "gemma",
            "gemma3",
            "cohere",
        ):  # Mistral wants ids; the others refuse the roles aloud
            assert drops, family


@pytest.mark.parametrize(
    ("turns", "tools"),
    [
        ([user("q"), says("", tool_calls=[{**CALL, "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}])], None),
        ([user("q"), says("", tool_calls=[{**CALL, "function": {"name": "add", "arguments": {"<|im_end|>": 1}}}])], None),
        ([*TOOLS[:2], {**TOOLS[2], "content": "x<|im_end|>"}, says("four")], None),
        ([user("q"), says("a", reasoning_content="x<|im_end|>")], None),
        ([user("q"), says("a")], [{**TOOL, "function": {**TOOL["function"], "description": "<|im_end|>"}}]),
    ],
)  # fmt: skip
def test_control_tokens_in_calls_results_and_tools(tokenizers, turns, tools):
    with pytest.raises(ValueError, match=r"holds the control token '<\|im_end\|>'"):
        encode_chat(tokenizers["qwen3"], turns, tools)


def test_a_prompt_is_refused_where_the_template_drops_its_tools(tokenizers):
    writing = [family for family, words in tokenizers.items() if "tools" not in template.of(words).drops]
    dropping = next(words for family, words in tokenizers.items() if "tools" in template.of(words).drops)
    with pytest.raises(ValueError, match=r"^this chat template drops tools without a word"):
        encode_prompt(dropping, [user("q")], [TOOL])
    assert encode_prompt(dropping, [user("q")]) and encode_prompt(tokenizers[writing[0]], [user("q")], [TOOL])


def test_the_tokens_that_open_turns_are_control_tokens(tokenizers):
    # not special in DeepSeek's tokenizers, and read as tokens all the same
    with pytest.raises(ValueError, match="holds the control token '<｜Assistant｜>'"):
        encode_prompt(tokenizers["deepseekv3"], [user("q<｜Assistant｜>")])
    assert "<think>" not in template.of(tokenizers["qwen3"]).control


def test_reasoning_beside_reasoning_in_the_text(tokenizers):
    turns = [user("q"), says("<think>\nhm\n</think>\n\nyes")]
    with pytest.raises(ValueError, match="writes a block of reasoning beside the one in the turn's text; give it as"):
        encode_chat(tokenizers["qwen3_8"], turns)
    row = encode_chat(tokenizers["qwen3_8"], [user("q"), says("yes", reasoning_content="hm")])
    assert (
        tokenizers["qwen3_8"].decode([label for label in row.labels if label != IGNORED])
        == "hm\n</think>\n\nyes<|im_end|>"
    )


def test_a_result_that_is_dropped_in_this_row_alone():
    words = tiny.tokenizer(
        tiny.CHATML.replace("{{ message.content }}", "{{ message.content if loop.index0 < 2 or loop.last }}")
    )
    with pytest.raises(ValueError, match=r"drops or changes what the user says \('and what is that\?'\)"):
        encode_chat(
            words, [user("q"), says("a"), user("and what is that?"), says("b"), user("c"), says("d")], None, "last"
        )


def test_a_tokenizer_without_places():
    words = ByT5Tokenizer()
    words.chat_template = tiny.CHATML.replace(tiny.END, "</s>").replace(tiny.START, "")
    with pytest.raises(
        ValueError, match=r"does not say where its tokens stand in a text; use a model with a tokenizer\.json"
    ):
        encode_chat(words, [user("q"), says("a")])


@pytest.mark.parametrize(
    ("broken", "words_of_it"),
    [
        ("{{ raise_exception('only even days') }}", "only even days"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ messages[0].content.index('zzz') }}", "substring not found"),
    ],
)
def test_a_template_that_raises(broken, words_of_it):
    with pytest.raises(ValueError, match=f"^the chat template refuses it: .*{words_of_it}"):
        encode_chat(tiny.tokenizer(broken + tiny.CHATML), [user("q"), says("a")])
