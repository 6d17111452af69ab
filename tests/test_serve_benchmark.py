"""benchmarks/serve.py: one run with few tokens and no peers, and the driving of random arrivals by itself."""

import random
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cpu_plot  # noqa: E402
import llama_server  # noqa: E402
import models  # noqa: E402
import record  # noqa: E402
import serve  # noqa: E402

from soli.serve import load_generator  # noqa: E402

SMALLER = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 64, "q_lora_rank": 64}


def test_arrivals_are_as_many_as_asked_for_on_average() -> None:
    def arrivals(seed: int) -> list[float]:
        return load_generator.arrivals(4.0, 2001, random.Random(seed))

    times = arrivals(seed=3)
    assert times[0] == 0 and times == sorted(times) and 2000 / times[-1] == pytest.approx(4.0, rel=0.1)
    assert times == arrivals(seed=3) != arrivals(seed=4)


class Toy:
    """An engine that gives each running request a token in a step of 2 ms, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: dict[int, int] = {}
        self.most = 0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-9)  # as a clock does: a wait that rounding makes too short must not be endless

    def add(self, number: int) -> None:
        self.left[number] = 3
        self.most = max(self.most, len(self.left))

    def step(self) -> list[int]:
        assert self.left, "a step with nothing to do"
        self.now += 0.002
        numbers = list(self.left)
        self.left = {number: left - 1 for number, left in self.left.items() if left > 1}
        return numbers


def test_requests_wait_for_their_time_and_all_get_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    monkeypatch.setattr(load_generator, "time", toy)
    first, second, third = load_generator.drive_engine([0.0, 0.001, 0.05], 3, toy.add, toy.step)
    assert toy.most == 2
    assert first == pytest.approx([0.002, 0.004, 0.006])
    assert second == pytest.approx([0.003, 0.005, 0.007])  # it was due in the middle of a step
    assert third == pytest.approx([0.002, 0.004, 0.006])


def test_figures_are_milliseconds() -> None:
    figures = serve.figures([[0.010, 0.012, 0.014], [0.050, 0.051, 0.151]])
    assert figures["first, median"] == pytest.approx(50) and figures["first, longest"] == pytest.approx(50)
    assert figures["between, median"] == pytest.approx(2) and figures["between, 95 of 100"] == pytest.approx(2)


def test_llamas_stream_is_counted_by_tokens() -> None:
    class Stream(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            for tokens in ([5], [6, 7, 8], []):  # a character of several tokens comes in one piece
                self.wfile.write(f'data: {{"tokens": {tokens}}}\n\n'.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((llama_server.HOST, 0), Stream)
    Thread(target=server.serve_forever, daemon=True).start()
    times = llama_server.send(server.server_address[1], [0.0, 0.02], [[1], [2]], 3)
    server.shutdown()
    assert [len(one) for one in times] == [4, 4] and all(0 < one[0] < 5 for one in times)


@pytest.mark.slow
def test_a_run_measures_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(models.SHAPES, "small", models.SHAPES["tiny"] | SMALLER)
    models.make(tmp_path, "small", "bf16")
    shared = ["--lab", str(tmp_path), "--quick", "--rounds", "1", "--others", "1", "--without", "transformers"]
    serve.main([*shared, "--rates", "50,100", "--requests", "3"])
    output = capsys.readouterr()
    assert "batch 16, small (1.2 B), bf16: Soli " in output.out
    for rate in (50, 100):
        assert f"{rate} requests a second, small (1.2 B), bf16: first token, median: Soli " in output.out
    assert "int8" not in output.out and "load: without vLLM bf16: no path was given" in output.err


def test_the_picture_of_serving(tmp_path: Path) -> None:
    rows = []
    for rate in (0.5, 1.0):
        for figure in cpu_plot.FIGURES:
            row = record.row(f"{rate:g} requests a second, small, bf16: {figure}", "ms", [2.0], {"vLLM bf16": [4.0]})
            rows.append(row | {"row": "load", "rate": rate, "figure": figure})
    assert cpu_plot._curves(rows[::2]) == [
        ("Soli bf16", "Soli", [0.5, 1.0], [2.0, 2.0]),
        ("vLLM bf16", "vLLM", [0.5, 1.0], [4.0, 4.0]),
    ]
    cpu_plot.draw_serving(rows, tmp_path / "serve.png")
    assert (tmp_path / "serve.png").stat().st_size > 5000
