"""OpenAI's own client against a live server: models, completions, chat, streams, tools, errors, sync and async."""

import asyncio
import json
import math

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from soli.chat.parsers.families import DEEPSEEK
from soli.engine.sampler import SamplingParams
from soli.serve.protocol_requests import CompletionBody
from soli.serve.responses import token_name
from tests.serve.tiny_server import scripted_server, tiny, tiny_server

CALLS_BEGIN, CALLS_END = DEEPSEEK.section_begin, DEEPSEEK.section_end
CALL_BEGIN, SEPARATOR, CALL_END = DEEPSEEK.call_begin, DEEPSEEK.separator, DEEPSEEK.call_end
HELLO = [{"role": "user", "content": "hello world"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Wien", "北京"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
STRICT = {"type": "function", "function": {"name": "f", "strict": True}}


@pytest.fixture(scope="module")
def url():
    with tiny_server() as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, prompt="the cat", **options):
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0} | options)


def chat(client, messages=HELLO, **options):
    defaults = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**defaults | options)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "soli"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_completions_count_their_tokens(client):
    answer = complete(client)
    [choice] = answer.choices
    assert choice.finish_reason in ("length", "stop") and choice.logprobs is None
    assert answer.usage.completion_tokens <= 8 and answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.tokens_per_second > 0  # a field of ours: the client keeps what it does not know


def test_a_streamed_completion_equals_the_whole_one(client):
    whole = complete(client, max_tokens=24)
    stream = list(complete(client, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == whole.choices[0].finish_reason
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens and not stream[-1].choices
    assert all(chunk.usage is None for chunk in stream[:-1])


def test_a_streamed_chat_equals_the_whole_one(client):
    whole = chat(client, max_tokens=24).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(client, max_tokens=24, stream=True)]
    assert chunks[0].delta.role == "assistant" and whole.message.role == "assistant"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason


def test_many_prompts_and_n_come_in_order(client):
    alone = [complete(client, prompt).choices[0].text for prompt in ("the cat", "hello")]
    both = complete(client, ["the cat", "hello"], n=2)
    assert [choice.text for choice in both.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    streamed = {index: "" for index in range(4)}
    for chunk in complete(client, ["the cat", "hello"], n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in both.choices]


def test_seeds_repeat_and_choices_differ(client):
    def texts(seed):
        return [choice.text for choice in complete(client, n=3, temperature=2, seed=seed, max_tokens=16).choices]

    assert texts(7) == texts(7) != texts(8)
    assert len(set(texts(7))) > 1


def test_tokens_as_a_prompt_equal_their_text(client):
    ids = tiny().text_prompt("the cat")
    assert complete(client, ids).choices[0].text == complete(client).choices[0].text


def test_stop_ends_the_text_before_it(client):
    text = complete(client, max_tokens=24).choices[0].text
    stop = text[5:7]
    answer = complete(client, max_tokens=24, stop=[stop, "never"]).choices[0]
    assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"


def test_logprobs_of_completions(client):
    logprobs = complete(client, logprobs=3).choices[0].logprobs
    lists = (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    assert len({len(values) for values in lists}) == 1
    assert all(
        len(top) == 3 and max(top.values()) == pytest.approx(value)
        for top, value in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=3, stream=True)]
    assert [token for part in streamed if part for token in part.tokens] == logprobs.tokens
    assert [at for part in streamed if part for at in part.text_offset] == logprobs.text_offset


def test_logprobs_of_chats(client):
    tokens = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(token.logprob == token.top_logprobs[0].logprob and len(token.top_logprobs) == 2 for token in tokens)
    texts = [bytes(token.bytes).decode(errors="replace") for token in tokens]
    names = [token.token for token in tokens]
    assert all(name == text or name.startswith("bytes:") for name, text in zip(names, texts, strict=True))
    bare = chat(client, logprobs=True).choices[0].logprobs.content
    assert [token.token for token in bare] == names and not bare[0].top_logprobs


def test_bias_and_penalties_reach_the_sampler(client):
    first = chat(client, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].token
    [token] = [at for at in range(330) if token_name(tiny(), at) == first]
    other = (
        chat(client, logprobs=True, max_tokens=1, logit_bias={str(token): -100}).choices[0].logprobs.content[0].token
    )
    assert other != first
    plain = complete(client, max_tokens=48, logprobs=0).choices[0].logprobs.tokens
    fresh = (
        complete(client, max_tokens=48, logprobs=0, presence_penalty=2, frequency_penalty=2).choices[0].logprobs.tokens
    )
    assert len(set(fresh)) > len(set(plain))


def joined_calls(deltas):
    """(name, id, arguments) of the calls that the deltas of a stream make together."""
    calls = []
    for call in (call for delta in deltas for call in delta.tool_calls or ()):
        if call.id is not None:
            assert call.index == len(calls) and call.type == "function"
            calls.append([call.function.name, call.id, call.function.arguments])
        else:
            calls[call.index][2] += call.function.arguments
    return [tuple(call) for call in calls]


def test_structured_output_fits_its_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answer = chat(client, response_format=response_format, max_tokens=200).choices[0]
    assert answer.finish_reason == "stop" and set(json.loads(answer.message.content)) == {"a"}


def test_completions_and_chats_fit_an_expression(client):
    response_format = {"type": "regex", "pattern": "(ab|ba){2}"}
    text = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=20, extra_body={"response_format": response_format}
    ).choices[0]
    assert text.text in {"abab", "abba", "baab", "baba"} and text.finish_reason == "stop"
    answer = chat(client, response_format=response_format, max_tokens=20).choices[0]
    assert answer.message.content in {"abab", "abba", "baab", "baba"} and answer.finish_reason == "stop"


def test_the_clients_own_parsing_works(client):
    class Answer(BaseModel):
        a: bool

    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Answer, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(model="tiny", messages=HELLO, response_format=Answer, max_tokens=200) as stream:
        kinds = [event.type for event in stream]
    assert "content.delta" in kinds and isinstance(stream.get_final_completion().choices[0].message.parsed, Answer)


def test_an_answer_can_be_sent_back_unchanged(client):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    first = chat(client, tools=[WEATHER], tool_choice=choice, max_tokens=400).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}
    assert chat(client, [*HELLO, first, result], tools=[WEATHER]).choices


