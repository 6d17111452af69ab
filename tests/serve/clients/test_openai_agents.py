"""OpenAI's Agents SDK: a tool loop over /v1/responses and over /v1/chat/completions, whole and streamed."""

import asyncio

import pytest

pytestmark = pytest.mark.slow
agents = pytest.importorskip("agents", reason="openai-agents is not installed: pip install 'soli[clients]'")

from openai import AsyncOpenAI  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from tests.serve.clients.conftest import ANSWER  # noqa: E402

MODELS = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}


class Place(BaseModel):
    indoors: bool


@agents.function_tool(strict_mode=False)
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def run(work):
    agents.set_tracing_disabled(True)
    return asyncio.run(work)


def agent(kind, client, **options):
    return agents.Agent(
        name="guide", instructions="Be brief.", model=MODELS[kind](model="tiny", openai_client=client), **options
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_tool_loop(weather_url, kind):
    async def work():
        async with AsyncOpenAI(base_url=f"{weather_url}/v1", max_retries=0) as client:
            result = await agents.Runner.run(agent(kind, client, tools=[get_weather]), "The weather in Wien?")
            again = [*result.to_input_list(), {"role": "user", "content": "Are you sure?"}]
            second = await agents.Runner.run(agent(kind, client, tools=[get_weather]), again)
            return result.final_output, second.final_output

    assert run(work()) == (ANSWER, ANSWER)


@pytest.mark.parametrize("kind", MODELS)
def test_a_streamed_tool_loop(weather_url, kind):
    async def work():
        async with AsyncOpenAI(base_url=f"{weather_url}/v1", max_retries=0) as client:
            result = agents.Runner.run_streamed(agent(kind, client, tools=[get_weather]), "The weather in Wien?")
            kinds = [event.type async for event in result.stream_events()]
            return result.final_output, kinds

    answer, kinds = run(work())
    assert answer == ANSWER and "raw_response_event" in kinds and "run_item_stream_event" in kinds


@pytest.mark.parametrize("kind", MODELS)
def test_a_structured_answer(tiny_url, kind):
    async def work():
        settings = agents.ModelSettings(temperature=0, max_tokens=200)
        async with AsyncOpenAI(base_url=f"{tiny_url}/v1", max_retries=0) as client:
            writer = agent(kind, client, output_type=Place, model_settings=settings)
            return (await agents.Runner.run(writer, "hello")).final_output

    assert isinstance(run(work()), Place)
