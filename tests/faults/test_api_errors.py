"""Errors of the API: what cannot be met is a 400 that names its parameter, a client that leaves is one line."""

import json
import logging
import socket
import time
from contextlib import contextmanager
from urllib.parse import urlparse

import httpx
import pytest
import torch

from soli.cli import main
from soli.engine.constraint import Constraints, ConstraintSpec
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits, Request
from soli.errors import SoliError
from soli.serve.responses import CompletionChoiceBuilder, ResponseBuilder, RoutingRecorder
from soli.serve.server import JsonFormatter
from tests.serve.scripted import ScriptedEvents
from tests.serve.tiny_server import scripted_server, tiny, tiny_server

COMPLETIONS, CHAT, TRANSLATE = "/v1/completions", "/v1/chat/completions", "/soli/translate"
USER = [{"role": "user", "content": "hi"}]
MANY_PROPERTIES = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
HEAVY = {
    "wide object": {"type": "json_schema", "json_schema": {"name": "a", "schema": MANY_PROPERTIES}},
    "nested repetition": {"type": "regex", "pattern": "(([a-z]{1,50}){1,50}){1,50}"},
    "exponential states": {"type": "regex", "pattern": "(a|b)*a(a|b){40}c"},
    "intersections": {
        "type": "json_schema",
        "json_schema": {
            "name": "a",
            "schema": {"allOf": [{"type": "string", "pattern": f"(.*{letter}){{9}}.*"} for letter in "abcdefghijkl"]},
        },
    },
}


@pytest.fixture(scope="module")
def url():
    with tiny_server() as address:
        yield address


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", HEAVY)
def test_heavy_grammars_are_answered_or_400(url, name, stream):
    body = {"prompt": "a", "max_tokens": 60, "response_format": HEAVY[name], "stream": stream}
    for seed in range(3):
        answer = httpx.post(url + COMPLETIONS, json=body | {"seed": seed}, timeout=60)
        text = answer.text.split("data: ")[-2] if stream and answer.status_code == 200 else answer.text
        error = json.loads(text).get("error")
        assert answer.status_code == (400 if error and not stream else answer.status_code)
        if error is not None:
            assert error["type"] == "invalid_request_error" and error["param"] == "response_format", error
    assert httpx.post(url + COMPLETIONS, json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_grammar_that_exceeds_its_limits_is_400(url):
    body = {"prompt": "a", "max_tokens": 60, "response_format": HEAVY["wide object"]}
    answer = httpx.post(url + COMPLETIONS, json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"


def test_a_panic_of_the_grammar_library_is_a_sentence(monkeypatch):
    class PanicException(BaseException):
        pass

    def panic(self, spec):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(Constraints, "_checked_matcher", panic)
    with pytest.raises(SoliError, match="index out of bounds"):
        tiny().constraints().open(ConstraintSpec.regex("a"))


KEYS = ["１２", "+5", " 5", "5 ", "-1", "٣", "5\n", "1_0", "05", "", "1e2", "0x1", "²", "1.0", "9" * 10]


@pytest.mark.parametrize("key", KEYS)
def test_biases_are_named_by_ascii_digits(url, key):
    answer = httpx.post(url + COMPLETIONS, json={"prompt": "a", "max_tokens": 1, "logit_bias": {key: 1}})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("logit_bias")
    for valid in ("0", "5", "12"):
        body = {"prompt": "a", "max_tokens": 1, "logit_bias": {valid: 1}}
        assert httpx.post(url + COMPLETIONS, json=body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": ["a"] * 17}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "n": 17}, "n"),
        (COMPLETIONS, {"prompt": ["a"] * 4, "n": 5}, "n"),
        (CHAT, {"messages": USER, "n": 17}, "n"),
        (COMPLETIONS, {"prompt": [1] * 1020}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2000}, "max_tokens"),
        (COMPLETIONS, {"prompt": [1] * 2000}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], [5000]]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt.1"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt.1"),
        (COMPLETIONS, {"prompt": [[1], ["a"]]}, "prompt.1.0"),
        (COMPLETIONS, {"prompt": [[1], []]}, "prompt.1"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {}, "prompt"),
        (CHAT, {"messages": USER, "max_completion_tokens": 2000}, "max_completion_tokens"),
        (CHAT, {"messages": USER, "max_tokens": 2000}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "a " * 1500}]}, "messages"),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (CHAT, {"messages": USER, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a", ""]}, "stop.1"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5000": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias.5"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "a", "soli": {"masked_experts": [[1, 9999]]}}, "soli.masked_experts"),
        (COMPLETIONS, {"prompt": "a", "soli": {"routing": "all"}}, "soli.routing"),
        (COMPLETIONS, {"prompt": "a", "response_format": {"type": "regex", "pattern": "("}}, "response_format"),
        (TRANSLATE, {"text": "a " * 1500}, "text"),
        (TRANSLATE, {"text": "a", "max_tokens": 2000}, "max_tokens"),
        (TRANSLATE, {"text": "a", "to": "fr"}, "to"),
    ],
)
def test_errors_name_the_parameter_that_caused_them(url, path, body, param):
    answer = httpx.post(url + path, json=body, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error


@contextmanager
def sent(url, body, length=None):
    """A connection on which a request was sent, `length` bytes of its body or all."""
    address = urlparse(url)
    content = json.dumps(body).encode()
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:length])
        yield connection


