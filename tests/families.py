"""Real model families: the chat templates as they ship, over a byte-level tokenizer with the special tokens of the family.

The templates are those that TRL keeps of the original models, so that what is proven on them is proven on the real text;
Mistral's, which TRL lacks, is written out here. One token a byte, as in `tiny`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SHIPPED = Path(trl.__file__).parent / "chat_templates"
# of mistralai/Mistral-7B-Instruct-v0.3: the system prompt goes into the last turn, and only where that is the user's
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""


@dataclass(frozen=True)
class Family:
    """A chat template and its tokenizer: special tokens, other added ones, and where generation stops."""

    eos: str
    special: list[str]
    stops: list[str]
    bos: str | None = None
    added: list[str] = field(default_factory=list)
    template: str | None = None


CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
QWEN = Family(
    "<|im_end|>",
    CHATML,
    ["<|im_end|>", "<|endoftext|>"],
    added=["<tool_call>", "</tool_call>", "<think>", "</think>"],
)
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA = Family(
    "<|eot_id|>",
    [*HEADERS, "<|eom_id|>", "<|python_tag|>"],
    ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    "<|begin_of_text|>",
)
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
PHI = ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
BEGIN, STOP = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK = Family(
    STOP,
    [BEGIN, STOP],
    [STOP],
    BEGIN,
    added=[
        *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        *("<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>"),
        *("<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    ],
)
COHERE = [
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    *("<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
]
FAMILIES = {
    "qwen2_5": QWEN,
    "qwen3": QWEN,
    "qwen3_instruct_2507": QWEN,
    "qwen3_5_think": QWEN,
    "qwen3_8": QWEN,
    "llama3": Family("<|end_of_text|>", HEADERS, ["<|end_of_text|>"], "<|begin_of_text|>"),
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "gemma": Family("<eos>", GEMMA, ["<eos>"], "<bos>"),
    "gemma3": Family("<eos>", GEMMA, ["<eos>", "<end_of_turn>"], "<bos>"),
    "phi3": Family("<|endoftext|>", PHI, ["<|endoftext|>"], "<s>"),
    "phi3_5": Family("<|endoftext|>", PHI, ["<|endoftext|>", "<|end|>"], "<s>"),
    "deepseekv3": DEEPSEEK,
    "deepseek_r1_distill": DEEPSEEK,
    "glm4moe": Family(
        "<|endoftext|>",
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
        ["<|endoftext|>", "<|user|>", "<|observation|>"],
        added=["<think>", "</think>", "<tool_call>", "</tool_call>"],
    ),
    "gptoss": Family(
        "<|return|>",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"],
        ["<|return|>", "<|call|>"],
    ),
    "cohere": Family("<|END_OF_TURN_TOKEN|>", COHERE, ["<|END_OF_TURN_TOKEN|>"], "<BOS_TOKEN>"),
    "cohere2": Family("<|END_OF_TURN_TOKEN|>", COHERE, ["<|END_OF_TURN_TOKEN|>"], "<BOS_TOKEN>"),
    "lfm2_2_5": Family(
        "<|im_end|>",
        ["<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_call_start|>", "<|tool_call_end|>"],
        ["<|im_end|>"],
        "<|startoftext|>",
    ),
    "mistral": Family(
        "</s>",
        [
            *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ],
        ["</s>"],
        "<s>",
        template=MISTRAL,
    ),
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer, as `load_tokenizer` would give it."""
    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token=family.eos
    )
    made.add_tokens(family.special, special_tokens=True)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    made.chat_template = family.template or (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    made.generation_stops = made.convert_tokens_to_ids(family.stops)
    return made
