"""Messages can be sent back as clients store them: null and empty fields are absent, what repeats others is ignored."""

import json

import openai
import pytest
from pydantic import ValidationError

from soli.chat.parsers.families import DEEPSEEK
from soli.serve.protocol_requests import ChatBody
from soli.serve.stored_messages import is_neutral
from tests.serve.tiny_server import scripted_server

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}},
]
TEXT = (
    f'I look.{DEEPSEEK.section_begin}{DEEPSEEK.call_begin}f{DEEPSEEK.separator}{{"a": 1}}{DEEPSEEK.call_end}'
    f"{DEEPSEEK.call_begin}g{DEEPSEEK.separator}{DEEPSEEK.call_end}{DEEPSEEK.section_end}"
)


def for_template(message: dict) -> dict:
    body = ChatBody.model_validate({"messages": [USER, message]})
    return body.messages[1].for_template


PLAIN = {"role": "assistant", "content": "ok"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (PLAIN | {"refusal": None, "annotations": []}, PLAIN),
        (PLAIN | {"audio": None, "function_call": None, "tool_calls": None, "parsed": {"a": 1}}, PLAIN),
        (PLAIN | {"tool_calls": [], "name": "", "tool_call_id": "", "reasoning_content": ""}, PLAIN),
        (PLAIN | {"unknown": None, "other": {"refusal": None}, "more": [None, ""]}, PLAIN),
        (PLAIN | {"annotations": [{"type": "url_citation"}], "provider_specific_fields": {"a": 1}}, PLAIN),
        (PLAIN | {"reasoning": "hm"}, PLAIN | {"reasoning_content": "hm"}),
        (PLAIN | {"reasoning": "hm", "reasoning_content": None}, PLAIN | {"reasoning_content": "hm"}),
        (PLAIN | {"thinking": "hm", "reasoning_content": "hm"}, PLAIN | {"reasoning_content": "hm"}),
        (CALLING | {"tool_calls": [CALL | {"index": 0}]}, CALLING),
        ({"role": "assistant", "tool_calls": [CALL]}, CALLING),
        (CALLING | {"tool_calls": [{**CALL, "type": None}]}, CALLING),
        (
            CALLING | {"tool_calls": [{**CALL, "function": {**CALL["function"], "parsed_arguments": {"a": 1}}}]},
            CALLING,
        ),
        (CALLING | {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}]}, CALLING),
        (
            {"role": "tool", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
            {"role": "tool", "content": [{"type": "text", "text": "x"}]},
        ),
    ],
)
def test_what_says_nothing_is_absent(message, expected):
    assert for_template(message) == expected


@pytest.mark.parametrize("arguments", [None, "", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    [stored] = for_template({"role": "assistant", "tool_calls": [call]})["tool_calls"]
    assert stored["function"]["arguments"] == "{}"


def test_deltas_of_a_stream_are_the_calls_that_they_make():
    deltas = [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "id": None, "type": None, "function": {"name": None, "arguments": '{"a"'}},
        {"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        {"index": 0, "function": {"arguments": ": 1}"}},
    ]
    calls = for_template({"role": "assistant", "tool_calls": deltas})["tool_calls"]
    assert calls == [CALL, {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("message", "place"),
    [
        (PLAIN | {"refusal": "no"}, "refusal"),
        (PLAIN | {"audio": {"id": "a"}}, "audio"),
        (PLAIN | {"function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        (PLAIN | {"unknown": 0}, "unknown"),
        (CALLING | {"tool_calls": [CALL | {"custom": {"name": "f"}}]}, "tool_calls.0.custom"),
        (CALLING | {"tool_calls": [{**CALL, "function": {"arguments": "{}"}}]}, "tool_calls.0.function.name"),
        (CALLING | {"tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls.0.type"),
        (CALLING | {"tool_calls": "f"}, "tool_calls"),
        (CALLING | {"tool_calls": [1]}, "tool_calls.0"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content"),
    ],
)
def test_what_would_change_the_prompt_is_rejected_by_name(message, place):
    with pytest.raises(ValidationError) as raised:
        for_template(message)
    places = [".".join(map(str, error["loc"])) for error in raised.value.errors()]
    assert any(f"messages.1.{place}" in where for where in places)


def test_neutral_values_say_nothing_at_any_depth():
    assert all(map(is_neutral, (None, "", [], {}, {"a": [None, {"b": ""}]})))
    assert not any(map(is_neutral, (0, False, "x", [0], {"a": {"b": False}})))


def test_every_form_that_the_openai_client_has_can_be_sent_back():
    with scripted_server(lambda request: TEXT) as (url, engine):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def create(*turns, **options):
            return client.chat.completions.create(
                model="tiny", messages=[USER, *turns], tools=TOOLS, max_tokens=300, **options
            )

        message = create().choices[0].message
        with client.chat.completions.stream(model="tiny", messages=[USER], tools=TOOLS, max_tokens=300) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_completion().choices[0].message
        chunks = [chunk.choices[0].delta for chunk in create(stream=True)]
        deltas = [call.model_dump() for delta in chunks for call in delta.tool_calls or []]
        joined = {"role": "assistant", "content": "I look.", "tool_calls": deltas}
        forms = [message, message.model_dump(), message.to_dict(), streamed, streamed.model_dump(), joined]
        forms.append(json.loads(message.model_dump_json()))
        for form in forms:
            create(form, {"role": "tool", "tool_call_id": "c1", "content": "sunny"})
    prompts = [engine.text_model.tokenizer.decode(request.prompt_ids) for request in engine.requests[3:]]
    assert len(prompts) == len(forms) and len(set(prompts)) == 1
    assert 'I look.f{"a": 1}g{}' in prompts[0]
