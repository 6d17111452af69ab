"""The application in process: answers are the engine's, rejections name the field, every route checks the key."""

import asyncio
import json

import httpx
import pytest

from soli.engine.async_engine import AsyncEngine
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits
from soli.serve.app import create_app
from soli.serve.middleware import AccessRules
from soli.serve.service import LoadedModel, Service
from tests.engine.tiny import tiny_text_model

TEXT_MODEL = tiny_text_model()


@pytest.fixture(scope="module")
def service():
    engine = AsyncEngine(Engine(TEXT_MODEL, EngineLimits(cache_bytes=2**20, block_size=4)))
    service = Service("tiny", lambda: LoadedModel(TEXT_MODEL, engine, None))
    service._loaded = service._load()
    yield service
    engine.close()


def call(service, method, path, body=None, rules=None, **headers):
    async def request():
        transport = httpx.ASGITransport(create_app(service, rules))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, content=body, headers=headers)

    return asyncio.run(request())


def post(service, path, body, **headers):
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    return call(service, "POST", path, content, **{"content-type": "application/json"} | headers)


def test_a_streamed_completion_equals_the_whole_one(service):
    body = {"prompt": "the cat", "temperature": 0, "max_tokens": 12, "logprobs": 1}
    whole = post(service, "/v1/completions", body).json()
    streamed = post(service, "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole["choices"][0]["text"] != ""
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 12
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == 12


def test_routing_is_reported_for_every_token_read_and_counted_per_expert(service):
    soli = {"routing": "full", "masked_experts": [[1, 2]]}
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 3, "soli": soli}
    answer = post(service, "/v1/completions", body).json()
    tokens = answer["choices"][0]["soli"]["tokens"]
    assert len(tokens) == answer["usage"]["total_tokens"] - 1
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    selected = [e["expert"] for token in tokens for e in token["layers"][0]["selected"]]
    assert len(selected) == 3 * len(tokens) and 2 not in selected
    report = call(service, "GET", f"/soli/experts/1/{selected[0]}").json()
    assert report["selected"] >= 1 and report["tokens"] == []
    assert report["plays"] == report["selected"] and report["read"] == report["tokens_read"]  # the old names


def test_no_route_returns_what_another_caller_wrote(service):
    """Every GET route, after texts with every kind of routing report."""
    secret = "zebra"
    for routing in ("full", "summary", "none"):
        body = {"prompt": f"the {secret} cat {secret}", "max_tokens": 6, "soli": {"routing": routing}}
        answer = post(service, "/v1/completions", body)
        assert answer.status_code == 200
    routes = call(service, "GET", "/openapi.json").json()["paths"]
    paths = [path for path, methods in routes.items() if "get" in methods and "{" not in path] + ["/", "/openapi.json"]
    model = call(service, "GET", "/soli/model").json()
    layers = [int(name.removeprefix("layers.")) for name in model["layers"]]
    paths += [f"/soli/experts/{layer}/{expert}?limit=32" for layer in layers for expert in range(model["experts"])]

    async def get_all() -> dict[str, httpx.Response]:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return {path: await client.get(path) for path in paths}

    answers = asyncio.run(get_all())
    assert len(answers) > 10 and all(answer.status_code in (200, 503) for answer in answers.values())
    pieces = (secret, "zeb", "ebr", "bra")
    assert [path for path, answer in answers.items() if any(piece in answer.text for piece in pieces)] == []
    statistics = repr(vars(service.expert_statistics))
    assert not any(piece in statistics for piece in pieces)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"prompt": "x", "surprise": 1}, 400, "surprise"),
        ("/v1/completions", {"prompt": "x", "temperature": 3}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x", "temperature": "1"}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/v1/completions", {"prompt": "x", "n": 17}, 400, "n"),
        ("/v1/completions", '{"prompt": "x", "temperature": NaN}', 400, None),
        ("/v1/completions", "[" * 100_000, 400, None),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, 400, "messages"),
        ("/soli/translate", {"text": " "}, 400, "text"),
        ("/v1/completions", {"prompt": "x", "soli": {"masked_experts": [[1, 2]], "mute": [[1, 3]]}}, 400, "soli.mute"),
        ("/v1/completions", {"prompt": "x", "soli": {"masked_experts": [[0, 2]]}}, 400, "soli.masked_experts"),
        ("/soli/translate", {"text": "x", "soli": {"mute": [[1]]}}, 400, "soli.mute.0"),
        ("/nowhere", {}, 404, None),
    ],
)
def test_rejections_have_openais_format_and_name_the_field(service, path, body, status, param):
    answer = post(service, path, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param and error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "param", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "messages.0.content.0.type", "'text'"),
        ([{"type": "text", "text": 3}], "messages.0.content.0.text", "string"),
        (3, "messages.0.content", "string"),
    ],
)
def test_the_union_member_that_was_meant_is_named(service, content, param, message):
    body = {"messages": [{"role": "user", "content": content}]}
    error = post(service, "/v1/chat/completions", body).json()["error"]
    assert error["param"] == param and message in error["message"]


def test_requests_beyond_the_context_have_openais_code(service):
    for body in ({"prompt": "the cat", "max_tokens": 5000}, {"prompt": "the cat " * 500}):
        error = post(service, "/v1/completions", body).json()["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] in ("max_tokens", "prompt")


def test_access_rules(service):
    rules = AccessRules(key="secret", body_bytes=100)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/soli/model", "/nowhere"):
        assert call(service, "GET", path, rules=rules).status_code == 401
        assert call(service, "GET", path, rules=rules, authorization="Bearer secreu").status_code == 401
    assert call(service, "GET", "/v1/models", rules=rules, authorization="Bearer secret").status_code == 200
    assert call(service, "GET", "/health", rules=rules).json() == {"status": "ready"}
    assert call(service, "GET", "/health", host="evil.example").status_code == 421
    large = call(service, "POST", "/v1/completions", b"x" * 101, rules=rules, authorization="Bearer secret")
    assert large.status_code == 413


def test_every_name_is_a_model_with_its_context_length():
    engine = AsyncEngine(Engine(TEXT_MODEL, EngineLimits(cache_bytes=2**20, block_size=4)))
    service = Service(["tiny", "gpt-4o", "org/tiny"], lambda: LoadedModel(TEXT_MODEL, engine, None))
    before = call(service, "GET", "/v1/models").json()["data"]
    assert [model["id"] for model in before] == ["tiny", "gpt-4o", "org/tiny"]
    assert not any("max_model_len" in model for model in before)
    service._loaded = service._load()
    models = call(service, "GET", "/v1/models").json()["data"]
    assert all(model["max_model_len"] == TEXT_MODEL.positions for model in models)
    listed = call(service, "GET", "/v1/models", **{"anthropic-version": "2023-06-01"}).json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "gpt-4o", "org/tiny"]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == ("tiny", "org/tiny", False)
    for name in ("tiny", "gpt-4o", "org/tiny"):
        assert call(service, "GET", f"/v1/models/{name}").json()["id"] == name
        assert post(service, "/v1/completions", {"prompt": "x", "model": name}).json()["model"] == "tiny"
    error = post(service, "/v1/completions", {"prompt": "x", "model": "other"}).json()["error"]
    assert error["param"] == "model" and "tiny or gpt-4o or org/tiny" in error["message"]
    engine.close()
