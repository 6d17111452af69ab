"""Reasoning and tool calls are parsed however the text is cut into chunks, and none of the text is lost."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.chat.deepseek import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    DeepSeekParser,
    ReasoningSplitter,
    ToolCallSplitter,
    ends_in_reasoning,
    safe_length,
)
from soli.chat.parser import (
    ForcedCallParser,
    MessageDelta,
    OutputParser,
    PlainParser,
    ToolCall,
    any_call_schema,
    parse_forced_call,
)
from soli.engine.constraint import ConstraintSpec

V3 = f'{CALL_BEGIN}function{SEPARATOR}get_weather\n```json\n{{"city": "北京"}}\n```{CALL_END}'
V31 = f'{CALL_BEGIN}get_time{SEPARATOR}{{"zone": "CET"}}{CALL_END}'
FRAGMENTS = [
    CALLS_BEGIN,
    CALLS_END,
    CALL_BEGIN,
    CALL_END,
    SEPARATOR,
    V3,
    V31,
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


def split_reasoning(parts: list[str], starts_inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(starts_inside)
    pairs = [*(splitter.push(part) for part in parts), splitter.push("", last=True)]
    return "".join(reasoning for reasoning, _ in pairs), "".join(answer for _, answer in pairs)


def split_calls(parts: list[str]) -> list[str | ToolCall]:
    """Calls, and the plain text between them joined."""
    splitter = ToolCallSplitter()
    joined: list[str | ToolCall] = []
    for item in [*(item for part in parts for item in splitter.push(part)), *splitter.push("", last=True)]:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


def message(parser: OutputParser, parts: list[str]) -> MessageDelta:
    """The whole message that the chunks make."""
    deltas = [*(parser.push(part) for part in parts), parser.push("", last=True)]
    return MessageDelta(
        "".join(delta.reasoning for delta in deltas),
        "".join(delta.content for delta in deltas),
        tuple(call for delta in deltas for call in delta.tool_calls),
    )


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
    ],
)
def test_reasoning_is_the_text_between_its_delimiters(text, starts_inside, expected):
    assert split_reasoning([text], starts_inside) == expected
    assert split_reasoning(list(text), starts_inside) == expected


@given(TEXTS, CUTS, st.booleans())
def test_reasoning_does_not_depend_on_the_chunks(text, cuts, starts_inside):
    assert split_reasoning(chunks(text, cuts), starts_inside) == split_reasoning([text], starts_inside)


def test_a_prompt_may_end_inside_the_reasoning():
    assert ends_in_reasoning("<|assistant|><think>\n")
    assert not ends_in_reasoning("<|assistant|><think>\n</think>")


@pytest.mark.parametrize("version", ["v3", "v31"])
def test_calls_of_both_formats_are_parsed(version):
    call = V3 if version == "v3" else V31
    v3_call = ToolCall("get_weather", '{"city": "北京"}')
    expected = v3_call if version == "v3" else ToolCall("get_time", '{"zone": "CET"}')
    text = f"Let me look.\n{CALLS_BEGIN}{call}\n{call}{CALLS_END}"
    assert split_calls([text]) == ["Let me look.\n", expected, expected]
    assert split_calls(list(text)) == ["Let me look.\n", expected, expected]


@pytest.mark.parametrize(
    "text",
    [
        "plain <｜tool▁calls",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}cut off",
        f"{CALLS_BEGIN}not a call",
        f"{CALLS_BEGIN}{CALL_BEGIN}no separator{CALL_END}",
        f"{CALL_BEGIN}outside{SEPARATOR}a section{CALL_END}",
    ],
)
def test_text_that_is_no_call_stays_text(text):
    assert split_calls([text]) == [text]
    assert split_calls(list(text)) == [text]


@given(TEXTS, CUTS)
def test_calls_do_not_depend_on_the_chunks(text, cuts):
    assert split_calls(chunks(text, cuts)) == split_calls([text])


@given(TEXTS)
def test_text_outside_sections_is_unchanged(text):
    plain = text.replace(CALLS_BEGIN, "")
    assert "".join(map(str, split_calls([plain]))) in (plain, "")


def test_the_start_of_a_delimiter_is_not_safe():
    assert safe_length("abc", "cde") == 2
    assert safe_length("abc", "xyz", "bcd") == 1
    assert safe_length("abc", "xyz") == 3


def test_forced_calls_are_parsed():
    assert parse_forced_call('{"name": "f", "arguments": {"猫": 1}}', None) == ToolCall("f", '{"猫": 1}')
    assert parse_forced_call(' {"a": 1} ', "g") == ToolCall("g", '{"a": 1}')
    assert parse_forced_call('{"a": ', "g") is None
    assert parse_forced_call("[]", None) is None
    assert parse_forced_call("[" * 100_000, "g") is None


def test_the_schema_of_any_call_keeps_its_references():
    arguments = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    schema = any_call_schema([("f", arguments), ("g", {"type": "object"})])
    assert schema["$defs"]["0"]["properties"]["a"] == {"$ref": "#/$defs/0/$defs/A"}
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["f", "g"]
    ConstraintSpec.json_schema(json.dumps(schema))


@given(CUTS)
def test_deepseeks_parser_separates_reasoning_content_and_calls(cuts):
    text = f"hm</think>Let me look.{CALLS_BEGIN}{V3}{V31}{CALLS_END}"
    calls = (ToolCall("get_weather", '{"city": "北京"}'), ToolCall("get_time", '{"zone": "CET"}'))
    with_tools = message(DeepSeekParser(True, parse_tool_calls=True), chunks(text, cuts))
    assert with_tools == MessageDelta("hm", "Let me look.", calls)
    without_tools = message(DeepSeekParser(True, parse_tool_calls=False), chunks(text, cuts))
    assert without_tools == MessageDelta("hm", text.removeprefix("hm</think>"))


def test_constrained_answers_are_content_or_one_forced_call():
    assert message(PlainParser(), ["<think>", '{"a": 1}']) == MessageDelta(content='<think>{"a": 1}')
    assert message(ForcedCallParser("f"), ['{"a"', ": 1}"]) == MessageDelta(tool_calls=(ToolCall("f", '{"a": 1}'),))
    assert message(ForcedCallParser("f"), ['{"a"', ": "]) == MessageDelta(content='{"a": ')
