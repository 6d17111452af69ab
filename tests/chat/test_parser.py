"""Reasoning and tool calls are parsed however the text is cut into chunks, and none of the text is lost."""

import json
import re
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.chat.parser import (
    ForcedCallParser,
    MessageParser,
    OutputParser,
    PlainParser,
    any_call_schema,
    ends_in_reasoning,
    safe_length,
)
from soli.chat.parsers.families import DEEPSEEK, FAMILIES, KIMI
from soli.chat.parsers.pairs import DSML
from soli.engine.constraint import ConstraintSpec


class ToolCall(NamedTuple):
    name: str
    arguments: str
    call_id: str | None = None


CALLS_BEGIN, CALLS_END = DEEPSEEK.section_begin, DEEPSEEK.section_end
CALL_BEGIN, SEPARATOR, CALL_END = DEEPSEEK.call_begin, DEEPSEEK.separator, DEEPSEEK.call_end
V3 = f'{CALL_BEGIN}function{SEPARATOR}get_weather\n```json\n{{"city": "北京"}}\n```{CALL_END}'
V31 = f'{CALL_BEGIN}get_time{SEPARATOR}{{"zone": "CET"}}{CALL_END}'
TOOLS = {name: {"type": "object"} for name in ("get_weather", "get_time")}
WEATHER, TIME = ToolCall("get_weather", '{"city": "北京"}'), ToolCall("get_time", '{"zone": "CET"}')
FRAGMENTS = [
    CALLS_BEGIN,
    CALLS_END,
    CALL_BEGIN,
    CALL_END,
    SEPARATOR,
    V3,
    V31,
    "function",
    "get_weather",
    "```json",
    "```",
    '{"a": 1}',
    "<think>",
    "</think>",
    "<",
    "\n",
    " ",
    "a 猫",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
CUTS = st.lists(st.integers(0, 500), max_size=8)


def chunks(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def message(parser: OutputParser, parts: list[str]) -> tuple[str, str, list[ToolCall]]:
    """Reasoning, content and calls that the chunks make together."""
    deltas = [*(parser.push(part) for part in parts), parser.push("", last=True)]
    calls: list[ToolCall] = []
    for delta in [call for message_delta in deltas for call in message_delta.tool_calls]:
        if delta.name is not None:
            assert delta.index == len(calls)
            calls.append(ToolCall(delta.name, delta.arguments, delta.call_id))
        else:
            last = calls[delta.index]
            calls[delta.index] = ToolCall(last.name, last.arguments + delta.arguments, last.call_id)
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas), calls


def parser(family: str = "deepseek_v31", starts_in_reasoning: bool = False, tools=TOOLS) -> MessageParser:
    return MessageParser(FAMILIES[family].new_format(tools), starts_in_reasoning)


def parsed(text: str, family: str = "deepseek_v31", **options) -> tuple[str, str, list[ToolCall]]:
    """The message of a text, which is the same however it is cut."""
    whole = message(parser(family, **options), [text])
    assert message(parser(family, **options), list(text)) == whole
    for cut in range(len(text)):
        assert message(parser(family, **options), [text[:cut], text[cut:]]) == whole
    return whole


@pytest.mark.parametrize(
    ("text", "starts_inside", "expected"),
    [
        ("<think>\nhm\n</think>\n\nYes.\n", False, ("hm", "Yes.\n")),
        ("\n <think>hm</think>Yes.", False, ("hm", "Yes.")),
        ("hm, 2 < 3 </thin</think> Yes.", True, ("hm, 2 < 3 </thin", "Yes.")),
        ("  Yes <think>no</think>", False, ("", "  Yes <think>no</think>")),
        ("never ends </thi", True, ("never ends </thi", "")),
        ("<thi", False, ("", "<thi")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("", True, ("", "")),
        (" \n", False, ("", " \n")),
    ],
)
def test_reasoning_is_the_text_between_its_delimiters(text, starts_inside, expected):
    assert message(MessageParser(None, starts_inside), [text])[:2] == expected
    assert message(MessageParser(None, starts_inside), list(text))[:2] == expected


@given(TEXTS, CUTS, st.booleans())
def test_reasoning_does_not_depend_on_the_chunks(text, cuts, starts_inside):
    whole = message(MessageParser(None, starts_inside), [text])
    assert message(MessageParser(None, starts_inside), chunks(text, cuts)) == whole


def test_reasoning_can_be_left_in_the_content():
    text = "<think>hm</think>Yes."
    assert message(MessageParser(None, True, split_reasoning=False), list(text)) == ("", text, [])


def test_a_prompt_may_end_inside_the_reasoning():
    assert ends_in_reasoning("<|assistant|><think>\n")
    assert not ends_in_reasoning("<|assistant|><think>\n</think>")


@pytest.mark.parametrize("version", ["v3", "v31"])
def test_calls_of_both_formats_are_parsed(version):
    call = V3 if version == "v3" else V31
    expected = WEATHER if version == "v3" else TIME
    text = f"Let me look.\n{CALLS_BEGIN}{call}\n{call}{CALLS_END}"
    assert parsed(text) == ("", "Let me look.\n", [expected, expected])


NEAR_FORMS = {
    "V3 without a fence": ('function{S}get_weather\n{"city": "Paris"}', '{"city": "Paris"}'),
    "V3 with a plain fence": ('function{S}get_weather\n```\n{"city": "Paris"}\n```', '{"city": "Paris"}'),
    "V3 on one line": ('function{S}get_weather{"city": "Paris"}', '{"city": "Paris"}'),
    "V3 without arguments": ("function{S}get_weather", "{}"),
    "V3 with an empty fence": ("function{S}get_weather\n```json\n```", "{}"),
    "V3.1 with a fence": ('get_weather{S}```json\n{"city": "Paris"}\n```', '{"city": "Paris"}'),
    "V3.1 without arguments": ("get_weather{S}", "{}"),
    "V3.1 with white space": (' get_weather\n{S}\n {"city": "Paris"}\n\n', '{"city": "Paris"}'),
    "half JSON": ('get_weather{S}{"city": "Par', '{"city": "Par'),
    "no JSON": ("get_weather{S}Paris ```", "Paris ```"),
    "a fence inside": ('get_weather{S}{"code": "```\\nx\\n```"}', '{"code": "```\\nx\\n```"}'),
    "a fence in a fence": (
        'get_weather{S}```json\n{"code": "```\\nx\\n```"}\n```\n',
        '{"code": "```\\nx\\n```"}',
    ),
}


@pytest.mark.parametrize("name", NEAR_FORMS)
def test_near_forms_of_calls_are_calls(name):
    form, arguments = NEAR_FORMS[name]
    call = f"{CALL_BEGIN}{form.replace('{S}', SEPARATOR)}{CALL_END}"
    assert parsed(f"{CALLS_BEGIN}{call}{CALLS_END}") == ("", "", [ToolCall("get_weather", arguments)])
    assert parsed(f"{CALLS_BEGIN}\n{call}\n{call}\n{CALLS_END}\nSo.")[1:] == (
        "\nSo.",
        [ToolCall("get_weather", arguments)] * 2,
    )


@pytest.mark.parametrize(
    "text",
    [
        "plain <｜tool▁calls",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}cut off",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}get_weather",
        f"{CALLS_BEGIN}{CALL_BEGIN}get_weath",
        f"{CALLS_BEGIN}not a call",
        f"{CALLS_BEGIN}{CALL_BEGIN}no separator{CALL_END}",
        f"{CALL_BEGIN}outside{SEPARATOR}a section{CALL_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}get_wether{SEPARATOR}{{}}{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}get_wether\n```json\n{{}}\n```{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}{'x' * 400}{SEPARATOR}{{}}{CALL_END}{CALLS_END}",
    ],
)
def test_text_that_is_no_call_stays_text(text):
    assert parsed(text) == ("", text, [])


def test_a_wrong_name_does_not_spoil_the_calls_beside_it():
    wrong = f"{CALL_BEGIN}get_wether{SEPARATOR}{{}}{CALL_END}"
    assert parsed(f"{CALLS_BEGIN}{wrong}{V31}{CALLS_END}") == ("", f"{CALLS_BEGIN}{wrong}", [TIME])
    assert parsed(f"{CALLS_BEGIN}{V31}{wrong}{V3}{CALLS_END}") == ("", wrong, [TIME, WEATHER])


def test_two_sections_and_a_missing_end_are_read():
    assert parsed(f"{CALLS_BEGIN}{V31}{CALLS_END}and{CALLS_BEGIN}{V3}{CALLS_END}") == ("", "and", [TIME, WEATHER])
    unclosed = V31.removesuffix(CALL_END)
    assert parsed(f"{CALLS_BEGIN}{unclosed}{V3}{CALLS_END}") == ("", "", [TIME, WEATHER])
    assert parsed(f"{CALLS_BEGIN}{unclosed}{CALLS_END}.") == ("", ".", [TIME])
    assert parsed(f"{CALLS_BEGIN}{unclosed}") == ("", "", [TIME])


def test_a_cut_call_has_its_arguments_up_to_there():
    text = f'{CALLS_BEGIN}{CALL_BEGIN}get_weather{SEPARATOR}{{"city": "Par'
    assert parsed(text) == ("", "", [ToolCall("get_weather", '{"city": "Par')])
    assert parsed(f"{CALLS_BEGIN}{CALL_BEGIN}get_weather{SEPARATOR}") == ("", "", [ToolCall("get_weather", "")])


def test_a_call_ends_the_reasoning():
    section = f"{CALLS_BEGIN}{V31}{CALLS_END}"
    assert parsed(f"I must call.\n{section}", starts_in_reasoning=True) == ("I must call.", "", [TIME])
    assert parsed(f"hm{section}\n</think>\n\nDone.", starts_in_reasoning=True) == ("hm", "Done.", [TIME])
    no_call = f"I may write {CALLS_BEGIN} and go on"
    assert parsed(f"{no_call}</think>.", starts_in_reasoning=True) == (no_call, ".", [])


def test_arguments_are_passed_on_as_they_come():
    answer = parser()
    assert answer.push(f"{CALLS_BEGIN}{CALL_BEGIN}get_weather").tool_calls == ()
    [begun] = answer.push(SEPARATOR).tool_calls
    assert (begun.index, begun.name, begun.arguments) == (0, "get_weather", "")
    pieces = [answer.push(piece).tool_calls[0].arguments for piece in ('{"city"', ': "Par', 'is"}')]
    assert pieces == ['{"city"', ': "Par', 'is"}']
    assert answer.push(CALL_END).tool_calls == answer.push(CALLS_END, last=True).tool_calls == ()


@given(TEXTS, CUTS, st.booleans())
def test_calls_do_not_depend_on_the_chunks(text, cuts, starts_inside):
    whole = message(parser(starts_in_reasoning=starts_inside), [text])
    assert message(parser(starts_in_reasoning=starts_inside), chunks(text, cuts)) == whole


@given(TEXTS)
def test_text_without_a_call_is_unchanged(text):
    plain = text.replace(CALL_BEGIN, "")
    if not plain.lstrip().startswith("<think>"):
        assert message(parser(), [plain]) == ("", plain, [])


def test_kimis_calls_keep_their_ids():
    def call(head: str, arguments: str) -> str:
        return f"{KIMI.call_begin}{head}{KIMI.separator}{arguments}{KIMI.call_end}"

    first, second = call("functions.get_weather:0", '{"city": "北京"}'), call(" functions.get_time:1 ", "{}")
    text = f"I check.{KIMI.section_begin}{first}{second}{KIMI.section_end}"
    assert parsed(text, "kimi_k2") == (
        "",
        "I check.",
        [
            ToolCall("get_weather", '{"city": "北京"}', "functions.get_weather:0"),
            ToolCall("get_time", "{}", "functions.get_time:1"),
        ],
    )
    twice = parsed(f"{KIMI.section_begin}{first}{first}{KIMI.section_end}", "kimi_k2")[2]
    assert [one.call_id for one in twice] == ["functions.get_weather:0", None]  # the second gets another
    wrong = f"{KIMI.section_begin}{call('functions.get_wether:0', '{}')}{KIMI.section_end}"
    assert parsed(wrong, "kimi_k2") == ("", wrong, [])
    assert parsed(call("get_time", ""), "kimi_k2")[2] == [ToolCall("get_time", "{}", "get_time")]


SEARCH = {
    "type": "object",
    "properties": {"query": {"type": "string"}, "limit": {"type": "integer"}, "filters": {"type": "object"}},
}
PAIR_TOOLS = {"search": SEARCH, "get_time": {"type": "object"}}
DSML_CALL = (
    '<D invoke name="search">\n<D parameter name="query" string="true">a "b" <c> 猫\n</D parameter>\n'
    '<D parameter name="limit" string="false">10</D parameter>\n'
    '<D parameter name="filters" string="false">{"a": [1]}</D parameter>\n</D invoke>'
).replace("D ", DSML)
GLM_CALL = (
    '<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>a "b" <c> 猫\n</arg_value>\n'
    "<arg_key>limit</arg_key>\n<arg_value>10</arg_value>\n"
    '<arg_key>filters</arg_key>\n<arg_value>{"a": [1]}</arg_value>\n</tool_call>'
)
SEARCHED = ToolCall("search", '{"query": "a \\"b\\" <c> 猫\\n", "limit": 10, "filters": {"a": [1]}}')
NOW = ToolCall("get_time", "{}")


def test_deepseek_v32s_calls_are_read():
    now = f'<{DSML}invoke name="get_time">\n</{DSML}invoke>'
    text = f"I look.\n\n<{DSML}function_calls>\n{DSML_CALL}\n{now}\n</{DSML}function_calls>"
    expected = ("", "I look.", [SEARCHED, NOW])  # the line breaks are the form's
    assert parsed(text, "deepseek_v32", tools=PAIR_TOOLS) == expected
    assert parsed(text.replace(DSML, ""), "deepseek_v32", tools=PAIR_TOOLS) == expected  # as it is often written
    in_reasoning = parsed(f"hm{text}", "deepseek_v32", tools=PAIR_TOOLS, starts_in_reasoning=True)
    assert in_reasoning == ("hmI look.", "", [SEARCHED, NOW])


def test_glms_calls_are_read():
    now = "<tool_call>get_time</tool_call>"
    assert parsed(f"I look.\n{GLM_CALL}\n{now}\n", "glm", tools=PAIR_TOOLS) == ("", "I look.", [SEARCHED, NOW])
    assert parsed("I look.\n", "glm", tools=PAIR_TOOLS) == ("", "I look.\n", [])
    one_line = "<tool_call>search<arg_key>query</arg_key><arg_value>x</arg_value></tool_call>"
    assert parsed(one_line, "glm", tools=PAIR_TOOLS)[2] == [ToolCall("search", '{"query": "x"}')]


@pytest.mark.parametrize(
    ("value", "json_value"),
    [("10", "10"), (' {"a": 1} ', '{"a": 1}'), ("true", "true"), ("Paris", '"Paris"'), ("", '""'), ("1 2", '"1 2"')],
)
def test_values_without_a_known_type_are_json_where_they_can_be(value, json_value):
    text = f"<tool_call>search<arg_key>other</arg_key><arg_value>{value}</arg_value></tool_call>"
    assert parsed(text, "glm", tools=PAIR_TOOLS)[2] == [ToolCall("search", f'{{"other": {json_value}}}')]


@pytest.mark.parametrize(
    ("text", "family"),
    [
        (f"<{DSML}function_calls>\nno call", "deepseek_v32"),
        (DSML_CALL.replace("search", "serach"), "deepseek_v32"),
        (f'<{DSML}invoke name="sear', "deepseek_v32"),
        (f"<{DSML}invoke {'x' * 300}>", "deepseek_v32"),
        ("<function_calls> are written <so>", "deepseek_v32"),
        (GLM_CALL.replace("search", "serach"), "glm"),
        ("<tool_call>sear", "glm"),
        ('<tool_call>\n{"name": "search"}\n</tool_call>', "glm"),
    ],
)
def test_what_is_no_call_of_pairs_is_text(text, family):
    assert parsed(text, family, tools=PAIR_TOOLS) == ("", text, [])


def test_calls_of_pairs_that_are_cut_or_broken_end_somewhere():
    def calls(text: str, family: str = "glm") -> list[ToolCall]:
        return parsed(text, family, tools=PAIR_TOOLS)[2]

    begin = "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>"
    assert calls(f"{begin}Par") == [ToolCall("search", '{"query": "Par')]
    assert calls(f"{begin}Par</tool_call>") == [ToolCall("search", '{"query": "Par"}')]
    assert calls("<tool_call>search\n<arg_key>query</tool_call>") == [ToolCall("search", "{}")]
    assert calls("<tool_call>search\n") == [ToolCall("search", "")]
    assert calls('<tool_call>search\n{"query": "x"}</tool_call>') == [ToolCall("search", '{"query": "x"}')]
    broken = f'<{DSML}invoke name="search">junk</{DSML}invoke>'
    assert calls(broken, "deepseek_v32") == [ToolCall("search", "junk")]


PAIR_FRAGMENTS = [
    *re.findall(r"<[^<>]*>|[^<>]+", DSML_CALL),
    *re.findall(r"<[^<>]*>|[^<>]+", GLM_CALL),
    f"<{DSML}function_calls>",
    f"</{DSML}function_calls>",
    DSML_CALL,
    GLM_CALL,
    "</think>",
]
PAIR_TEXTS = st.lists(st.sampled_from(PAIR_FRAGMENTS), max_size=12).map("".join)


@given(PAIR_TEXTS, CUTS, st.booleans(), st.sampled_from(["deepseek_v32", "glm"]))
def test_calls_of_pairs_do_not_depend_on_the_chunks(text, cuts, starts_inside, family):
    whole = message(parser(family, starts_inside, PAIR_TOOLS), [text])
    assert message(parser(family, starts_inside, PAIR_TOOLS), chunks(text, cuts)) == whole


def test_the_start_of_a_delimiter_is_not_safe():
    assert safe_length("abc", "cde") == 2
    assert safe_length("abc", "xyz", "bcd") == 1
    assert safe_length("abc", "xyz") == 3


@pytest.mark.parametrize(
    ("text", "tool", "expected"),
    [
        ('{"name": "f", "arguments": {"猫": 1}}', None, ("", [ToolCall("f", '{"猫": 1}')])),
        ('{\n "name" : "f" ,\n "arguments" : {"a": {}} \n}\n', None, ("", [ToolCall("f", '{"a": {}}')])),
        (' {"a": 1} ', "g", ("", [ToolCall("g", '{"a": 1}')])),
        ('{"a": ', "g", ("", [ToolCall("g", '{"a":')])),
        ('{"name": "f", "arguments": {"a": 1}', None, ("", [ToolCall("f", '{"a": 1}')])),
        ('{"name": "f", "arguments": {"a": {"b": 1}', None, ("", [ToolCall("f", '{"a": {"b": 1}')])),
        ('{"name": "f', None, ('{"name": "f', [])),
        ("[]", None, ("[]", [])),
        ("[" * 100_000, "g", ("", [ToolCall("g", "[" * 100_000)])),
    ],
)
def test_forced_calls_are_parsed(text, tool, expected):
    for parts in ([text], [*list(text[:1000]), text[1000:]]):
        assert message(ForcedCallParser(tool), parts)[1:] == expected


def test_the_schema_of_any_call_keeps_its_references():
    arguments = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    schema = any_call_schema([("f", arguments), ("g", {"type": "object"})])
    assert schema["$defs"]["0"]["properties"]["a"] == {"$ref": "#/$defs/0/$defs/A"}
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["f", "g"]
    ConstraintSpec.json_schema(json.dumps(schema))


@given(CUTS)
def test_reasoning_content_and_calls_are_separated(cuts):
    text = f"hm</think>Let me look.{CALLS_BEGIN}{V3}{V31}{CALLS_END}"
    with_tools = message(parser(starts_in_reasoning=True), chunks(text, cuts))
    assert with_tools == ("hm", "Let me look.", [WEATHER, TIME])
    without_tools = message(MessageParser(None, True), chunks(text, cuts))
    assert without_tools == ("hm", text.removeprefix("hm</think>"), [])


def test_constrained_answers_are_content():
    assert message(PlainParser(), ["<think>", '{"a": 1}']) == ("", '<think>{"a": 1}', [])
