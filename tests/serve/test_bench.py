"""`soli bench serve`: the load is as specified, the metrics are right, failures are counted and reported."""

import asyncio
import json
import math
import random
import statistics
from itertools import pairwise

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from soli.cli import main
from soli.serve.load_generator import RequestTiming, TargetServer, Workload, arrivals, measure, summarize
from tests.serve.live import live
from tests.serve.tiny_server import tiny_server

PAUSE = 0.02


def stub_server() -> FastAPI:
    """Answers with three pieces of text, PAUSE apart, of two tokens each; rejects every fifth request."""
    app = FastAPI()
    bodies: list[dict] = []
    app.state.bodies = bodies

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": "stand-in"}]}

    @app.post("/v1/completions")
    async def completions(body: dict):
        if "ignore_eos" in body:  # a server that takes only OpenAI's fields
            return JSONResponse({"error": {"message": "unknown"}}, 400)
        bodies.append(body)
        if len(bodies) % 5 == 0:
            return JSONResponse({"error": {"message": "too many\nwait"}}, 429)
        return StreamingResponse(stream(len(bodies)), media_type="text/event-stream")

    async def stream(number):
        for _ in range(3):
            await asyncio.sleep(PAUSE)
            yield f"data: {json.dumps({'choices': [{'text': 'a b'}]})}\n\n"
        if number == 7:
            return
        yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 4, 'completion_tokens': 6}})}\n\n"
        yield "data: [DONE]\n\n"

    return app


def test_arrivals_are_poisson_and_the_same_for_a_seed():
    times = arrivals(4.0, 4000, random.Random(0))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0 and times == arrivals(4.0, 4000, random.Random(0)) != arrivals(4.0, 4000, random.Random(1))
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # of an exponential, as large as its mean
    assert arrivals(math.inf, 3, random.Random(0)) == [0.0, 0.0, 0.0]


def test_metrics_are_those_of_the_successful_requests():
    good = [RequestTiming([0.1, 0.2, 0.4], 0.5, 10, 3), RequestTiming([0.3], 0.3, 20, 1)]
    row = summarize([*good, RequestTiming(error="status 429: full")], seconds=2.0)
    assert (row["requests"], row["failed"], row["errors"]) == (3, 1, ["status 429: full"])
    assert (row["tokens"], row["tokens_per_second"], row["requests_per_second"]) == (4, 2.0, 1.0)
    assert row["first"]["p50"] == pytest.approx(200) and row["between"]["p50"] == pytest.approx(150)
    assert summarize([RequestTiming(error="no")], 1.0)["first"] is None


def test_times_count_from_when_a_request_was_due():
    async def run(url):
        load = Workload(requests=4, prompt_words=3, new_tokens=6)
        return await measure(TargetServer(url, "stand-in"), math.inf, load)

    app = stub_server()
    with live(app) as url:
        row = asyncio.run(run(url))
    assert row["failed"] == 0 and row["tokens"] == 24 and row["prompt_tokens"] == 16
    assert row["first"]["p50"] >= 1000 * PAUSE and row["whole"]["p50"] >= 3000 * PAUSE
    assert {body["max_tokens"] for body in app.state.bodies} == {6} and row["rate"] is None
    assert len({body["prompt"] for body in app.state.bodies}) == 4
    assert all(len(body["prompt"].split()) == 3 for body in app.state.bodies)


def test_the_command_writes_json_and_a_plot(tmp_path, capsys):
    options = ["--rates", "200,inf", "--requests", "4", "--seeds", "0,1", "--out", str(tmp_path / "load"), "--json"]
    with live(stub_server()) as url:
        assert main(["bench", "serve", url, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "load.json").read_text())
    assert result["model"] == "stand-in" and [row["rate"] for row in result["rows"]] == [200.0, None]
    assert [row["requests"] for row in result["rows"]] == [8, 8]
    errors = {error for row in result["rows"] for error in row["errors"]}
    assert errors == {"status 429: too many wait", "the stream broke off"}
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "chunk", ['{"choices": 3}', '{"choices": [3]}', '{"usage": {}}', '{"usage": 5}', '{"a"', '{"usage": ' + "[" * 5000]
)
def test_a_server_that_sends_something_else_has_failed_requests(chunk):
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(body: dict):
        return StreamingResponse(iter([f"data: {chunk}\n\n"]), media_type="text/event-stream")

    with live(app) as url:
        row = asyncio.run(measure(TargetServer(url, "stand-in"), math.inf, Workload(requests=2)))
    assert row["failed"] == 2 and row["tokens"] == 0 and row["errors"]


def test_the_table_has_a_line_per_rate(capsys):
    with live(stub_server()) as url:
        assert main(["bench", "serve", url, "--rates", "100", "--requests", "2"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["requests/s", "done", "failed", "tokens/s"] and row.split()[:3] == ["100", "2", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0"], "above 0"),
        (["--rates", "fast"], "numbers separated by commas"),
        (["--seeds", "x"], "numbers separated by commas"),
        (["http://127.0.0.1:9"], "no OpenAI-compatible server"),
    ],
)
def test_bad_arguments_are_rejected(arguments, message, capsys):
    assert main(["bench", "serve", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_answers_have_full_length_if_the_server_takes_ignore_eos(capsys):
    with tiny_server() as url:
        assert main(["bench", "serve", url, "--rates", "inf", "--requests", "3", "--new-tokens", "40", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["tokens"] == 120 and row["failed"] == 0 and row["between"]["p50"] > 0
