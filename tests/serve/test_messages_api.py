"""Anthropic's Messages API: its bodies reach the template as chats do, and its answers are those of chats."""

import json
import time

import httpx
import pytest

from soli.chat.parsers.families import DEEPSEEK
from soli.serve.middleware import AccessRules
from tests.serve.tiny_server import scripted_server, tiny, tiny_server

CALLS_BEGIN, CALLS_END = DEEPSEEK.section_begin, DEEPSEEK.section_end
CALL_BEGIN, SEPARATOR, CALL_END = DEEPSEEK.call_begin, DEEPSEEK.separator, DEEPSEEK.call_end
HELLO = [{"role": "user", "content": "hello world"}]
WEATHER = {
    "name": "get_weather",
    "description": "the weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Wien", "北京"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
BASE = {"model": "tiny", "max_tokens": 400, "messages": HELLO, "temperature": 0}
THOUGHT_AND_CALLS = (
    "hm, hm\n</think>\n\nLet me look."
    f'{CALLS_BEGIN}{CALL_BEGIN}get_weather{SEPARATOR}{{"city": "北京"}}{CALL_END}\n'
    f'{CALL_BEGIN}get_weather{SEPARATOR}{{"city": "Wien"}}{CALL_END}{CALLS_END}'
)


@pytest.fixture(scope="module")
def tiny_url():
    with tiny_server() as url:
        yield url


def send(url, path="/v1/messages", **fields):
    return httpx.post(url + path, json=BASE | fields, timeout=60)


def message(url, **fields):
    answer = send(url, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(url, **fields):
    """The events of a stream; each is named by its type."""
    answer = send(url, stream=True, **fields)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    parsed = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
    return parsed


def joined(stream):
    """The message that a stream's events make up."""
    result = stream[0]["message"]
    for event in stream[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(result["content"])
            result["content"].append(event["content_block"] | {"arguments": ""})
        elif event["type"] == "content_block_delta":
            block, delta = result["content"][event["index"]], event["delta"]
            names = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
            name = names[delta["type"]]
            target = "arguments" if name == "partial_json" else name
            block[target] += delta[name]
        elif event["type"] == "content_block_stop":
            block = result["content"][event["index"]]
            arguments = block.pop("arguments")
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments or "{}")
        elif event["type"] == "message_delta":
            result |= event["delta"] | {"usage": event["usage"]}
    assert stream[-1]["type"] == "message_stop"
    return result


def test_an_answer_is_a_message_with_usage(tiny_url):
    answer = message(tiny_url, temperature=0, max_tokens=6)
    assert answer["type"] == "message" and answer["role"] == "assistant" and answer["model"] == "tiny"
    assert answer["id"].startswith("msg_") and answer["stop_sequence"] is None
    [block] = answer["content"]
    assert block["type"] == "text"
    assert answer["stop_reason"] in ("max_tokens", "end_turn") and answer["usage"]["output_tokens"] <= 6
    usage = answer["usage"]
    counted = {"max_tokens": None, "temperature": None}
    prompt = send(tiny_url, "/v1/messages/count_tokens", **counted).json()["input_tokens"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt


def test_the_answer_is_that_of_a_chat(tiny_url):
    chat = {"messages": HELLO, "temperature": 0, "max_tokens": 20}
    text = httpx.post(f"{tiny_url}/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    assert message(tiny_url, temperature=0, max_tokens=20)["content"][0]["text"] == text


@pytest.mark.parametrize("fields", [{}, {"stop_sequences": ["e"]}, {"max_tokens": 2}, {"top_k": 1, "top_p": 0.5}])
def test_a_stream_makes_up_the_same_message(tiny_url, fields):
    fields = {"temperature": 0, "max_tokens": 20} | fields
    whole, streamed = message(tiny_url, **fields), joined(events(tiny_url, **fields))
    for answer in (whole, streamed):
        answer.pop("id")
        del answer["usage"]["cache_read_input_tokens"], answer["usage"]["input_tokens"]
    assert streamed == whole


def test_thinking_text_and_calls_are_blocks_in_their_order():
    fields = {"tools": [WEATHER], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    with scripted_server(lambda request: THOUGHT_AND_CALLS) as (url, _):
        whole, stream = message(url, **fields), events(url, **fields)
    assert whole["stop_reason"] == "tool_use"
    thinking, text, *calls = whole["content"]
    assert thinking == {"type": "thinking", "thinking": "hm, hm", "signature": ""}
    assert text == {"type": "text", "text": "Let me look."}
    assert [call["input"] for call in calls] == [{"city": "北京"}, {"city": "Wien"}]
    assert all(call["type"] == "tool_use" and call["name"] == "get_weather" for call in calls)
    assert len({call["id"] for call in calls}) == 2
    streamed = joined(stream)
    for answer in (whole, streamed):
        for block in answer["content"]:
            block.pop("id", None)
    assert streamed["content"] == whole["content"] and streamed["stop_reason"] == "tool_use"
    names = [event["type"] for event in stream]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop") == 4


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_forced_tool_is_called(tiny_url, choice):
    fields = {"tools": [WEATHER], "tool_choice": choice}
    whole = message(tiny_url, **fields)
    [block] = whole["content"]
    assert block["type"] == "tool_use" and block["input"]["city"] in ("Wien", "北京")
    assert whole["stop_reason"] == "tool_use"
    assert joined(events(tiny_url, **fields))["content"][0]["input"]["city"] in ("Wien", "北京")


def test_an_answer_can_be_sent_back_with_the_results():
    """Blocks as they came, with the nulls that clients add."""
    with scripted_server(lambda request: THOUGHT_AND_CALLS) as (url, engine):
        content = message(url, tools=[WEATHER], thinking={"type": "enabled", "budget_tokens": 9})["content"]
        content = [block | {"citations": None, "caller": None, "cache_control": None} for block in content]
        results = [
            {"type": "tool_result", "tool_use_id": content[2]["id"], "content": [{"type": "text", "text": "sunny"}]},
            {"type": "tool_result", "tool_use_id": content[3]["id"], "content": "no city", "is_error": True},
            {"type": "text", "text": "And now?"},
        ]
        turns = [*HELLO, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
        message(url, tools=[WEATHER], messages=turns, system=[{"type": "text", "text": "be brief"}])
        prompt = engine.text_model.tokenizer.decode(engine.requests[-1].prompt_ids)
    places = [prompt.index(text) for text in ("be brief", "hello world", "Let me look.", "sunny", "no city")]
    assert places == sorted(places) and '{"city": "Wien"}' in prompt[places[2] : places[3]]
    assert prompt.index("Error: no city") < prompt.index("And now?")


def test_a_whole_answer_can_be_sent_back(tiny_url):
    answer = message(tiny_url, max_tokens=3)
    assert message(tiny_url, max_tokens=3, messages=[*HELLO, answer, *HELLO])


def test_an_answer_continues_the_last_message_of_the_assistant():
    turns = [*HELLO, {"role": "assistant", "content": "I would say"}]
    with scripted_server(lambda request: " yes") as (url, engine):
        assert message(url, messages=turns)["content"][0]["text"] == " yes"
        prompt = engine.text_model.tokenizer.decode(engine.requests[-1].prompt_ids)
    assert prompt.endswith("I would say")


def test_a_stop_sequence_is_named(tiny_url):
    text = message(tiny_url, temperature=0, max_tokens=20)["content"][0]["text"]
    answer = message(tiny_url, temperature=0, max_tokens=20, stop_sequences=["never", text[4:6]])
    assert answer["stop_reason"] == "stop_sequence" and answer["stop_sequence"] == text[4:6]
    assert answer["content"][0]["text"] == text[: text.index(text[4:6])]


def test_a_json_schema_constrains_the_answer(tiny_url):
    schema = WEATHER["input_schema"]
    answer = message(tiny_url, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(answer["content"][0]["text"])["city"] in ("Wien", "北京")


NEUTRAL = [
    {"messages": [{"role": "user", "content": []}]}, {"messages": [*HELLO, {"role": "assistant", "content": []}]},
    {"system": None}, {"system": ""}, {"system": []},
    {"tools": []}, {"tool_choice": {"type": "auto"}}, {"tool_choice": {"type": "none"}},
    {"metadata": {"user_id": "me"}}, {"service_tier": "auto"}, {"stop_sequences": []}, {"thinking": None},
    {"thinking": {"type": "disabled"}}, {"container": None}, {"mcp_servers": None}, {"top_k": 0}, {"surprise": None},
    {"output_config": {}}, {"output_config": {"effort": "low"}}, {"cache_control": {"type": "ephemeral"}},
    {"speed": "standard"}, {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
    {"tools": [WEATHER | {"type": "custom", "cache_control": None, "strict": False}]}, {"stream": None},
]  # fmt: skip


@pytest.mark.parametrize("fields", NEUTRAL)
def test_neutral_values_and_hints_are_accepted(tiny_url, fields):
    assert message(tiny_url, max_tokens=1, **fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": 2}, "temperature"),
        ({"surprise": 1}, "surprise"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
         "messages.0.content.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format"),
    ],
)  # fmt: skip
def test_errors_have_anthropics_shape_and_name_the_field(tiny_url, fields, name):
    for stream in (False, True):
        answer = send(tiny_url, stream=stream, **fields)
        body = answer.json()
        assert answer.status_code == 400 and body["type"] == "error"
        assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == "invalid_request_error"
        assert name in body["error"]["message"]


def test_every_rejection_has_the_shape():
    rules = AccessRules(key="secret", body_bytes=1000)
    with scripted_server(lambda request: "x", rules=rules) as (url, _):
        key = {"x-api-key": "secret"}
        for status, kind, answer in [
            (401, "authentication_error", httpx.post(f"{url}/v1/messages", json=BASE)),
            (401, "authentication_error", httpx.post(f"{url}/v1/messages", json=BASE, headers={"x-api-key": "no"})),
            (404, "not_found_error", httpx.post(f"{url}/v1/messages", json=BASE | {"model": "x"}, headers=key)),
            (404, "not_found_error", httpx.post(f"{url}/v1/messages/batches", json={}, headers=key)),
            (413, "request_too_large", httpx.post(f"{url}/v1/messages", content=b"x" * 2000, headers=key)),
            (400, "invalid_request_error", httpx.post(f"{url}/v1/messages", content=b"{", headers=key)),
            (405, "invalid_request_error", httpx.get(f"{url}/v1/messages", headers=key)),
        ]:
            assert answer.status_code == status
            assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == kind
            assert answer.headers["request-id"] == answer.headers["x-request-id"]
        assert httpx.post(f"{url}/v1/messages", json=BASE, headers=key).status_code == 200
        bearer = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/v1/messages", json=BASE, headers=bearer).status_code == 200


def test_a_failure_in_the_middle_is_an_event():
    def broken(request):
        raise RuntimeError("secret detail")

    with scripted_server(broken) as (url, _):
        whole = send(url)
        stream = events(url)
    assert whole.status_code == 500 and whole.json()["error"]["type"] == "api_error"
    assert stream[-1]["type"] == "error" and "the step failed" in stream[-1]["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_an_answer_ends_when_its_client_leaves(path):
    with scripted_server(lambda request: "a" * 300, pause=0.01) as (url, engine):
        body = BASE if path == "/v1/messages" else {"input": "hi"}
        with httpx.stream("POST", url + path, json=body | {"stream": True}) as stream:
            lines = stream.iter_lines()
            while "delta" not in next(lines):
                pass
        deadline = time.monotonic() + 10
        while engine.running and time.monotonic() < deadline:
            time.sleep(0.01)
    assert (engine.running, engine.cancelled) == (0, 1)


def test_a_call_that_was_cut_has_what_is_complete(tiny_url):
    fields = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 3}
    assert message(tiny_url, **fields)["stop_reason"] == "max_tokens"


def test_counting_needs_no_limit_and_is_what_a_message_has(tiny_url):
    turns = {"messages": HELLO, "system": "be brief", "tools": [WEATHER]}
    counted = httpx.post(f"{tiny_url}/v1/messages/count_tokens", json=turns).json()
    usage = message(tiny_url, max_tokens=1, **turns)["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    error = httpx.post(f"{tiny_url}/v1/messages/count_tokens", json=turns | {"max_tokens": 3})
    assert error.status_code == 400 and "max_tokens" in error.json()["error"]["message"]


def test_a_model_without_a_template_says_so():
    with tiny_server(chat=False) as url:
        answer = send(url)
    assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]
    assert tiny().positions
