"""litellm: chats, completions and responses as an OpenAI server, messages as one of Anthropic's."""

import json

import pytest

pytestmark = pytest.mark.slow
litellm = pytest.importorskip("litellm", reason="litellm is not installed: pip install 'soli[clients]'")

from tests.serve.clients.conftest import ANSWER  # noqa: E402

HELLO = [{"role": "user", "content": "hello world"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def options(url, provider):
    """A model and its address; Anthropic's is without /v1."""
    base = f"{url}/v1" if provider == "openai" else url
    return {"model": f"{provider}/tiny", "api_base": base, "api_key": "none", "num_retries": 0}


@pytest.fixture(params=["openai", "anthropic"])
def provider(request):
    return request.param


def test_chats_whole_and_streamed(tiny_url, provider):
    common = options(tiny_url, provider) | {"messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = litellm.completion(**common)
    streamed = litellm.completion(**common, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert whole.choices[0].message.content == text != ""
    assert whole.usage.completion_tokens <= 20


def test_a_tool_loop(weather_url, provider):
    common = options(weather_url, provider) | {"tools": [WEATHER], "max_tokens": 200}
    first = litellm.completion(**common, messages=HELLO).choices[0].message
    [call] = first.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Wien"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    for turn in (first, first.model_dump()):  # as an object, and as stored
        answer = litellm.completion(**common, messages=[*HELLO, turn, result])
        assert answer.choices[0].message.content == ANSWER


def test_completions_and_responses(tiny_url):
    common = options(tiny_url, "openai")
    assert litellm.text_completion(**common | {"model": "text-completion-openai/tiny"}, prompt="the cat", max_tokens=4)
    answer = litellm.responses(**common, input="hello world", max_output_tokens=20)
    assert answer.output


def test_errors(tiny_url, provider):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**options(tiny_url, provider), messages=HELLO, temperature=3, max_tokens=3)
