"""`soli bench serve`: the load is what was asked for, the figures are right, and failures are counted and said."""

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
from soli.serve.load_generator import Load, Server, Timing, arrivals, figures, measure
from tests.serve.live import live
from tests.serve.tiny_server import tiny_server

PAUSE = 0.02


def stand_in() -> FastAPI:
    """Answers with three pieces of text, PAUSE apart, of two tokens each; refuses every fifth request."""
    app = FastAPI()
    seen: list[dict] = []
    app.state.seen = seen

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": "stand-in"}]}

    @app.post("/v1/completions")
    async def completions(body: dict):
        if "ignore_eos" in body:  # a server that takes OpenAI's fields alone
            return JSONResponse({"error": {"message": "unknown"}}, 400)
        seen.append(body)
        if len(seen) % 5 == 0:
            return JSONResponse({"error": {"message": "too many\nwait"}}, 429)
        return StreamingResponse(stream(len(seen)), media_type="text/event-stream")

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
    at = arrivals(4.0, 4000, random.Random(0))
    gaps = [later - one for one, later in pairwise(at)]
    assert at[0] == 0 and at == arrivals(4.0, 4000, random.Random(0)) != arrivals(4.0, 4000, random.Random(1))
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # of an exponential, as large as its mean
    assert arrivals(math.inf, 3, random.Random(0)) == [0.0, 0.0, 0.0]


def test_figures_are_those_of_the_good_requests():
    good = [Timing([0.1, 0.2, 0.4], 0.5, 10, 3), Timing([0.3], 0.3, 20, 1)]
    found = figures([*good, Timing(error="status 429: full")], seconds=2.0)
    assert (found["requests"], found["failed"], found["errors"]) == (3, 1, ["status 429: full"])
    assert (found["tokens"], found["tokens_per_second"], found["requests_per_second"]) == (4, 2.0, 1.0)
    assert found["first"]["p50"] == pytest.approx(200) and found["between"]["p50"] == pytest.approx(150)
    assert figures([Timing(error="no")], 1.0)["first"] is None


def test_times_count_from_when_a_request_was_due():
    async def run(url):
        return await measure(Server(url, "stand-in"), math.inf, Load(requests=4, prompt_words=3, new_tokens=6))

    app = stand_in()
    with live(app) as url:
        row = asyncio.run(run(url))
    assert row["failed"] == 0 and row["tokens"] == 24 and row["prompt_tokens"] == 16
    assert row["first"]["p50"] >= 1000 * PAUSE and row["whole"]["p50"] >= 3000 * PAUSE
    assert {body["max_tokens"] for body in app.state.seen} == {6} and row["rate"] is None
    assert len({body["prompt"] for body in app.state.seen}) == 4
    assert all(len(body["prompt"].split()) == 3 for body in app.state.seen)


def test_the_verb_writes_json_and_a_plot(tmp_path, capsys):
    options = ["--rates", "200,inf", "--requests", "4", "--seeds", "0,1", "--out", str(tmp_path / "load"), "--json"]
    with live(stand_in()) as url:
        assert main(["bench", "serve", url, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "load.json").read_text())
    assert found["model"] == "stand-in" and [row["rate"] for row in found["rows"]] == [200.0, None]
    assert [row["requests"] for row in found["rows"]] == [8, 8]
    errors = {error for row in found["rows"] for error in row["errors"]}
    assert errors == {"status 429: too many wait", "the stream broke off"}
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_line_per_rate(capsys):
    with live(stand_in()) as url:
        assert main(["bench", "serve", url, "--rates", "100", "--requests", "2"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["requests/s", "done", "failed", "tokens/s"] and row.split()[:3] == ["100", "2", "0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rates", "0"], "above 0"),
        (["--rates", "fast"], "numbers separated by commas"),
        (["--seeds", "x"], "numbers separated by commas"),
        (["http://127.0.0.1:9"], "no OpenAI-compatible server"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said, capsys):
    assert main(["bench", "serve", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_answers_have_their_full_length_where_the_server_can(capsys):
    with tiny_server() as url:
        assert main(["bench", "serve", url, "--rates", "inf", "--requests", "3", "--new-tokens", "40", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["tokens"] == 120 and row["failed"] == 0 and row["between"]["p50"] > 0
