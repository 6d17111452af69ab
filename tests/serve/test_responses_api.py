"""OpenAI's Responses API: its items reach the template as chats do, and its answers are those of chats."""

import json

import httpx
import pytest

from soli.chat.parsers.families import DEEPSEEK
from soli.serve.responses_api.prompts import chat_fields
from soli.serve.responses_api.requests import ResponsesBody
from tests.serve.tiny_server import TEMPLATE, scripted_server, template, tiny_server

CALLS_BEGIN, CALLS_END = DEEPSEEK.section_begin, DEEPSEEK.section_end
CALL_BEGIN, SEPARATOR, CALL_END = DEEPSEEK.call_begin, DEEPSEEK.separator, DEEPSEEK.call_end
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Wien", "北京"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "get_weather", "description": "the weather", "parameters": SCHEMA}
BASE = {"model": "tiny", "input": "hello world", "temperature": 0}
CALLS = (
    f'{CALLS_BEGIN}{CALL_BEGIN}get_weather{SEPARATOR}{{"city": "北京"}}{CALL_END}\n'
    f'{CALL_BEGIN}get_weather{SEPARATOR}{{"city": "Wien"}}{CALL_END}{CALLS_END}'
)
THOUGHT_AND_CALLS = f"hm, hm\n</think>\n\nLet me look.{CALLS}"


@pytest.fixture(scope="module")
def tiny_url():
    with tiny_server() as url:
        yield url


def thinking_server(text):
    """A scripted server whose template opens the reasoning."""
    source = template(TEMPLATE.replace("{%- if thinking %}", "{%- if true %}"))
    return scripted_server(lambda request: text, source=source)


def send(url, **fields):
    return httpx.post(f"{url}/v1/responses", json=BASE | fields, timeout=60)


