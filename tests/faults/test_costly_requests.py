"""Requests that would take seconds to parse, count, tokenize or render are rejected before that, and stall no other."""

import json
import statistics
import threading
import time
from itertools import pairwise

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from soli.chat.templates import ChatTemplate
from soli.data.tokenizer import Tokenizer
from soli.engine.constraint import Constraints, ConstraintSpec
from soli.serve.errors import BodyError
from soli.serve.json_body import MAX_VALUES, check_counts
from tests.engine.tiny import tiny_tokenizer
from tests.serve.process import chat_folder, server_process, wait_until_ready
from tests.serve.tiny_server import tiny, tiny_server

TEXT = "the cat sat on the mat. " * (4 * 2**20 // 24 - 4)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
USER = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PARTS = [{"role": "user", "content": [PART] * 5000}]
CALLS = [{"role": "assistant", "tool_calls": [CALL] * 4000}]
BIASES, NO_BIASES = {str(i): 1 for i in range(40_000)}, {f"x{i}": 1 for i in range(40_000)}
COSTLY = {
    "long prompt": (COMPLETIONS, {"prompt": TEXT}, "prompt"),
    "long prompts": (COMPLETIONS, {"prompt": [TEXT[: 2**20]] * 3}, "prompt"),
    "a million prompts": (COMPLETIONS, {"prompt": ["a"] * 1_000_000}, "prompt"),
    "thousands of prompts": (COMPLETIONS, {"prompt": ["a"] * 5_000}, "prompt"),
    "prompts by n": (COMPLETIONS, {"prompt": ["a"] * 10, "n": 1000}, "n"),
    "two million ids": (COMPLETIONS, {"prompt": [1] * 2_000_000}, "prompt"),
    "a million invalid ids": (COMPLETIONS, {"prompt": [-1] * 1_000_000}, "prompt.0"),
    "many lists of ids": (COMPLETIONS, {"prompt": [[1]] * 20_000}, "prompt"),
    "many empty lists": (COMPLETIONS, {"prompt": [[]] * 20_000}, "prompt.0"),
    "60,000 messages": (CHAT, {"messages": [USER] * 60_000}, "messages"),
    "5,000 messages": (CHAT, {"messages": [USER] * 5_000}, "messages"),
    "invalid messages": (CHAT, {"messages": [{}] * 20_000}, "messages.0.role"),
    "long message": (CHAT, {"messages": [{"role": "user", "content": TEXT}]}, "messages"),
    "many parts": (CHAT, {"messages": PARTS}, "messages.0.content"),
    "many calls": (CHAT, {"messages": CALLS}, "messages.0.tool_calls"),
    "unknown fields": (COMPLETIONS, {f"f{i}": 1 for i in range(40_000)}, None),
    "very many unknown fields": (COMPLETIONS, {f"f{i}": 1 for i in range(300_000)}, None),
    "many biases": (COMPLETIONS, {"prompt": "a", "logit_bias": BIASES}, "logit_bias"),
    "invalid biases": (COMPLETIONS, {"prompt": "a", "logit_bias": NO_BIASES}, "logit_bias"),
    "long translation": ("/soli/translate", {"text": "a " * 2**20}, "text"),
    "long text to tokenize": ("/tokenize", {"prompt": TEXT}, "prompt"),
    "long message to tokenize": ("/tokenize", {"messages": [{"role": "user", "content": TEXT}]}, "messages"),
    "a million tokens": ("/detokenize", {"tokens": [1] * 1_000_000}, "tokens"),
    "long input": ("/v1/responses", {"input": TEXT}, "input"),
    "60,000 items": ("/v1/responses", {"input": [USER] * 60_000}, "input"),
}  # fmt: skip


@pytest.fixture(scope="module")
def url():
    with tiny_server(source=ChatTemplate(PLAIN, tiny_tokenizer(), {})) as address:
        yield address


@pytest.mark.parametrize("name", COSTLY)
def test_costly_requests_are_rejected_by_name_and_at_once(url, name):
    path, body, param = COSTLY[name]
    content = json.dumps(body, separators=(",", ":"))
    httpx.get(f"{url}/health")
    start = time.monotonic()
    answer = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"}, timeout=30)
    assert time.monotonic() - start < 3
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert len(error["message"]) < 400


def test_what_cannot_fit_is_not_tokenized(url, monkeypatch):
    def encode(self, texts):
        raise AssertionError("tokenized")

    monkeypatch.setattr(Tokenizer, "encode", encode)
    monkeypatch.setattr(Tokenizer, "encode_batch", encode)
    for name in ("long prompt", "thousands of prompts", "prompts by n", "long message", "long translation"):
        path, body, _ = COSTLY[name]
        assert httpx.post(url + path, json=body, timeout=30).status_code == 400


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=400))
def test_a_text_has_at_least_as_many_tokens_as_its_bytes_imply(text):
    tokenizer = tiny_tokenizer()
    assert tokenizer.longest_token is not None
    assert len(tokenizer.encode(text)) * tokenizer.longest_token >= len(text.encode())


