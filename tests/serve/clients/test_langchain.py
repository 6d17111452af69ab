"""langchain-openai: messages, streams, tools and structured output over both of OpenAI's APIs."""

import pytest

pytestmark = pytest.mark.slow
langchain_openai = pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed: pip install 'soli[clients]'"
)

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from tests.serve.clients.conftest import ANSWER  # noqa: E402


class Place(BaseModel):
    """Where."""

    indoors: bool


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def model(url, api, **options):
    defaults = {"model": "tiny", "base_url": f"{url}/v1", "max_retries": 0, "use_responses_api": api == "responses"}
    return langchain_openai.ChatOpenAI(**defaults | options)


@pytest.fixture(params=["chat", "responses"])
def api(request):
    return request.param


def test_text_whole_and_streamed(tiny_url, api):
    chat = model(tiny_url, api, temperature=0, max_tokens=20)
    turns = [SystemMessage("be brief"), HumanMessage("hello world")]
    whole = chat.invoke(turns)
    assert whole.text == "".join(chunk.text for chunk in chat.stream(turns)) != ""
    assert whole.usage_metadata["output_tokens"] <= 20
    assert chat.invoke([*turns, whole, HumanMessage("and now?")]).text is not None


def test_a_tool_loop(weather_url, api):
    chat = model(weather_url, api).bind_tools([get_weather])
    turns = [HumanMessage("The weather in Wien?")]
    first = chat.invoke(turns)
    [call] = first.tool_calls
    assert call["args"] == {"city": "Wien"}
    turns += [first, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert chat.invoke(turns).text == ANSWER
    streamed = list(chat.stream(turns[:1]))
    total = streamed[0]
    for chunk in streamed[1:]:
        total += chunk
    assert total.tool_calls[0]["args"] == {"city": "Wien"}
    assert chat.invoke([turns[0], total, turns[2].model_copy(update={"tool_call_id": total.tool_calls[0]["id"]})]).text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(weather_url, api, method):
    chat = model(weather_url, api).with_structured_output(Place, method=method)
    assert chat.invoke("hello") == Place(indoors=True)


def test_completions(tiny_url):
    llm = langchain_openai.OpenAI(model="tiny", base_url=f"{tiny_url}/v1", max_retries=0, max_tokens=8, temperature=0)
    assert llm.invoke("the cat") == "".join(llm.stream("the cat"))
