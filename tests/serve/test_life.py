"""A server's life: it answers while its model loads, a disconnect frees the slot, SIGTERM drains, a killed server
restarts."""

import asyncio
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest

from soli.cli import main
from soli.engine.async_engine import AsyncEngine, AsyncEvents
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits, Event, Request
from soli.errors import SoliError
from soli.serve.app import create_app
from soli.serve.server import listen, on_desktop
from soli.serve.service import LoadedModel, Service, ServiceLimits
from tests.serve.live import live
from tests.serve.process import server_process, wait_until_ready
from tests.serve.tiny_server import scripted_server, serving, tiny, tiny_server

BODIES: dict = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/soli/translate": {"text": "a"},
}
LONG = {"prompt": "the cat", "max_tokens": 900, "temperature": 0, "logit_bias": {"1": -100}}


class SlowEngine(Engine):
    """A step takes 30 ms."""

    def step(self) -> list[Event]:
        time.sleep(0.03)
        return super().step()


@contextmanager
def slow_server(running: int = 2) -> Iterator[tuple[str, AsyncEngine]]:
    engine = AsyncEngine(SlowEngine(tiny(), EngineLimits(cache_bytes=2**22, max_running=running)))
    try:
        with serving(engine) as url:
            yield url, engine
    finally:
        engine.close()


def steps_until_idle(engine: AsyncEngine) -> int:
    """How many more steps the engine makes until no request runs or waits."""
    before = engine.stats().steps
    while (stats := engine.stats()).running or stats.waiting:
        assert stats.steps - before < 50
        time.sleep(0.001)
    return engine.stats().steps - before


def test_a_client_that_leaves_a_stream_frees_its_slot_within_a_step():
    with slow_server() as (url, engine):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
            assert engine.stats().running == 1
        assert steps_until_idle(engine) <= 2  # the one in progress, and the one that notices
        assert engine.stats().blocks_used == 0


def test_clients_that_give_up_on_whole_answers_free_all_their_slots():
    with slow_server() as (url, engine):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=LONG | {"n": 5}, timeout=0.3)
        assert steps_until_idle(engine) <= 2 and engine.stats().blocks_used == 0
        assert 'soli_requests_total{reason="cancelled"} 5.0' in httpx.get(f"{url}/metrics").text


def test_an_answer_that_takes_too_long_ends_and_frees_its_slot():
    engine = AsyncEngine(SlowEngine(tiny(), EngineLimits(cache_bytes=2**22)))
    with serving(engine, limits=ServiceLimits(seconds=0.2)) as url:
        answer = httpx.post(f"{url}/v1/completions", json=LONG)
        assert answer.status_code == 504 and "0.2 seconds" in answer.json()["error"]["message"]
        assert steps_until_idle(engine) <= 2
    engine.close()


def test_the_server_answers_while_the_model_loads():
    may_finish = threading.Event()

    def load() -> LoadedModel:
        may_finish.wait()
        raise SoliError("there is no such folder")

    service = Service("tiny", load)
    service.start()
    with live(create_app(service)) as url:
        for path in ("/health", "/ready"):
            answer = httpx.get(url + path)
            assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        for path in BODIES:
            answer = httpx.post(url + path, json=BODIES[path])
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert "being loaded" in answer.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert "soli_ready 0" in httpx.get(f"{url}/metrics").text
        may_finish.set()
        while "no such folder" not in httpx.get(f"{url}/ready").text:
            time.sleep(0.01)


def test_a_server_with_a_broken_engine_is_unhealthy():
    class Broken(Engine):
        def step(self) -> list[Event]:
            raise RuntimeError("private words")

    engine = AsyncEngine(Broken(tiny(), EngineLimits(cache_bytes=2**22)))
    with serving(engine) as url:
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 500
        for path in ("/health", "/ready"):
            answer = httpx.get(url + path)
            assert answer.status_code == 503 and "engine stopped" in answer.json()["status"]
            assert "private" not in answer.text


