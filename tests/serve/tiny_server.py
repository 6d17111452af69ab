"""Servers for tests: a tiny random model with the real engine, or a scripted engine; both with a chat template."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from soli.chat.templates import ChatTemplate
from soli.engine.async_engine import AsyncEngine
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits
from soli.engine.text_model import TextModel, text_model
from soli.serve.app import create_app
from soli.serve.middleware import AccessRules
from soli.serve.service import LoadedModel, Service, ServiceLimits
from tests.engine.tiny import tiny_model, tiny_tokenizer
from tests.serve.live import live
from tests.serve.scripted import Script, ScriptedEngine

TEMPLATE = """
{{- bos_token }}
{%- if tools %}<|system|>{{ tools | tojson }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'developer' %}{{ raise_exception('there is no developer here') }}{% endif %}
{{- '<|' + message.role + '|>' + message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
{%- if thinking %}<think>{{ '\\n' }}{% endif %}
"""


@cache
def tiny() -> TextModel:
    """A model of 330 tokens and 1,024 positions."""
    return text_model(tiny_model(vocab_size=330, max_position_embeddings=1024), tiny_tokenizer())


def template(source: str = TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, tiny_tokenizer(), {"bos_token": "<|bos|>"})


@contextmanager
def serving(
    engine: Any,
    chat: bool = True,
    rules: AccessRules | None = None,
    limits: ServiceLimits | None = None,
    source: ChatTemplate | None = None,
) -> Iterator[str]:
    """A live server over `engine`; its address."""
    service = Service("tiny", lambda: LoadedModel(tiny(), engine, (source or template()) if chat else None), limits)
    service.start()
    while not service.ready:
        assert service.failure is None, service.failure
    with live(create_app(service, rules)) as url:
        yield url


@contextmanager
def tiny_server(limits: EngineLimits | None = None, **options: Any) -> Iterator[str]:
    """The real engine over the tiny model."""
    engine = AsyncEngine(Engine(tiny(), limits or EngineLimits(cache_bytes=2**22)))
    try:
        with serving(engine, **options) as url:
            yield url
    finally:
        engine.close()


@contextmanager
def scripted_server(
    script: Script, pause: float = 0.0, waiting: int = 1000, **options: Any
) -> Iterator[tuple[str, ScriptedEngine]]:
    """A scripted engine, and the address of its server."""
    engine = ScriptedEngine(tiny(), script, pause, waiting)
    with serving(engine, **options) as url:
        yield url, engine
