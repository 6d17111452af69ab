"""What the clients are tried on: a tiny model with the real engine, and a scripted one that calls a tool and then
answers with its result."""

import pytest

from soli.chat.parsers.families import DEEPSEEK
from tests.serve.tiny_server import scripted_server, tiny, tiny_server

CALL = (
    f"{DEEPSEEK.section_begin}{DEEPSEEK.call_begin}get_weather{DEEPSEEK.separator}"
    f'{{"city": "Wien"}}{DEEPSEEK.call_end}{DEEPSEEK.section_end}'
)
ANSWER = "It is sunny in Wien."


def call_then_answer(request):
    """A call of get_weather, and the answer once the conversation has its result, "sunny"; a place where JSON must be
    one."""
    if request.constraint is not None:
        return '{"indoors": true}'
    prompt = tiny().tokenizer.decode(request.prompt_ids)
    return ANSWER if "sunny" in prompt else f"Let me look.{CALL}"


@pytest.fixture(scope="module")
def tiny_url():
    with tiny_server() as url:
        yield url


@pytest.fixture(scope="module")
def weather_url():
    with scripted_server(call_then_answer) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    """Clients insist on keys; none of them is to look for others, or to report to anyone."""
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "none")
    for name in ("OPENAI_AGENTS_DISABLE_TRACING", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
