"""Access: API keys, host names, CORS, and what is open to everyone; and the log."""

import hmac
import json
import logging
import subprocess
import sys

import httpx
import pytest

from soli.serve import middleware
from soli.serve.middleware import AccessRules
from soli.serve.server import JsonFormatter
from tests.serve.tiny_server import scripted_server

KEY = "s3cret-键"
BODY = {"prompt": "hello", "max_tokens": 4}
CLOSED = [
    ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/metrics"),
    ("GET", "/soli/model"), ("GET", "/soli/experts/1/1"), ("POST", "/soli/translate"), ("GET", "/openapi.json"),
    ("GET", "/nothing"), ("GET", "/health/../v1/models"), ("GET", "/static/../v1/models"),
]  # fmt: skip


@pytest.fixture(scope="module")
def closed():
    rules = AccessRules(key=KEY, origins=("https://friend.example",))
    with scripted_server(lambda request: "ok", rules=rules) as (url, _):
        yield url


def bearer(key):
    return {"Authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_every_route_but_health_requires_the_key(closed, method, path):
    with httpx.Client(base_url=closed) as client:
        for headers in (
            {},
            bearer("wrong"),
            bearer(KEY + "x"),
            bearer(KEY[:-1]),
            {"Authorization": b"Bearer"},
            {"Authorization": KEY.encode()},
        ):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, (path, headers)
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.request(method, path, headers=bearer(KEY)).status_code != 401


def test_health_and_ready_are_open(closed):
    assert httpx.get(f"{closed}/health").status_code == 200
    assert httpx.get(f"{closed}/ready").json() == {"status": "ready"}


def test_the_key_is_compared_in_constant_time(closed, monkeypatch):
    compared = []
    compare_digest = hmac.compare_digest
    monkeypatch.setattr(middleware.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare_digest(*pair))
    httpx.get(f"{closed}/v1/models", headers=bearer("guess"))
    assert [pair[0] for pair in compared] == [b"guess"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::1].evil"]
)
def test_other_host_names_are_rejected(closed, host):
    answer = httpx.get(f"{closed}/health", headers={"Host": host})
    assert answer.status_code == 421 and "error" in answer.json()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_loopback_names_are_served(closed, host):
    assert httpx.get(f"{closed}/health", headers={"Host": host}).status_code == 200


def test_pages_of_listed_origins_may_call_and_others_may_not(closed):
    preflight = {"Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization,content-type"
    friend = httpx.options(f"{closed}/v1/completions", headers=preflight | {"Origin": "https://friend.example"})
    assert friend.status_code == 200 and friend.headers["access-control-allow-origin"] == "https://friend.example"
    other = httpx.options(f"{closed}/v1/completions", headers=preflight | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    allowed = httpx.get(f"{closed}/v1/models", headers=bearer(KEY) | {"Origin": "https://friend.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    rejected = httpx.get(f"{closed}/v1/models", headers={"Origin": "https://friend.example"})
    assert rejected.status_code == 401 and rejected.headers["access-control-allow-origin"] == "https://friend.example"


def test_without_a_list_no_other_origin_may_call():
    with scripted_server(lambda request: "ok") as (url, _):
        answer = httpx.get(f"{url}/v1/models", headers={"Origin": "https://friend.example"})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_a_log_line_holds_no_text(caplog):
    with caplog.at_level("INFO", "soli.serve"), scripted_server(lambda request: "the answer's words") as (url, _):
        body, headers = {"prompt": "my private words"}, {"X-Private": "header"}
        answers = [httpx.post(f"{url}/v1/completions", json=body, headers=headers)]
        answers.append(httpx.post(f"{url}/v1/completions?private=query", content=b'{"private": '))
    formatted = [JsonFormatter().format(record) for record in caplog.records if record.name == "soli.serve"]
    lines = [line for line in formatted if "path" in json.loads(line)]  # the others are about the server
    assert [json.loads(line)["status"] for line in lines] == [200, 400]
    assert all(json.loads(line)["path"] == "/v1/completions" for line in lines)
    assert [json.loads(line)["id"] for line in lines] == [answer.headers["x-request-id"] for answer in answers]
    assert not any(word in line for line in formatted for word in ("private", "words", "header"))


def test_the_log_has_a_line_per_answer_and_none_for_the_pages_files_and_probes(caplog):
    quiet = ["/", "/static/main.js", "/static/page.css", "/health", "/ready", "/metrics"]
    with caplog.at_level("DEBUG", "soli.serve"), scripted_server(lambda request: "ok") as (url, _):
        for path in quiet:
            assert httpx.get(f"{url}{path}").status_code == 200
        assert httpx.get(f"{url}/static/nothing.js").status_code == 404
        httpx.post(f"{url}/v1/completions", json={"prompt": "hi"})
    levels = {record.fields["path"]: record.levelname for record in caplog.records if record.message == "request"}
    assert levels == dict.fromkeys(quiet, "DEBUG") | {"/static/nothing.js": "INFO", "/v1/completions": "INFO"}


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("info", "iwe"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("debug", "diwe"), ("warning", "we"), ("error", "e"))),
    ],
)
def test_the_log_level_selects_lines(level, shown):
    script = (
        "import logging, sys; from soli.serve.server import configure_log; configure_log(sys.argv[1])\n"
        "for name in ('soli.serve', 'a.library'):\n"
        "  for level in ('debug', 'info', 'warning', 'error'): getattr(logging.getLogger(name), level)(name + level)"
    )
    run = subprocess.run([sys.executable, "-c", script, level], check=True, capture_output=True, text=True)
    messages = [json.loads(line)["message"] for line in run.stderr.splitlines()]
    assert "".join(message[10] for message in messages if message.startswith("soli.serve")) == shown
    assert not any(message == "a.librarydebug" for message in messages)


def test_the_log_of_an_error_holds_no_text():
    try:
        raise KeyError("my private words")
    except KeyError:
        record = logging.LogRecord("soli", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())
    line = JsonFormatter().format(record)
    assert json.loads(line)["error"] == "KeyError" and "private" not in line
    assert any("test_middleware.py" in place for place in json.loads(line)["traceback"])
