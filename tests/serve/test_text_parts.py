"""Reasoning and tool calls are found in text however it was cut into pieces, and nothing of the text is lost."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.chat.delimiters import settled
from soli.chat.reasoning import ThinkSplit, ends_thinking
from soli.chat.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    ToolCall,
    ToolText,
    forced_call,
    schema_of_any,
)
from soli.engine.constraint import ConstraintSpec

V3 = f'{CALL_BEGIN}function{SEPARATOR}get_weather\n```json\n{{"city": "北京"}}\n```{CALL_END}'
V31 = f'{CALL_BEGIN}get_time{SEPARATOR}{{"zone": "CET"}}{CALL_END}'
MARKS = [
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
TEXTS = st.lists(st.sampled_from(MARKS), max_size=12).map("".join)


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


def think(parts: list[str], thinking: bool) -> tuple[str, str]:
    split = ThinkSplit(thinking)
    found = [*(split.push(part) for part in parts), split.push("", last=True)]
    return "".join(thought for thought, _ in found), "".join(said for _, said in found)


def call(parts: list[str]) -> list[str | ToolCall]:
    """Calls, and the plain text between them in one piece each."""
    split = ToolText()
    joined: list[str | ToolCall] = []
    for one in [*(found for part in parts for found in split.push(part)), *split.push("", last=True)]:
        if isinstance(one, str) and joined and isinstance(joined[-1], str):
            joined[-1] += one
        else:
            joined.append(one)
    return joined


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
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
def test_reasoning_is_what_stands_between_the_marks(text, thinking, expected):
    assert think([text], thinking) == expected
    assert think(list(text), thinking) == expected


@given(TEXTS, st.lists(st.integers(0, 500), max_size=8), st.booleans())
def test_cuts_change_no_reasoning(text, cuts, thinking):
    assert think(pieces(text, cuts), thinking) == think([text], thinking)


def test_a_prompt_may_end_inside_the_reasoning():
    assert ends_thinking("<|assistant|><think>\n")
    assert not ends_thinking("<|assistant|><think>\n</think>")


@pytest.mark.parametrize("sort", ["v3", "v31"])
def test_calls_of_both_forms_are_found(sort):
    one = V3 if sort == "v3" else V31
    expected = ToolCall("get_weather", '{"city": "北京"}') if sort == "v3" else ToolCall("get_time", '{"zone": "CET"}')
    text = f"Let me look.\n{CALLS_BEGIN}{one}\n{one}{CALLS_END}"
    assert call([text]) == ["Let me look.\n", expected, expected]
    assert call(list(text)) == ["Let me look.\n", expected, expected]


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
def test_what_is_no_call_stays_text(text):
    assert call([text]) == [text]
    assert call(list(text)) == [text]


@given(TEXTS, st.lists(st.integers(0, 500), max_size=8))
def test_cuts_change_no_call(text, cuts):
    assert call(pieces(text, cuts)) == call([text])


@given(TEXTS)
def test_text_outside_sections_comes_back_whole(text):
    plain = text.replace(CALLS_BEGIN, "")
    assert "".join(map(str, call([plain]))) in (plain, "")


def test_settled_leaves_what_may_become_a_mark():
    assert settled("abc", "cde") == 2
    assert settled("abc", "xyz", "bcd") == 1
    assert settled("abc", "xyz") == 3


def test_forced_calls_come_back_as_calls():
    assert forced_call('{"name": "f", "arguments": {"猫": 1}}', None) == ToolCall("f", '{"猫": 1}')
    assert forced_call(' {"a": 1} ', "g") == ToolCall("g", '{"a": 1}')
    assert forced_call('{"a": ', "g") is None
    assert forced_call("[]", None) is None


def test_the_schema_of_any_call_keeps_its_references():
    arguments = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    schema = schema_of_any([("f", arguments), ("g", {"type": "object"})])
    assert schema["$defs"]["0"]["properties"]["a"] == {"$ref": "#/$defs/0/$defs/A"}
    assert [one["properties"]["name"]["const"] for one in schema["anyOf"]] == ["f", "g"]
    ConstraintSpec.json_schema(json.dumps(schema))