def test_a_forced_tool_is_called(client):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    for tool_choice in (choice, "required"):
        answer = chat(client, tools=[WEATHER], tool_choice=tool_choice, max_tokens=400).choices[0]
        [call] = answer.message.tool_calls
        assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
        assert answer.message.content is None
    for tool_choice in (choice, "required"):
        stream = chat(client, tools=[WEATHER], tool_choice=tool_choice, max_tokens=400, stream=True)
        [(name, call_id, arguments)] = joined_calls([chunk.choices[0].delta for chunk in stream])
        assert name == "get_weather" and call_id and json.loads(arguments)["city"] in ("Wien", "北京")


def test_tool_calls_in_the_models_text_are_parsed():
    v31 = f'{CALL_BEGIN}get_weather{SEPARATOR}{{"city": "北京"}}{CALL_END}'
    v3 = f"{CALL_BEGIN}function{SEPARATOR}get_time\n```json\n{{}}\n```{CALL_END}"
    text = f"Let me look.{CALLS_BEGIN}{v31}\n{v3}{CALLS_END}"
    with scripted_server(lambda request: text) as (url, engine):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = chat(client, tools=[WEATHER, CLOCK], max_tokens=500).choices[0]
        deltas = [chunk.choices[0].delta for chunk in chat(client, tools=[WEATHER, CLOCK], max_tokens=500, stream=True)]
        plain = chat(client, tools=[WEATHER], tool_choice="none", max_tokens=500).choices[0]
        cut = chat(client, tools=[WEATHER], max_tokens=60).choices[0]
        beginning = f'Let me look.{CALLS_BEGIN}{CALL_BEGIN}get_weather{SEPARATOR}{{"city"'
        head = len(engine.text_model.tokenizer.encode(beginning))
        cut_later = chat(client, tools=[WEATHER], max_tokens=head).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content == "Let me look."
    calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls]
    assert calls == [("get_weather", '{"city": "北京"}'), ("get_time", "{}")]
    streamed = joined_calls(deltas)
    assert [(name, arguments) for name, _, arguments in streamed] == calls
    assert len({call_id for _, call_id, _ in streamed}) == 2
    assert len([delta for delta in deltas if delta.tool_calls]) > 4  # the arguments came piece by piece
    assert plain.message.content == text and not plain.message.tool_calls
    assert cut.finish_reason == "length" and not cut.message.tool_calls and text.startswith(cut.message.content)
    assert cut_later.finish_reason == "length" and cut_later.message.tool_calls[0].function.arguments == '{"city"'
    prompts = [engine.text_model.tokenizer.decode(request.prompt_ids) for request in engine.requests]
    assert "get_weather" in prompts[0] and "get_weather" not in prompts[2]


def test_a_conversation_with_calls_and_results_is_rendered():
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    with scripted_server(lambda request: "It is noon.") as (url, engine):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert chat(client, messages, tools=[CLOCK], max_tokens=50).choices[0].message.content == "It is noon."
    prompt = engine.text_model.tokenizer.decode(engine.requests[0].prompt_ids)
    assert "be brief" in prompt and "get_time{}" in prompt and "noon" in prompt


def test_reasoning_is_separate_from_the_answer():
    with scripted_server(lambda request: "hm, hm\n</think>\n\nYes.") as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        options = {"max_tokens": 100, "extra_body": {"chat_template_kwargs": {"thinking": True}}}
        message = chat(client, **options).choices[0].message
        deltas = [chunk.choices[0].delta for chunk in chat(client, stream=True, **options)]
    assert (message.reasoning_content, message.content) == ("hm, hm", "Yes.")
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm, hm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


