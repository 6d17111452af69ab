"""OpenAI's client on /v1/responses: text, streams, tools, structured output, errors."""

import json

import pytest

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'soli[clients]'")

from openai import OpenAI, pydantic_function_tool  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from tests.serve.clients.conftest import ANSWER  # noqa: E402

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class Place(BaseModel):
    city: bool


@pytest.fixture
def client(tiny_url):
    with OpenAI(base_url=f"{tiny_url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
def weather(weather_url):
    with OpenAI(base_url=f"{weather_url}/v1", max_retries=0) as client:
        yield client


def test_text_whole_and_streamed(weather):
    options = {"model": "tiny", "input": "Is it sunny?", "instructions": "be brief"}
    whole = weather.responses.create(**options)
    with weather.responses.stream(**options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert whole.output_text == "".join(deltas) == final.output_text == ANSWER
    assert whole.usage.total_tokens == final.usage.total_tokens and final.status == whole.status


def test_an_answer_that_was_cut(client):
    answer = client.responses.create(model="tiny", input="hello", max_output_tokens=3)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"


def test_a_tool_loop(weather):
    items = [{"role": "user", "content": "What is the weather in Wien?"}]
    first = weather.responses.create(model="tiny", input=items, tools=[WEATHER])
    [call] = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Wien"} and first.output_text == "Let me look."
    items += first.output
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert weather.responses.create(model="tiny", input=items, tools=[WEATHER]).output_text == ANSWER


def test_streamed_calls(weather):
    with weather.responses.stream(model="tiny", input="Wien?", tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        [call] = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert "response.function_call_arguments.delta" in kinds and "response.function_call_arguments.done" in kinds
    assert json.loads(call.arguments) == {"city": "Wien"}


def test_structured_output(client):
    options = {"temperature": 0, "max_output_tokens": 200}
    parsed = client.responses.parse(model="tiny", input="hello", text_format=Place, **options)
    assert isinstance(parsed.output_parsed, Place)


def test_chats_with_parsed_tools(client):
    tool = pydantic_function_tool(Place)
    tool["function"].pop("strict")
    options = {"tools": [tool], "tool_choice": "required", "temperature": 0, "max_tokens": 300}
    turns = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="tiny", messages=turns, **options)
    assert set(json.loads(answer.choices[0].message.tool_calls[0].function.arguments)) == {"city"}


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
    assert raised.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-5", input="x")