def response(url, **fields):
    answer = send(url, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(url, **fields):
    answer = send(url, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    parsed = []
    for number, block in enumerate(answer.text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}" and parsed[-1]["sequence_number"] == number
    return parsed


def joined(stream):
    """The output that a stream's deltas make up."""
    output = []
    for event in stream:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output)
            output.append(event["item"])
        elif kind == "content_part.added":
            output[event["output_index"]]["content"].append(event["part"])
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            output[event["output_index"]]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            output[event["output_index"]]["arguments"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert output[event["output_index"]]["content"][0]["text"] == event["text"]
        elif kind == "function_call_arguments.done":
            assert output[event["output_index"]]["arguments"] == event["arguments"]
        elif kind == "output_item.done":
            output[event["output_index"]]["status"] = event["item"]["status"]
            assert output[event["output_index"]] == event["item"]
    return output


def comparable(output):
    """Items without the ids, which are new in each answer."""
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in output]


def text_of(answer):
    return "".join(part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"])


def test_the_answer_is_that_of_a_chat(tiny_url):
    chat = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello world"}]}
    chat |= {"temperature": 0, "max_tokens": 20}
    expected = httpx.post(f"{tiny_url}/v1/chat/completions", json=chat).json()
    answer = response(tiny_url, instructions="be brief", temperature=0, max_output_tokens=20)
    assert text_of(answer) == expected["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == expected["usage"]["completion_tokens"]
    assert answer["object"] == "response" and answer["instructions"] == "be brief" and answer["store"] is False
    cut = expected["choices"][0]["finish_reason"] == "length"
    assert answer["status"] == ("incomplete" if cut else "completed")
    assert answer["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)


@pytest.mark.parametrize(
    "fields", [{}, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"max_output_tokens": 2}]
)
def test_a_stream_makes_up_the_same_response(tiny_url, fields):
    fields = {"temperature": 0, "max_output_tokens": 20} | fields
    whole, stream = response(tiny_url, **fields), events(tiny_url, **fields)
    names = [event["type"] for event in stream]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == f"response.{whole['status']}"
    last = stream[-1]["response"]
    assert comparable(last["output"]) == comparable(whole["output"])
    assert text_of({"output": joined_text(stream)}) == text_of(whole)
    if "include" in fields:
        [part] = whole["output"][0]["content"]
        assert "".join(one["token"] for one in part["logprobs"]) and len(part["logprobs"][0]["top_logprobs"]) == 2


def joined_text(stream):
    """`joined`, but for logprobs, which deltas have as well."""
    without = [event | {"logprobs": []} for event in stream]
    for event in without:
        if event["type"] == "response.output_item.done" and event["item"]["type"] == "message":
            event["item"]["content"][0]["logprobs"] = []
    return joined(without)


def test_reasoning_message_and_calls_are_items_in_their_order():
    with thinking_server(THOUGHT_AND_CALLS) as (url, _):
        whole, stream = response(url, tools=[WEATHER]), events(url, tools=[WEATHER])
    reasoning, message, *calls = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm, hm"}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "Let me look." and message["role"] == "assistant"
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "北京"}, {"city": "Wien"}]
    assert all(call["type"] == "function_call" and call["status"] == "completed" for call in calls)
    assert len({item["id"] for item in whole["output"]}) == 4 and len({call["call_id"] for call in calls}) == 2
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert comparable(joined(stream)) == comparable(whole["output"]) == comparable(stream[-1]["response"]["output"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_forced_tool_is_called(tiny_url, choice):
    answer = response(tiny_url, tools=[WEATHER], tool_choice=choice)
    [call] = answer["output"]
    assert call["name"] == "get_weather" and json.loads(call["arguments"])["city"] in ("Wien", "北京")
    assert answer["tool_choice"] == choice and answer["tools"][0]["name"] == "get_weather"
    [streamed] = joined(events(tiny_url, tools=[WEATHER], tool_choice=choice))
    assert json.loads(streamed["arguments"])["city"] in ("Wien", "北京")


def test_an_answer_can_be_sent_back_with_the_results():
    with thinking_server(THOUGHT_AND_CALLS) as (url, engine):
        output = response(url, tools=[WEATHER])["output"]
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "sunny"} for item in output[2:]
        ]
        turns = [{"role": "user", "content": "hello world"}, *output, *results, {"role": "user", "content": "And now?"}]
        response(url, tools=[WEATHER], input=turns)
        prompt = engine.text_model.tokenizer.decode(engine.requests[-1].prompt_ids)
    places = [prompt.index(text) for text in ("hello world", "Let me look.", '{"city": "Wien"}', "sunny", "And now?")]
    assert places == sorted(places)


def test_items_of_one_turn_are_one_message():
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "id": "fc_1"}
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]},
        call,
        call | {"call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
        call | {"call_id": "c"},
        {"role": "assistant", "content": "y"},
        {"role": "assistant", "content": "z"},
    ]
    messages = chat_fields(ResponsesBody.model_validate({"input": items, "instructions": "i"}))["messages"]
    assert [message["role"] for message in messages] == [
        "system", "user", "assistant", "tool", "tool", "assistant", "assistant", "assistant"
    ]  # fmt: skip
    turn = messages[2]
    assert turn["reasoning_content"] == "hm" and turn["content"] == [{"type": "text", "text": "x"}]
    assert [one["id"] for one in turn["tool_calls"]] == ["a", "b"]
    assert messages[5]["content"] is None and [one["id"] for one in messages[5]["tool_calls"]] == ["c"]
    assert [message["content"] for message in messages[6:]] == ["y", "z"]


def test_a_json_schema_constrains_the_answer(tiny_url):
    text = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}}
    answer = response(tiny_url, text=text)
    assert json.loads(text_of(answer))["city"] in ("Wien", "北京") and answer["text"]["format"]["name"] == "answer"


NEUTRAL = [
    {"store": True}, {"store": False}, {"metadata": {}}, {"previous_response_id": None}, {"conversation": None},
    {"tools": []}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": True}, {"include": []},
    {"include": ["reasoning.encrypted_content"]}, {"truncation": "disabled"}, {"background": False}, {"user": "me"},
    {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {"reasoning": {"effort": None, "summary": "auto"}},
    {"reasoning": {"effort": "low"}}, {"service_tier": "auto"}, {"stream": None}, {"stream_options": None},
    {"max_tool_calls": None}, {"surprise": None}, {"top_logprobs": 0}, {"instructions": None},
    {"prompt_cache_key": "x"}, {"safety_identifier": "x"},
]  # fmt: skip


@pytest.mark.parametrize("fields", NEUTRAL)
def test_neutral_values_and_hints_are_accepted(tiny_url, fields):
    assert response(tiny_url, max_output_tokens=1, **fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"surprise": 1}, "surprise"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input.0.content.0.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format"),
    ],
)  # fmt: skip
def test_errors_name_the_parameter(tiny_url, fields, param):
    for stream in (False, True):
        answer = send(tiny_url, stream=stream, **fields)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param and error["message"]


def test_a_failure_in_the_middle_is_the_last_event():
    def broken(request):
        raise RuntimeError("secret detail")

    with scripted_server(broken) as (url, _):
        assert send(url).status_code == 500
        last = events(url)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert "the step failed" in last["response"]["error"]["message"]
