"""Tool calls over the API: strict schemas with a model that says anything, 16 requests at once, the prefix cache."""

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI
from tokenizers import AddedToken

from soli import LLM
from soli.chat.deepseek_v32_template import TEMPLATE as V32
from soli.chat.parsers.families import DEEPSEEK, FAMILIES, KIMI, REASONING
from soli.chat.templates import ChatTemplate
from soli.data.tokenizer import Tokenizer
from soli.engine.async_engine import AsyncEngine
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits
from soli.engine.text_model import TextModel, text_model
from soli.serve.app import create_app
from soli.serve.service import LoadedModel, Service
from tests.engine.tiny import tiny_model
from tests.serve.live import live
from tests.serve.scripted import ScriptedEngine
from tests.serve.tiny_server import TEMPLATE

USER = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
        "days": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
}
STRICT = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
OTHER = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
LOOSE = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def family_model(family: str) -> TextModel:
    backend = Tokenizer.train(["hello world weather celsius"], 330)._backend
    names = [*REASONING, *FAMILIES[family].tokens]
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    tokenizer = Tokenizer(backend)
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024)
    return text_model(model, tokenizer)


@contextmanager
def served(model: TextModel, engine) -> Iterator[str]:
    template = ChatTemplate(TEMPLATE, model.tokenizer, {"bos_token": "<|bos|>"})
    service = Service(["tiny"], lambda: LoadedModel(model, engine, template))
    service.start()
    with live(create_app(service)) as url:
        yield f"{url}/v1"
    template.close()


# What a model says that prefers these tokens wherever a grammar allows them: a call, and nothing else.
PREFERRED = {
    "deepseek_v31": list(vars(DEEPSEEK).values()),
    "kimi_k2": list(vars(KIMI).values()),
    "glm": list(FAMILIES["glm"].tokens),
}


@pytest.mark.parametrize("family", PREFERRED)
def test_strict_arguments_fit_whatever_the_model_says(family):
    model = family_model(family)
    engine = AsyncEngine(Engine(model, EngineLimits(cache_bytes=2**22)))
    bias = {str(model.tokenizer.token_id(name)): 60 for name in PREFERRED[family]}
    body = {"messages": USER, "tools": [STRICT], "logit_bias": bias, "max_tokens": 500, "temperature": 0.5}
    calls = 0
    with served(model, engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        for seed in range(4):
            answer = client.post("/chat/completions", json=body | {"seed": seed, "parallel_tool_calls": False}).json()
            [choice] = answer["choices"]
            for call in choice["message"].get("tool_calls", []):
                assert call["function"]["name"] == "weather"
                if choice["finish_reason"] != "length":
                    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
                    calls += 1
    engine.close()
    assert calls


def test_what_a_grammar_makes_possible_is_accepted_and_the_rest_named():
    model = family_model("deepseek_v31")
    engine = AsyncEngine(Engine(model, EngineLimits(cache_bytes=2**22)))
    with served(model, engine) as url, httpx.Client(base_url=url, timeout=60) as client:

        def post(**options):
            body = {"messages": USER, "tools": [STRICT, OTHER], "max_tokens": 300, "seed": 1, **options}
            return client.post("/chat/completions", json=body)

        def error(**options):
            answer = post(**options)
            assert answer.status_code == 400
            return answer.json()["error"]["param"], answer.json()["error"]["message"]

        for choice in ("auto", "none", "required", {"type": "function", "function": {"name": "time"}}):
            assert post(tool_choice=choice, max_tokens=3).status_code == 200
        assert post(parallel_tool_calls=False, max_tokens=3).status_code == 200
        json_schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        [choice] = post(tools=[LOOSE], response_format=json_schema).json()["choices"]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        impossible = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
        assert error(tools=[OTHER, impossible])[0] == "tools.1.function.parameters"
        assert error(response_format={"type": "regex", "pattern": "a"})[0] == "response_format"
        assert error(ignore_eos=True)[0] == "ignore_eos"
    engine.close()


def call_text(name: str, arguments: str) -> str:
    return f"{DEEPSEEK.call_begin}{name}{DEEPSEEK.separator}{arguments}{DEEPSEEK.call_end}"


def answer_text(number: int) -> str:
    """An answer with reasoning, text and up to three calls, each answer another."""
    generator = random.Random(number)
    calls = [
        call_text(generator.choice(["weather", "time", "other"]), json.dumps({"n": number, "text": "猫" * index}))
        for index in range(number % 4)
    ]
    section = f"{DEEPSEEK.section_begin}{''.join(calls)}{DEEPSEEK.section_end}" if calls else ""
    return f"<think>thought {number}</think>Answer {number}. {section}"


def test_streamed_equals_whole_for_16_requests_at_once():
    model = family_model("deepseek_v31")
    engine = ScriptedEngine(model, lambda request: answer_text(request.sampling.seed), pause=0.0005)

    async def both(client: AsyncOpenAI, number: int):
        options = {"model": "tiny", "messages": USER, "tools": [LOOSE, OTHER], "seed": number, "max_tokens": 900}
        whole, stream = await asyncio.gather(
            client.chat.completions.create(**options), client.chat.completions.create(**options, stream=True)
        )
        deltas = [chunk.choices[0] async for chunk in stream]
        calls: list[list[str]] = []
        for call in (call for choice in deltas for call in choice.delta.tool_calls or []):
            if call.id:
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
        message = whole.choices[0].message
        parts = ("content", "reasoning_content")
        streamed = ["".join(getattr(choice.delta, part, None) or "" for choice in deltas) for part in parts]
        assert streamed == [message.content or "", message.reasoning_content]
        assert calls == [[call.function.name, call.function.arguments] for call in message.tool_calls or []]
        assert deltas[-1].finish_reason == whole.choices[0].finish_reason
        assert message.reasoning_content == f"thought {number}" and message.content.startswith(f"Answer {number}.")
        return len(calls)

    async def run(url: str) -> list[int]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(both(client, number) for number in range(16)))

    with served(model, engine) as url:
        assert sum(asyncio.run(run(url))) > 8


