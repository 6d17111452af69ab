"""The OpenAPI description is true: schemathesis sends what it allows, and what it forbids."""

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection

from soli.serve.middleware import AccessRules
from soli.serve.protocol_responses import ChatChunk, CompletionChunk
from tests.serve.tiny_server import scripted_server, tiny_server

ALWAYS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROUTES = [
    "GET /health", "GET /ready", "GET /metrics", "GET /v1/models", "GET /v1/models/{name}", "POST /v1/completions",
    "POST /v1/chat/completions", "GET /soli/model", "GET /soli/experts", "GET /soli/experts/{layer}/{expert}",
    "POST /soli/translate", "POST /v1/responses", "POST /v1/messages", "POST /v1/messages/count_tokens",
    "POST /tokenize", "POST /detokenize",
]  # fmt: skip
POSTS = [route for route in ROUTES if route.startswith("POST")]


@pytest.fixture(scope="module")
def routes():
    with scripted_server(lambda request: "the cat sat" * (len(request.prompt_ids) % 3)) as (url, _):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        yield {f"{route.ok().method.upper()} {route.ok().path}": route.ok() for route in schema.get_all_operations()}


def forbidden_is_rejected(context, response, case):
    """negative_data_rejection, which does not know that a body above the limit is rejected by its size, with 413."""
    if response.status_code == 413:
        assert len(response.request.body) > AccessRules().body_bytes
        return None
    return negative_data_rejection(context, response, case)


def test_every_route_is_described(routes):
    assert sorted(routes) == sorted(ROUTES)


def send(route, mode, checks, examples):
    @settings(max_examples=examples, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(case=route.as_strategy(generation_mode=mode))
    def run(case):
        case.call_and_validate(checks=checks)

    run()


@pytest.mark.parametrize("name", ROUTES)
def test_allowed_requests_are_answered_as_described(routes, name):
    send(routes[name], GenerationMode.POSITIVE, ALWAYS, 30 if name in POSTS else 5)


@pytest.mark.parametrize("name", POSTS)
def test_forbidden_requests_are_rejected(routes, name):
    send(routes[name], GenerationMode.NEGATIVE, [*ALWAYS, forbidden_is_rejected], 30)


@pytest.mark.parametrize(
    ("path", "body", "chunk"),
    [
        ("/v1/completions", {"prompt": "the cat", "logprobs": 1}, CompletionChunk),
        ("/v1/completions", {"prompt": "the cat", "soli": {"routing": "summary"}}, CompletionChunk),
        ("/v1/completions", {"prompt": "the cat", "soli": {"routing": "full"}}, CompletionChunk),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}, ChatChunk),
    ],
)
def test_chunks_of_streams_are_of_their_class(path, body, chunk):
    body = body | {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with tiny_server() as url:
        lines = [line for line in httpx.post(url + path, json=body).text.split("\n\n") if line]
    assert len(lines) >= 4 and lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        content = json.loads(line.removeprefix("data: "))
        assert json.loads(chunk.model_validate(content).model_dump_json(exclude_unset=True)) == content


@pytest.mark.slow
@pytest.mark.parametrize("name", POSTS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_both_for_long(routes, name, mode):
    forbidden = [forbidden_is_rejected] if mode == GenerationMode.NEGATIVE else []
    send(routes[name], mode, ALWAYS + forbidden, 1500)
