"""Chat templates of the model families, written after their documented formats, on tiny tokenizers.

Each behaves as its family does where the mask is at stake: which roles it knows, what it trims,
what it strips from history, where it puts system text and tools, how it writes calls, and what its
generation prompt holds. The wording of system texts and tool instructions is not theirs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import write_tokenizer

from appliance.example import Example, Message

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- "<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one tool call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# System text and tools stand with the last user turn; call ids must have nine characters.
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{{- tool | tojson }}{{- ", " if not loop.last }}{%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception("tool call ids have nine characters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}{{- ", " if not loop.last }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
            {{- raise_exception("tool call ids have nine characters") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("only user and assistant roles, and a first system message") }}
    {%- endif %}
{%- endfor %}
"""

# No clock is promised to this one, and no space stands around the turns.
TEKKEN = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "The current date is " + today + "." %}{%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('only user, assistant and a first system message') }}
    {%- endif %}
{%- endfor %}
"""

GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

PHI3 = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

PHI4 = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

_QWEN_HEAD = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
"""

_QWEN_TOOL = """\
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
"""

QWEN25 = (
    _QWEN_HEAD
    + """\
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + _QWEN_TOOL
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)

# Thinking before the last user query is dropped; the last answer always gets a block, if an empty one.
QWEN3 = (
    _QWEN_HEAD
    + """\
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}{%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + _QWEN_TOOL
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
)

# As Qwen 3 to the prompt, but an answer without thinking is rendered without the empty block (SmolLM3).
SMOLLM3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)

# Arguments are text, joined to the rest; the answer to a tool has no header. Older files want no content beside calls.
_DEEPSEEK = """\
{%- set ns = namespace(is_tool=false, system='', after_user=false) %}
{%- for m in messages %}{%- if m['role'] == 'system' %}{%- set ns.system = ns.system + m['content'] %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- if tools %}{{- '\\n\\n## Tools\\n' + (tools | tojson) }}{%- endif %}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {%- set ns.is_tool = false %}{{- '<｜User｜>' + m['content'] }}
    {%- elif m['role'] == 'assistant' and CALLS %}
        {%- set ns.is_tool = false %}
        {{- '<｜Assistant｜>' + (m['content'] or '') + '<｜tool▁calls▁begin｜>' }}
        {%- for tool in m['tool_calls'] %}
            {{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}
        {%- endfor %}
        {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {%- elif m['role'] == 'assistant' %}
        {%- set content = m['content'] %}
        HISTORY
        {%- if ns.is_tool %}
            {{- '<｜tool▁outputs▁end｜>' + content + '<｜end▁of▁sentence｜>' }}{%- set ns.is_tool = false %}
        {%- else %}
            {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
        {%- endif %}
    {%- elif m['role'] == 'tool' %}
        {%- if not ns.is_tool %}{{- '<｜tool▁outputs▁begin｜>' }}{%- endif %}
        {%- set ns.is_tool = true %}
        {{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if ns.is_tool %}{{- '<｜tool▁outputs▁end｜>' }}{%- endif %}
{%- if add_generation_prompt and not ns.is_tool %}{{- '<｜Assistant｜>PROMPT' }}{%- endif %}
"""
_STRIP = "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].strip() %}{%- endif %}"
DEEPSEEK_V3 = _DEEPSEEK.replace("HISTORY", "").replace("PROMPT", "").replace("CALLS", "'tool_calls' in m")
DEEPSEEK_NONE = DEEPSEEK_V3.replace("'tool_calls' in m", "m['content'] is none")
DEEPSEEK_R1 = (
    _DEEPSEEK.replace("HISTORY", _STRIP).replace("PROMPT", "<think>\\n").replace("CALLS", "m['content'] is none")
)