# Each family's way to write turns, calls and results, in miniature.
V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is none %}<|assistant|>{{ '<｜tool▁calls▁begin｜>' }}"
    "{% for t in m.tool_calls %}{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + t.function.name + '\\n```json\\n'"
    " + t.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' + eos_token }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% if m.role == 'tool' %}[{{ m.content }}]{% endif %}{% endfor %}<|assistant|>"
)
V31 = V3.replace("function<｜tool▁sep｜>' +", "' +").replace("'\\n```json\\n'", "'<｜tool▁sep｜>'")
V31 = V31.replace("'\\n```<｜tool▁call▁end｜>'", "'<｜tool▁call▁end｜>'").replace("m.content is none", "m.tool_calls")
R1 = V3.replace("m.content is none", "m.tool_calls") + "<think>\n"
KIMI_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'system' }}|>"
    "{% if m.content is string %}{{ m.content }}{% elif m.content is not none %}{% for p in m.content %}{{ p.text }}"
    "{% endfor %}{% endif %}{% if m.tool_calls %}{{ '<|tool_calls_section_begin|>' }}{% for t in m.tool_calls %}"
    "{{ '<|tool_call_begin|>' + t.id + '<|tool_call_argument_begin|>' }}{{ t.function.arguments }}"
    "{{ '<|tool_call_end|>' }}{% endfor %}{{ '<|tool_calls_section_end|>' }}{% endif %}{% endfor %}<|assistant|>"
)
GLM = (
    "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'system' }}|>{{ m.content }}"
    "{% for t in m.tool_calls %}{{ '<tool_call>' + t.function.name }}{% for k, v in t.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>"
    "{% endfor %}{% endfor %}<|assistant|>"
)


@pytest.mark.parametrize(
    ("source", "family"),
    [(V3, "deepseek_v3"), (R1, "deepseek_v3"), (V31, "deepseek_v31"), (KIMI_TEMPLATE, "kimi_k2"), (GLM, "glm"),
     (V32, "deepseek_v32")],
    ids=["V3", "R1", "V3.1", "Kimi", "GLM", "V3.2"],
)  # fmt: skip
def test_a_prefix_cache_hit_equals_a_cold_run(source, family):
    """Two rounds of a conversation with calls, answered from the cache and by an engine that has none."""
    model = family_model(family)
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    template = ChatTemplate(source, model.tokenizer, names, FAMILIES[family])
    call = {"id": "functions.weather:0", "type": "function", "function": {"name": "weather", "arguments": '{"n": 1}'}}
    rounds = [
        [{"role": "user", "content": "hello world " * 8}],
        [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "sunny " * 8}],
        [{"role": "assistant", "content": "It is."}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    ]
    warm = LLM(model.model, tokenizer=model.tokenizer, limits=EngineLimits(cache_bytes=2**22, block_size=4))
    messages: list[dict] = []
    for number, turns in enumerate(rounds):
        messages += turns
        ids, _ = template.render(messages)
        cold = LLM(model.model, tokenizer=model.tokenizer, limits=EngineLimits(2**22, prefix_sharing=False))
        [expected] = cold.generate([ids], max_new_tokens=12)
        [first], [again] = (warm.generate([ids], max_new_tokens=12) for _ in range(2))
        cold.close()
        assert expected.usage.cached == 0 and again.usage.cached > 0
        assert first.ids == again.ids == expected.ids
        if number:
            assert first.usage.cached > 8  # the turns before
    warm.close()
    template.close()