def test_a_normalizer_makes_the_bytes_unknown():
    backend = Tokenizer.train(["a"], 280)._backend
    backend.normalizer = normalizers.Strip()
    tokenizer = Tokenizer(backend)
    assert tokenizer.longest_token is None
    tokenizer.check_length("the text", 2**40, 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"a": [' + b'"x",' * (MAX_VALUES + 1) + b'"x"]}', "a"),
        (b'{"b": "y", "a": {"c": [' + b"{}," * (MAX_VALUES + 1) + b"{}]}}", "a"),
        (b"{" + b'"x":1,' * (MAX_VALUES + 1) + b'"x":1}', None),
        (b'{"a": [' + b"1," * (2**20 + 1) + b"1]}", "a"),
        (b'{"\\"a": [' + b"[]," * (MAX_VALUES + 1) + b"1]}", '\\"a'),
        (b"[" * (MAX_VALUES + 2), None),
    ],
)
def test_values_are_counted_before_they_are_parsed(body, param):
    with pytest.raises(BodyError) as raised:
        check_counts(body)
    assert raised.value.param == param


@pytest.mark.parametrize("text", ['[{,"', '",' * 300_000, "\\" * 300_001, '\\"' * 200_000, "{" * 300_000])
def test_texts_count_once_whatever_they_contain(text):
    check_counts(json.dumps({"prompt": text, "n": 1}).encode())


def test_a_string_without_end_is_counted_in_linear_time():
    start = time.monotonic()
    check_counts(b'{"a": "' + b'\\"' * 2**21)
    assert time.monotonic() - start < 5


def test_a_constraint_is_compiled_outside_the_engines_thread(monkeypatch):
    threads = []
    compile_spec = Constraints._compile

    def compile_and_note(self, spec):
        threads.append(threading.current_thread().name)
        return compile_spec(self, spec)

    monkeypatch.setattr(Constraints, "_compile", compile_and_note)
    with tiny_server() as address:
        body = {"prompt": "a", "max_tokens": 3, "response_format": {"type": "regex", "pattern": "a{3}"}}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
    assert len(threads) == 1 and threads[0] != "soli-engine"


def test_a_compiled_constraint_does_not_wait_for_one_that_is_compiled(monkeypatch):
    constraints = tiny().constraints()
    quick, slow = ConstraintSpec.regex("a"), ConstraintSpec.regex("b")
    constraints.open(quick)
    compile_spec, may_finish = Constraints._compile, threading.Event()

    def compile_late(self, spec):
        may_finish.wait(10)
        return compile_spec(self, spec)

    monkeypatch.setattr(Constraints, "_compile", compile_late)
    compiling = threading.Thread(target=constraints.open, args=[slow])
    compiling.start()
    start = time.monotonic()
    constraints.open(quick)
    assert time.monotonic() - start < 1
    may_finish.set()
    compiling.join()


STREAM = {"prompt": "Once upon a time", "max_tokens": 480, "temperature": 0, "ignore_eos": True, "stream": True}


def longest_gap(url: str, path: str | None, content: bytes) -> float:
    """The longest time between two chunks of a stream, in seconds, while a request is made again and again."""
    stop = threading.Event()

    def ask() -> None:
        while path is not None and not stop.is_set():
            httpx.post(url + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)

    asking = threading.Thread(target=ask)
    with httpx.stream("POST", f"{url}/v1/completions", json=STREAM, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        asking.start()
        times = [time.monotonic() for line in lines if line]
    stop.set()
    asking.join()
    return max(after - before for before, after in pairwise(times))


@pytest.mark.slow
def test_no_stream_waits_long_for_a_costly_request(tmp_path):
    folder = chat_folder(tmp_path / "model", PLAIN)
    gaps: dict[str, float] = {}
    with server_process(0, model=folder) as (_, url, _):
        wait_until_ready(url)
        for name in (None, "long prompt", "a million prompts", "60,000 messages", "long message"):
            path, body, _ = COSTLY[name] if name else (None, {}, None)
            content = json.dumps(body, separators=(",", ":")).encode()
            gaps[name or "alone"] = statistics.median(longest_gap(url, path, content) for _ in range(5))
    assert all(gap < max(0.1, 4 * gaps["alone"]) for gap in gaps.values()), gaps