@pytest.mark.parametrize("case", ["in the body", "before the answer", "in the stream"])
def test_a_client_that_leaves_is_one_line(caplog, case):
    caplog.set_level(logging.INFO)
    body = {"prompt": "x", "max_tokens": 500, "stream": case == "in the stream"}
    with scripted_server(lambda _: "word " * 500, pause=0.02) as (url, engine):
        caplog.clear()
        with sent(url, body, 5 if case == "in the body" else None) as connection:
            if case == "in the stream":
                connection.recv(100)
            else:
                time.sleep(0.3)
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert engine.running == 0
    [record] = [record for record in caplog.records if not record.name.startswith("httpx")]
    assert record.levelno == logging.INFO and record.exc_info is None
    assert record.fields["status"] == (200 if case == "in the stream" else 499)


PLACES = {
    "the events": (ScriptedEvents, "__anext__"),
    "a piece": (CompletionChoiceBuilder, "push"),
    "the usage": (ResponseBuilder, "_usage"),
    "a trace": (RoutingRecorder, "_trace"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_that_nothing_expects_is_logged_and_ends_the_answer(caplog, monkeypatch, place, stream):
    """One event or a 500 for the client, without the error's text; in the log the places in the code, once."""

    def fail(*_):
        raise ZeroDivisionError("private words")

    options = {"stream_options": {"include_usage": True}, "stream": True} if stream else {}
    body = {"prompt": "x", "max_tokens": 4, "soli": {"routing": "full"}, **options}
    with scripted_server(lambda _: "word " * 4) as (url, engine), tiny_server() as tiny_url:
        monkeypatch.setattr(*PLACES[place], fail)
        monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)  # a server of tests is silent
        caplog.set_level(logging.ERROR, "uvicorn.error")
        answer = httpx.post((tiny_url if place == "a trace" else url) + COMPLETIONS, json=body, timeout=20)
        assert engine.running == 0
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert answer.status_code == (200 if stream else 500) and (events[-1] == "[DONE]") == stream
    error = json.loads(events[-2] if stream else answer.text)["error"]
    assert error["type"] == "server_error" and "ZeroDivisionError" in error["message"]
    assert sum("error" in event for event in events) == 1 and "private" not in answer.text
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    line = JsonFormatter().format(record)
    assert json.loads(line)["error"] == "ZeroDivisionError" and "test_api_errors.py" in line and "private" not in line


def test_a_step_without_memory_says_how_many_bytes():
    engine = Engine(tiny(), EngineLimits(cache_bytes=2**22))

    class Exhausted:
        def forward(self, *_):
            torch.empty(2**60, dtype=torch.uint8)

    engine._runner.__dict__["active"] = Exhausted()
    engine.add(Request(prompt_ids=(1, 2), max_new_tokens=2))
    [event] = engine.step()
    assert event.finish_reason == "error" and f"{2**60:,} bytes" in (event.error or "")


@pytest.mark.parametrize(
    "limits",
    [{"cache_bytes": 2**80}, {"cache_bytes": 2**60}, {"max_running": 2**44, "tokens_per_step": 2**44}],
)
def test_limits_that_do_not_fit_in_memory_name_their_bytes(limits):
    with pytest.raises(SoliError, match="bytes") as raised:
        Engine(tiny(), EngineLimits(**limits))
    assert "\n" not in str(raised.value)


def test_a_cache_larger_than_memory_is_rejected_with_its_bytes(capsys):
    assert main(["serve", "--cache-mib", str(2**30), "--port", "0"]) == 1
    message = capsys.readouterr().err
    assert f"{2**50:,} bytes" in message and "--cache-mib of at most" in message and "Traceback" not in message