def test_metrics_count_what_happened():
    with tiny_server() as url, httpx.Client(base_url=url) as client:
        client.post("/v1/completions", json={"prompt": "the cat sat on the mat", "max_tokens": 5, "temperature": 0})
        client.post("/v1/completions", json={"prompt": "the cat sat on the mat", "max_tokens": 5, "temperature": 0})
        text = client.get("/metrics").text
    metrics = dict(re.findall(r"^(soli_\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE))
    assert float(metrics["soli_ready"]) == 1 and float(metrics["soli_running"]) == float(metrics["soli_waiting"]) == 0
    assert sum(float(value) for name, value in metrics.items() if name.startswith("soli_requests_total")) == 2
    assert float(metrics["soli_time_to_first_token_seconds_count"]) == 2
    assert float(metrics["soli_inter_token_seconds_count"]) == float(metrics["soli_completion_tokens_total"]) - 2
    assert float(metrics["soli_kv_blocks_total"]) == float(metrics["soli_pages_total"]) > 0  # the second: its old name
    assert float(metrics["soli_kv_blocks_used"]) == float(metrics["soli_pages_used"])
    assert float(metrics["soli_steps_total"]) > 0 and "soli_prefix_hit_tokens_total" in metrics
    load = {name: float(value) for name, value in metrics.items() if name.startswith("soli_expert_load_total")}
    assert len(load) == 32 and sum(load.values()) > 0 and "soli_drafted_total" in metrics


def test_time_to_first_token_counts_from_the_arrival():
    class Late(AsyncEngine):
        """Accepts a request only after a while, as in the middle of a long step."""

        async def submit(self, request: Request) -> AsyncEvents:
            await asyncio.sleep(0.3)
            return await super().submit(request)

    with serving(Late(Engine(tiny(), EngineLimits(cache_bytes=2**22)))) as url:
        # An answer whose first token ended it would have no first token.
        body = {"prompt": "a", "max_tokens": 2, "ignore_eos": True}
        assert httpx.post(f"{url}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 2
        text = httpx.get(f"{url}/metrics").text
    match = re.search(r"^soli_time_to_first_token_seconds_sum (\S+)$", text, re.MULTILINE)
    assert match is not None and float(match[1]) > 0.3


def test_draining_rejects_new_requests_and_finishes_running_ones():
    service = Service("tiny", lambda: LoadedModel(tiny(), engine, None))
    engine = AsyncEngine(SlowEngine(tiny(), EngineLimits(cache_bytes=2**22)))
    service.start()
    with live(create_app(service)) as url, httpx.Client(base_url=url) as client:
        while not service.ready:
            time.sleep(0.005)
        result: dict = {}

        def send() -> None:
            result["answer"] = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 20})

        sending = threading.Thread(target=send)
        sending.start()
        while not engine.stats().running:
            time.sleep(0.005)
        draining = threading.Thread(target=lambda: asyncio.run(service.drain(30)))
        draining.start()
        while service.ready:
            time.sleep(0.005)
        rejected = client.post("/v1/completions", json={"prompt": "a"})
        assert rejected.status_code == 503 and "shutting down" in rejected.json()["error"]["message"]
        for path, status in (("/ready", 503), ("/health", 200)):  # closed to new requests, but alive
            answer = client.get(path)
            assert (answer.status_code, answer.json()) == (status, {"status": "stopping"})
        draining.join()
        sending.join()
    assert result["answer"].json()["usage"]["completion_tokens"] == 20


def test_tcp_nodelay_is_possible():
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "SOLI_API_KEY"),
        (["--host", "::"], "SOLI_API_KEY"),
        (["--api-key", "a b"], "printable ASCII"),
        (["--allow-origin", "https://a.example/"], "without a path"),
        (["--allow-origin", "a.example"], "as https://"),
        (["/no/such/folder"], "no"),
    ],
)
def test_unsafe_options_are_rejected(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("SOLI_API_KEY", raising=False)
    assert main(["serve", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_reported(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another --port" in capsys.readouterr().err


def test_the_bundled_model_translates_completes_and_ends_on_sigterm():
    with server_process() as (server, url, lines), httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").status_code in (200, 503)  # at once, while it loads
        wait_until_ready(url)
        translated = client.post(
            "/soli/translate", json={"text": "Good morning.", "soli": {"routing": "summary"}}
        ).json()
        assert re.search(r"[一-鿿]", translated["choices"][0]["text"]) and translated["soli"]["experts"]
        chat = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert chat.status_code == 400 and "/soli/translate" in chat.json()["error"]["message"]
        assert client.get("/soli/model").json()["modes"] == ["translate", "complete"]
        with client.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 200, "stream": True}) as answer:
            data = answer.iter_lines()
            next(data)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in data if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        assert server.wait(timeout=30) == 0
    entries = [json.loads(line) for line in lines if line.strip()]
    runner, *messages = [line["message"] for line in entries if line["message"] != "request"]
    assert re.match("the (fused|eager) runner computes this model", runner)
    assert messages == ["ready", "stopping"]
    paths = [line["path"] for line in entries if line["message"] == "request"]
    assert paths == ["/soli/translate", "/v1/chat/completions", "/soli/model", "/v1/completions"]


@pytest.mark.slow
def test_a_killed_server_restarts_on_its_port_with_the_same_answers():
    body = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}
    with server_process() as (server, url, _):
        wait_until_ready(url)
        first = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"max_tokens": 400, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        port = int(url.rpartition(":")[2])
    with server_process(port) as (_, again, _):
        wait_until_ready(again)
        assert again == url and httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"] == first


@pytest.mark.slow
def test_the_page_opens_in_the_browser(tmp_path):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    with server_process(0, "--open", BROWSER=f"{browser} %s") as (_, url, _):
        wait_until_ready(url)
        deadline = time.monotonic() + 10
        while not opened.exists() or not opened.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert opened.read_text() == f"{url}/\n"


@pytest.mark.parametrize(
    ("platform", "terminal", "environment", "expected"),
    [
        ("linux", True, {"DISPLAY": ":0"}, True),
        ("linux", True, {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("linux", True, {}, False),
        ("linux", False, {"DISPLAY": ":0"}, False),
        ("linux", True, {"DISPLAY": ":10", "SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}, False),
        ("darwin", True, {}, True),
    ],
)
def test_a_desktop_is_a_screen_and_a_terminal(platform, terminal, environment, expected, monkeypatch):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal))
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert on_desktop() == expected


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once():
    with server_process() as (server, url, _):
        wait_until_ready(url)
        body = {"prompt": "a", "max_tokens": 400, "n": 16, "stream": True, "logit_bias": {"1": -100}}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            assert "shut down" in [line for line in lines if line][-2]
        assert server.wait(timeout=20) == 0


def test_a_failed_answer_does_not_affect_others():
    def script(request):
        if len(request.prompt_ids) > 20:
            raise RuntimeError("private words")
        return "fine"

    with scripted_server(script) as (url, engine), httpx.Client(base_url=url) as client:
        bad = client.post("/v1/completions", json={"prompt": "x " * 30, "n": 3})
        good = client.post("/v1/completions", json={"prompt": "x"})
    assert bad.status_code == 500 and "private" not in bad.text and good.json()["choices"][0]["text"] == "fine"
    assert engine.running == 0