def test_a_failure_in_the_middle_is_an_error_not_a_short_answer():
    def broken(request):
        raise RuntimeError("secret detail")

    with scripted_server(broken) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the step failed"):
            chat(client, max_tokens=100)
        with pytest.raises(openai.APIError, match="the step failed"):
            list(chat(client, max_tokens=100, stream=True))


def test_the_async_client_runs_many_at_once(url):
    async def run():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def streamed(prompt):
                return "".join([chunk.choices[0].text async for chunk in await complete(client, prompt, stream=True)])

            prompts = ["the cat", "hello", "你好", "今天"] * 3
            whole = await asyncio.gather(*(complete(client, prompt) for prompt in prompts))
            assert [answer.choices[0].text for answer in whole] == await asyncio.gather(*map(streamed, prompts))
            answer = await chat(client)
            assert answer.choices[0].message.content is not None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "2"),
        ({"max_tokens": 5000}, "max_tokens", "positions"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logit_bias": {"329999": 1}}, "logit_bias", "vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", ""),
        ({"n": 400}, "n", "16"),
        ({"n": 0}, "n", "1"),
        ({"stop": ""}, "stop", ""),
        ({"seed": 2**63}, "seed", ""),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "not supported"),
        ({"messages": []}, "messages", ""),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role", ""),
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages", "there is no developer here"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "among"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "response_format", "enforced"),
        ({"response_format": {"type": "regex"}}, "response_format.pattern", "missing"),
        ({"response_format": {"type": "regex", "pattern": "(?=a)"}}, "response_format", "not supported"),
        ({"response_format": {"type": "text", "pattern": "a"}}, "response_format.pattern", "alone"),
        ({"extra_body": {"ignore_eos": True}, "response_format": {"type": "json_object"}}, "ignore_eos", "format"),
        ({"extra_body": {"soli": {"mute": [[0, 1]]}}}, "soli.mute", "layer 0"),
        ({"extra_body": {"soli": {"masked_experts": [[0, 1]]}}}, "soli.masked_experts", "layer 0"),
        ({"extra_body": {"soli": {"routing": "everything"}}}, "soli.routing", ""),
    ],
)  # fmt: skip
def test_errors_name_the_parameter(client, options, param, message):
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client, **options)
    error = raised.value
    assert error.param == param and message in error.message and error.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        chat(
            client,
            stream=True,
            **{key: value for key, value in options.items() if key != "stream_options"}
            | ({} if "stream_options" not in options else {"n": 0}),
        )


def test_the_bounds_of_bodies_are_those_of_the_sampler():
    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    properties = CompletionBody.model_json_schema()["properties"]
    for name in (*fields, "seed"):
        allowed = properties[name].get("anyOf", [properties[name]])[0]
        bounds = [allowed[side] for side in ("minimum", "maximum") if side in allowed]
        assert bounds
        for bound in bounds:
            SamplingParams(**{name: bound})


def test_unknown_models_are_not_found(client):
    with pytest.raises(openai.NotFoundError) as raised:
        chat(client, model="gpt-5")
    assert raised.value.param == "model"


def test_a_model_without_a_template_rejects_chat_and_names_its_routes():
    with tiny_server(chat=False) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=r"/v1/completions.*?/soli/translate"):
            chat(client)
        assert complete(client).choices


def test_a_full_queue_sends_retry_after():
    with scripted_server(lambda request: "a" * 400, pause=0.01, waiting=1) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with chat(client, stream=True, max_tokens=400) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as raised:
                chat(client)
        assert int(raised.value.response.headers["retry-after"]) >= 1


def test_routing_is_reported_with_the_tokens(client):
    full = complete(client, extra_body={"soli": {"routing": "full"}})
    tokens = full.choices[0].soli["tokens"]
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    assert {token["part"] for token in tokens} == {"prompt", "answer"}
    selected = [layer["selected"] for token in tokens for layer in token["layers"]]
    assert all(len(experts) == 3 for experts in selected)
    assert all(math.isfinite(expert["weight"]) for experts in selected for expert in experts)
    streamed = [
        token
        for chunk in complete(client, extra_body={"soli": {"routing": "full"}}, stream=True)
        if hasattr(chunk, "soli")
        for token in chunk.soli["tokens"]
    ]
    assert streamed == tokens
    summary = complete(client, extra_body={"soli": {"routing": "summary"}}).soli["experts"][0]
    for layer in summary:
        counts = [0] * 16
        for token in tokens:
            for expert in next(row for row in token["layers"] if row["layer"] == layer["layer"])["selected"]:
                counts[expert["expert"]] += 1
        assert layer["counts"] == counts


@pytest.mark.parametrize("field", ["masked_experts", "mute"])  # the second: its old name
def test_a_masked_expert_is_not_selected(client, field):
    def selected(pairs):
        answer = complete(client, extra_body={"soli": {"routing": "full", field: pairs}})
        return {p["expert"] for t in answer.choices[0].soli["tokens"] for p in t["layers"][0]["selected"]}

    expert = min(selected([]))
    assert expert not in selected([[1, expert]])
