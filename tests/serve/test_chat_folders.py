"""What a folder's files say about chats: templates, sampling, special tokens, the family whose calls are read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tokenizers import AddedToken
from typer.testing import CliRunner

from soli.chat.parsers.delimited import Delimiters
from soli.chat.parsers.families import DEEPSEEK, KIMI, splits_reasoning
from soli.chat.templates import ChatTemplate
from soli.cli import app
from soli.data.tokenizer import Tokenizer
from soli.engine.request import EngineLimits
from soli.engine.sampler import SamplingParams
from soli.engine.text_model import TextModel, text_model
from soli.errors import SoliError
from soli.serve.app import create_app
from soli.serve.chat_prompts import chat_batch
from soli.serve.prompts import completion_batch
from soli.serve.protocol_requests import ChatBody, CompletionBody
from soli.serve.server import ChatSettings, load
from soli.serve.service import LoadedModel, Service, ServiceLimits
from tests.engine.tiny import tiny_folder, tiny_model
from tests.serve.live import live
from tests.serve.scripted import ScriptedEngine
from tests.serve.tiny_server import TEMPLATE

USER = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
LIMITS = ServiceLimits()


@pytest.fixture
def folder(tmp_path):
    return Path(tiny_folder(tmp_path))


@contextmanager
def served(loaded: LoadedModel) -> Iterator[httpx.Client]:
    service = Service("tiny", lambda: loaded)
    service.start()
    with live(create_app(service)) as url, httpx.Client(base_url=f"{url}/v1") as client:
        yield client


def opened(folder, **settings) -> LoadedModel:
    return load(str(folder), "cpu", "auto", EngineLimits(cache_bytes=2**22), chat=ChatSettings(**settings))


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ messages | unknown_filter }}", "{% unknown %}", b"\xff", "{% for a in range(9999999) %}"],
)
def test_a_template_that_cannot_be_read_costs_chats_alone(folder, source):
    file = folder / "chat_template.jinja"
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    loaded = opened(folder)
    with served(loaded) as client:
        chat = client.post("/chat/completions", json={"messages": USER})
        text = client.post("/completions", json={"prompt": "hello", "max_tokens": 2})
    loaded.engine.close()
    assert text.status_code == 200
    assert chat.status_code == 400 and "cannot chat: " in chat.json()["error"]["message"]
    with pytest.raises(SoliError):  # the one that was asked for must be usable
        opened(folder, template=file)


def test_a_template_may_be_given(folder):
    file = folder / "other.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    (folder / "chat_template.jinja").write_text("{% broken")
    loaded = opened(folder, template=file)
    [request] = chat_batch(ChatBody(messages=USER), loaded, LIMITS).requests
    assert loaded.text_model.tokenizer.decode(request.prompt_ids) == "hello!"
    loaded.engine.close()
    loaded.template.close()


def test_what_a_template_does_not_have_is_rejected_by_name(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    loaded = opened(folder)
    with served(loaded) as client:
        for field, value in (("chat_template", "rag"), ("documents", [{"text": "x"}])):
            answer = client.post("/chat/completions", json={"messages": USER, field: value})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == field
        neutral = {"messages": USER, "chat_template": "default", "documents": [], "max_tokens": 1}
        assert client.post("/chat/completions", json=neutral).status_code == 200
    loaded.engine.close()


def test_templates_are_read_from_all_files_that_may_hold_them(folder):
    def chosen(tools=None):
        template = ChatTemplate.from_folder(folder, tokenizer)
        ids, _ = template.render(USER, tools)
        template.close()
        return tokenizer.decode(ids)

    tokenizer = Tokenizer.from_folder(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": f"{name}{{{{ tools }}}}"} for name in ("default", "tool_use")]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert chosen() == "defaultNone" and chosen([TOOL]).startswith("tool_use[{")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("file{{ tools | length }}")
    assert chosen() == "defaultNone" and chosen([TOOL]) == "file1"
    (folder / "chat_template.jinja").write_text("jinja{{ tools }}")
    assert chosen() == "jinjaNone" and chosen([TOOL]) == "file1"


def test_the_folders_sampling_is_the_default_of_both_routes(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.75}
    (folder / "generation_config.json").write_text(json.dumps(settings))

    def sampling(loaded, **fields) -> list[SamplingParams]:
        batches = (
            chat_batch(ChatBody(messages=USER, **fields), loaded, LIMITS),
            completion_batch(CompletionBody(prompt="hello", **fields), loaded, LIMITS),
        )
        return [batch.requests[0].sampling for batch in batches]

    loaded = opened(folder)
    assert sampling(loaded) == [SamplingParams(0.5, 3, 0.75)] * 2
    assert sampling(loaded, temperature=1.0, top_k=0) == [SamplingParams(1.0, 0, 0.75)] * 2
    assert sampling(loaded, temperature=None, top_p=1) == [SamplingParams(0.5, 3, 1.0)] * 2
    loaded.engine.close()
    neutral = opened(folder, generation_config=False)
    assert sampling(neutral) == [SamplingParams(1.0)] * 2
    neutral.engine.close()


def marked_model(special: bool, delimiters: Delimiters = DEEPSEEK) -> TextModel:
    """A model whose tokenizer has the delimiters of reasoning and of calls, special or not."""
    backend = Tokenizer.train(["hello world"], 330)._backend
    names = ["<think>", "</think>", *vars(delimiters).values()]
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    tokenizer = Tokenizer(backend)
    return text_model(tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024), tokenizer)


@pytest.mark.parametrize("special", [False, True])
def test_delimiters_that_are_special_tokens_are_read(special):
    model = marked_model(special)
    begin, end = f"{DEEPSEEK.section_begin}{DEEPSEEK.call_begin}", f"{DEEPSEEK.call_end}{DEEPSEEK.section_end}"
    texts = ["hm</think>Yes.", f'hm</think>{begin}get_weather{DEEPSEEK.separator}{{"a": 1}}{end}', f"{begin}x{end}"]
    script = iter(texts * 2)
    engine = ScriptedEngine(model, lambda request: next(script))
    template = ChatTemplate(TEMPLATE, model.tokenizer, {}, None)
    with served(LoadedModel(model, engine, template)) as client:

        def message(**options):
            body = {"messages": USER, "max_tokens": 99, **options}
            return client.post("/chat/completions", json=body).json()["choices"][0]["message"]

        thinking = {"chat_template_kwargs": {"thinking": True}}
        reasoned = message(**thinking)
        called = message(**thinking, tools=[TOOL])
        without_tools = message()
        message(), message()
        shown = message(skip_special_tokens=False)
    assert (reasoned["reasoning_content"], reasoned["content"]) == ("hm", "Yes.")
    assert called["reasoning_content"] == "hm" and called["content"] is None
    assert called["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"a": 1}'}
    assert without_tools["content"] == ("x" if special else texts[2])  # nothing reads them: special tokens are no text
    assert shown["content"] == texts[2]


def test_special_tokens_spelled_in_a_prompt_are_text_unless_they_are_to_be_parsed(folder):
    loaded = opened(folder)
    tokenizer = loaded.text_model.tokenizer
    text = "<|bos|><|text|>hello<|eos|>"

    def prompt(text, **options):
        return list(completion_batch(CompletionBody(prompt=text, **options), loaded, LIMITS).requests[0].prompt_ids)

    prefix = list(loaded.text_model.text_prefix)
    assert prompt(text) == [*prefix, *tokenizer.encode(text)]
    assert tokenizer.decode(prompt(text)) == text
    assert prompt(text, parse_special=True) == [*prefix, *tokenizer.encode("hello"), tokenizer.eos_id]
    assert prompt("hello", parse_special=True) == prompt("hello")
    loaded.engine.close()


@pytest.mark.parametrize(
    ("source", "tokens", "expected"),
    [
        ("{{ '<|tool_calls_section_begin|>' }}", ["<｜tool▁calls▁begin｜>"], "kimi_k2"),
        ("{{ '<｜tool▁calls▁begin｜>' + '```json' }}", [], "deepseek_v3"),
        ("{{ '<｜tool▁calls▁begin｜>' }}", [], "deepseek_v31"),
        ("{{ messages }}", ["<|tool_calls_section_begin|>"], "kimi_k2"),
        ("{{ messages }}", ["<｜tool▁calls▁begin｜>"], "deepseek_v31"),
        ("{{ messages }}", [], "deepseek_v31"),
    ],
)
def test_the_family_is_that_of_the_template_or_the_tokens(folder, source, tokens, expected):
    (folder / "chat_template.jinja").write_text(source)
    backend = Tokenizer.from_folder(folder)._backend
    backend.add_tokens([AddedToken(token, special=False) for token in tokens])
    tokenizer = Tokenizer(backend)
    template = ChatTemplate.from_folder(folder, tokenizer)
    assert template.family.name == expected
    template.close()
    template = ChatTemplate.from_folder(folder, tokenizer, tool_parser="deepseek_r1")
    assert template.family.name == "deepseek_v3"
    template.close()
    with pytest.raises(SoliError, match="no tool parser 'other': choose deepseek_r1, "):
        ChatTemplate.from_folder(folder, tokenizer, tool_parser="other")


def test_an_unknown_parser_ends_the_server_before_it_loads():
    for kind in ("tool", "reasoning"):
        run = CliRunner().invoke(app, ["serve", f"--{kind}-parser", "other", "--port", "0"])
        assert isinstance(run.exception, SoliError) and f"no {kind} parser 'other'" in str(run.exception)
    assert splits_reasoning("auto") and splits_reasoning("deepseek_r1") and not splits_reasoning("none")


def test_kimis_ids_reach_the_client_and_come_back():
    model = marked_model(False, KIMI)
    text = (
        f"{KIMI.section_begin}{KIMI.call_begin}functions.get_weather:0{KIMI.separator}{{}}{KIMI.call_end}"
        f"{KIMI.section_end}"
    )
    engine = ScriptedEngine(model, lambda request: text)
    source = TEMPLATE.replace("{{ call.function.name", "{{ call.id + call.function.name") + "{# <|tool_call_begin|> #}"
    template = ChatTemplate(source, model.tokenizer, {})
    loaded = replace(LoadedModel(model, engine, template))
    with served(loaded) as client:
        body = {"messages": USER, "tools": [TOOL], "max_tokens": 99}
        message = client.post("/chat/completions", json=body).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["id"] == "functions.get_weather:0"
        client.post("/chat/completions", json=body | {"messages": [*USER, message]})
    prompt = model.tokenizer.decode(engine.requests[1].prompt_ids)
    assert "functions.get_weather:0get_weather{}" in prompt
