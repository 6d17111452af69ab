"""Anthropic's client on /v1/messages: text, streams, tools, thinking blocks sent back, counting, errors."""

import asyncio

import pytest

pytestmark = pytest.mark.slow
anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: pip install 'soli[clients]'")

from anthropic import Anthropic, AsyncAnthropic, beta_tool  # noqa: E402

from soli.serve.middleware import AccessRules  # noqa: E402
from tests.serve.clients.conftest import ANSWER  # noqa: E402
from tests.serve.tiny_server import scripted_server  # noqa: E402

HELLO = [{"role": "user", "content": "hello world"}]
WEATHER = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
BASE = {"model": "tiny", "max_tokens": 300, "messages": HELLO}


@pytest.fixture
def client(tiny_url):
    with Anthropic(base_url=tiny_url, max_retries=0) as client:
        yield client


@pytest.fixture
def weather(weather_url):
    with Anthropic(base_url=weather_url, max_retries=0) as client:
        yield client


def test_text_whole_and_streamed(client):
    options = BASE | {"max_tokens": 20, "system": "be brief", "extra_body": {"temperature": 0}}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].text == text == final.content[0].text != ""
    assert (whole.stop_reason, whole.usage.output_tokens) == (final.stop_reason, final.usage.output_tokens)


def test_raw_events(client):
    events = list(client.messages.create(**BASE | {"max_tokens": 5}, stream=True))
    assert events[0].type == "message_start" and events[-1].type == "message_stop"


def test_a_tool_loop(weather):
    first = weather.messages.create(**BASE, tools=[WEATHER])
    call = first.content[-1]
    assert first.stop_reason == "tool_use" and call.input == {"city": "Wien"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    assert weather.messages.create(**BASE | {"messages": turns}, tools=[WEATHER]).content[0].text == ANSWER
    with weather.messages.stream(**BASE, tools=[WEATHER]) as stream:
        assert any(event.type == "input_json" for event in stream)
        assert stream.get_final_message().content[-1].input == {"city": "Wien"}


def test_the_clients_own_tool_loop(weather):
    @beta_tool
    def get_weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return f"sunny in {city}"

    runner = weather.beta.messages.tool_runner(**BASE, tools=[get_weather], thread=False)  # nothing is stored here
    assert runner.until_done().content[0].text == ANSWER


def test_thinking_is_sent_back():
    with scripted_server(lambda request: "hm\n</think>\n\nYes.") as (url, engine):
        with Anthropic(base_url=url, max_retries=0) as client:
            options = BASE | {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 100}
            first = client.messages.create(**options)
            assert [block.type for block in first.content] == ["thinking", "text"]
            turns = [*HELLO, {"role": "assistant", "content": first.content}, *HELLO]
            assert client.messages.create(**options | {"messages": turns}).content[-1].text == "Yes."
        assert "Yes." in engine.text_model.tokenizer.decode(engine.requests[-1].prompt_ids)


def test_counting(client):
    counted = client.messages.count_tokens(model="tiny", messages=HELLO, tools=[WEATHER]).input_tokens
    usage = client.messages.create(**BASE | {"max_tokens": 1}, tools=[WEATHER]).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_models(client):
    assert client.models.retrieve("tiny").display_name == "tiny"
    [model] = client.models.list()
    assert (model.id, model.type, model.max_input_tokens) == ("tiny", "model", 1024) and model.created_at.year > 2000


def test_many_at_once(tiny_url):
    async def run():
        async with AsyncAnthropic(base_url=tiny_url, max_retries=0) as client:
            answers = await asyncio.gather(*(client.messages.create(**BASE | {"max_tokens": 4}) for _ in range(6)))
            assert all(answer.content for answer in answers)

    asyncio.run(run())


def test_keys_and_errors(client):
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**BASE, extra_body={"temperature": 3})
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**BASE | {"model": "claude"})
    with scripted_server(lambda request: "x", rules=AccessRules(key="secret")) as (url, _):
        with pytest.raises(anthropic.AuthenticationError):
            Anthropic(base_url=url, api_key="wrong", max_retries=0).messages.create(**BASE)
        assert Anthropic(base_url=url, api_key="secret", max_retries=0).messages.create(**BASE).content
