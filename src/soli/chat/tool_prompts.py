"""Tools told to a model whose template has no place for them, in the form of calls that its family's parser reads.

DeepSeek's published templates of V3, R1, V3-0324 and V3.1 write calls and results, but none reads `tools`. The text
here becomes part of the system message. For V3.1 it is the form that its model card gives; for the others no form is
published.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from soli.chat.parsers.families import DEEPSEEK, KIMI
from soli.chat.parsers.pairs import DSML

CALLS, CALLS_END, CALL, SEPARATOR, CALL_END = (
    DEEPSEEK.section_begin,
    DEEPSEEK.section_end,
    DEEPSEEK.call_begin,
    DEEPSEEK.separator,
    DEEPSEEK.call_end,
)


def tool_prompt(family: str, tools: Sequence[Mapping[str, Any]], brief: bool) -> str:
    """The text that tells a model of this family about its tools, each as in a request. `brief`: without explanations,
    for prompts that must be short."""
    functions = [tool["function"] for tool in tools]
    text, explanation = TOOL_PROMPTS.get(family, _deepseek_v31)(functions)
    return text if brief else f"{text}\n\n{explanation}"


def _deepseek_v31(functions: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    described = "".join(
        f"### {function['name']}\nDescription: {function.get('description', '')}\n\nParameters: {_schema(function)}\n\n"
        for function in functions
    )
    return (
        f"## Tools\nYou have access to the following tools:\n\n{described}"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{CALLS}{CALL}tool_call_name{SEPARATOR}tool_call_arguments{CALL_END}{{{{additional_tool_calls}}}}{CALLS_END}",
        "Where:\n\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces",
    )


def _deepseek_v3(functions: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    return _described(
        functions,
        f"{CALLS}{CALL}function{SEPARATOR}NAME\n```json\nARGUMENTS\n```{CALL_END}{CALLS_END}",
        f"For several calls, repeat what is from {CALL} to {CALL_END}, each on a line of its own.",
    )


def _kimi_k2(functions: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    return _described(
        functions,
        f"{KIMI.section_begin}{KIMI.call_begin}functions.NAME:0{KIMI.separator}ARGUMENTS{KIMI.call_end}"
        f"{KIMI.section_end}",
        f"For several calls, repeat what is from {KIMI.call_begin} to {KIMI.call_end}, with :1, :2 and so on.",
    )


def _deepseek_v32(functions: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    return _described(
        functions,
        f'<{DSML}function_calls>\n<{DSML}invoke name="NAME">\n'
        f'<{DSML}parameter name="PARAMETER" string="true|false">VALUE</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}function_calls>",
        'With string="true" a value is text as it is, with string="false" JSON. For several calls, repeat the invoke.',
    )


def _glm(functions: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    return _described(
        functions,
        "<tool_call>NAME\n<arg_key>PARAMETER</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
        "A value of type string is text as it is, any other is JSON. For several calls, repeat the whole.",
    )


def _described(functions: Sequence[Mapping[str, Any]], form: str, several: str) -> tuple[str, str]:
    """The functions as JSON, one a line, and the form of a call."""
    as_json = ", as a JSON object" if "ARGUMENTS" in form else ""
    described = "\n".join(json.dumps(_plain(function), ensure_ascii=False) for function in functions)
    return (
        f"## Tools\n{described}\n\nTo call one, write exactly:\n{form}",
        f"NAME is the name of a tool above, and the arguments fit its parameters{as_json}. {several} Write nothing "
        "after the calls: their results follow. Call a tool only where its result is needed, else answer directly.",
    )


def _plain(function: Mapping[str, Any]) -> dict[str, Any]:
    return {key: function[key] for key in ("name", "description", "parameters") if function.get(key)}


def _schema(function: Mapping[str, Any]) -> str:
    return json.dumps(function.get("parameters") or {"type": "object", "properties": {}}, ensure_ascii=False)


TOOL_PROMPTS: dict[str, Callable[[Sequence[Mapping[str, Any]]], tuple[str, str]]] = {
    "deepseek_v3": _deepseek_v3,
    "deepseek_v31": _deepseek_v31,
    "deepseek_v32": _deepseek_v32,
    "kimi_k2": _kimi_k2,
    "glm": _glm,
}