COMMAND_R = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set loop_messages = messages[1:] %}{%- set system_message = messages[0]['content'] %}
{%- else %}
    {%- set loop_messages = messages %}{%- set system_message = false %}
{%- endif %}
{%- if system_message != false %}
    {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Conversation roles must alternate') }}{%- endif %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}
"""

COMMAND_R_TOOLS = """\
{{- bos_token + '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- set messages = messages[1:] %}{%- endif %}
{{- '\\n\\n## Available Tools\\n' }}
{%- for tool in tools %}{{- tool['function'] | tojson(indent=2) }}{{- '\\n' }}{%- endfor %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}
    {%- elif message['role'] == 'assistant' and message.tool_calls %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + message['content'] + 'Action: ```json\\n[' }}
        {%- for call in message.tool_calls %}
            {{- {'tool_name': call['function']['name'], 'parameters': call['function']['arguments']} | tojson(indent=4) }}{{- ',' if not loop.last }}
        {%- endfor %}
        {{- ']```<|END_OF_TURN_TOKEN|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\\n' + message['content'] + '\\n</results><|END_OF_TURN_TOKEN|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}
"""


@dataclass(frozen=True)
class Family:
    """One family: its template, its control tokens, what ends its turns, and what it can do.

    `can` has: system, tools, parallel (several calls in one turn), thinks (a switch), reasons (an
    open thinking block in every prompt). `splits` names what makes several token rows of one row.
    """

    name: str
    template: str
    bos: str | None
    stops: tuple[str, ...]
    tokens: tuple[str, ...]
    can: frozenset[str] = frozenset()
    splits: frozenset[str] = frozenset()
    tools_template: str | None = None


def _family(name: str, template: str, *, bos: str | None, stops: str, tokens: str, **more: str | None) -> Family:
    return Family(
        name=name,
        template=template,
        bos=bos,
        stops=tuple(stops.split()),
        tokens=tuple(tokens.split()),
        can=frozenset((more.get("can") or "").split()),
        splits=frozenset((more.get("splits") or "").split()),
        tools_template=more.get("tools_template"),
    )


_IM = "<|im_start|> <|im_end|>"
_QWEN = f"{_IM} <|endoftext|> <tool_call> </tool_call> <think> </think>"
_DS = (
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> "
    "<｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> "
    "<｜tool▁output▁begin｜> <｜tool▁output▁end｜>"
)
# Added tokens that the families' tokenizers do not mark special: rows write some of them themselves.
_PLAIN = frozenset(f"<tool_call> </tool_call> <think> </think> {_DS}".split()) - frozenset(_DS.split()[:2])
_COHERE = "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>"
_GEMMA = "<bos> <eos> <start_of_turn> <end_of_turn>"
_LLAMA = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>"
_MISTRAL = "<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"

FAMILIES: tuple[Family, ...] = (
    _family("smollm2", SMOLLM2, bos="<|im_start|>", stops="<|im_end|>", tokens=_IM, can="system"),
    _family(
        "llama3", LLAMA3, bos="<|begin_of_text|>", stops="<|eot_id|> <|end_of_text|> <|eom_id|>", tokens=_LLAMA,
        can="system tools",
    ),
    _family(
        "mistral-v0.3", MISTRAL, bos="<s>", stops="</s>", tokens=_MISTRAL, can="system tools parallel",
        splits="system tools",
    ),
    _family(
        "mistral-tekken", TEKKEN, bos="<s>", stops="</s>", tokens=f"{_MISTRAL} [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        can="system",
    ),
    _family("gemma2", GEMMA2, bos="<bos>", stops="<end_of_turn> <eos>", tokens=_GEMMA),
    _family("gemma3", GEMMA3, bos="<bos>", stops="<end_of_turn> <eos>", tokens=_GEMMA, can="system"),
    _family(
        "phi3", PHI3, bos="<s>", stops="<|end|> <|endoftext|> <|assistant|>",
        tokens="<s> <|endoftext|> <|end|> <|user|> <|system|> <|assistant|>", can="system",
    ),
    _family("phi4", PHI4, bos="<|endoftext|>", stops="<|im_end|>", tokens=f"{_IM} <|im_sep|> <|endoftext|>", can="system"),
    _family(
        "qwen2.5", QWEN25, bos=None, stops="<|im_end|> <|endoftext|>", tokens=_QWEN, can="system tools parallel"
    ),
    _family(
        "qwen3", QWEN3, bos=None, stops="<|im_end|> <|endoftext|>", tokens=_QWEN, can="system tools parallel thinks",
        splits="turns tools",
    ),
    _family("smollm3", SMOLLM3, bos=None, stops="<|im_end|>", tokens=_QWEN, can="system thinks", splits="turns"),
    _family(
        "deepseek-v3", DEEPSEEK_V3, bos="<｜begin▁of▁sentence｜>", stops="<｜end▁of▁sentence｜>", tokens=_DS,
        can="system tools parallel",
    ),
    _family(
        "deepseek-r1", DEEPSEEK_R1, bos="<｜begin▁of▁sentence｜>", stops="<｜end▁of▁sentence｜>",
        tokens=f"{_DS} <think> </think>", can="system reasons", splits="turns",
    ),
    _family(
        "command-r", COMMAND_R, bos="<BOS_TOKEN>", stops="<|END_OF_TURN_TOKEN|>", tokens=_COHERE,
        can="system tools parallel", tools_template=COMMAND_R_TOOLS,
    ),
)  # fmt: skip


def write_family(
    folder: Path, family: Family, *, stops: Sequence[str] | None = None, merges: Sequence[tuple[str, str]] = ()
) -> Path:
    """A tokenizer of bytes, the family's tokens and the given merges, with its template and stop tokens."""
    from tokenizers import AddedToken, Tokenizer, models, processors

    write_tokenizer(folder, template=family.template, eos=family.stops[0], bos=family.bos or family.stops[0])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if merges:
        vocabulary = dict(tokenizer.get_vocab(with_added_tokens=False))
        for left, right in merges:
            vocabulary[left + right] = len(vocabulary)
        tokenizer.model = models.BPE(vocab=vocabulary, merges=list(merges))
        bare = Tokenizer(tokenizer.model)
        bare.pre_tokenizer, bare.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
        tokenizer = bare
    for token in family.tokens:
        if token in _PLAIN:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
        else:
            tokenizer.add_special_tokens([AddedToken(token, special=True)])
    if family.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "TokenizersBackend", "eos_token": family.stops[0]}
    if family.bos:
        config["bos_token"] = family.bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ends = [tokenizer.token_to_id(s) for s in (family.stops if stops is None else stops)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends if len(ends) > 1 else ends[0]}))
    if family.tools_template:
        extra = folder / "additional_chat_templates"
        extra.mkdir(exist_ok=True)
        (extra / "tool_use.jinja").write_text(family.tools_template)
    return folder


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city: str, *, shape: str = "openai") -> dict[str, Any]:
    """A call of the tool, as OpenAI writes it (arguments as text), with an object, or bare."""
    arguments = {"city": city, "days": 2}
    if shape == "openai":
        return {"type": "function", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}
    bare = {"name": "get_weather", "arguments": arguments}
    return bare if shape == "bare" else {"type": "function", "function": bare}


def make_example(*turns: tuple[str, str] | Message, tools: bool = False) -> Example:
    """An example from (role, content) pairs and messages."""
    messages = tuple(t if isinstance(t, Message) else Message(*t) for t in turns)
    return Example("r1", messages, provenance="human", tools=json.dumps([TOOL]) if tools else None)
