"""llama.cpp's server on a GGUF file, sent streaming requests that arrive at random: for serve.py.

It is started on a port of this machine with a slot for each of `work.batch` requests and ended with the contender. Each
request has a thread that notes when its tokens come.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contenders import Absent, Lab, Work, random_ids, warm_up_work

from soli.serve.load_generator import TokenTimes, arrivals

HOST = "127.0.0.1"
PATIENCE = 120.0  # seconds to load


@contextmanager
def llama_server(lab: Lab, file: Path, work: Work, vocab: int) -> Iterator[Any]:
    """Ask it ("load", warm, rate, count, seed) for `TokenTimes`."""
    tool = lab.needs("llama.cpp", lab.llama) / "llama-server"
    lab.needs("llama.cpp", tool)
    lab.needs("llama.cpp", file)
    port = free_port()
    command = [str(tool), "-m", str(file), "--host", HOST, "--port", str(port), "-np", str(work.batch)]
    command += ["-t", str(lab.threads), "-tb", str(lab.threads), "-c", str(work.batch * (work.prompt + work.new + 8))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until_ready(process, port)

            def run(question: str, warm: bool, rate: float, count: int, seed: int) -> TokenTimes:
                now = warm_up_work(work, warm)
                due = arrivals(rate, count, random.Random(seed))
                return send(port, due, random_ids(count, now.prompt, vocab), now.new)

            yield run
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise Absent(f"llama-server was not ready after {PATIENCE:.0f} s, or ended with {process.poll()}")


def send(port: int, at: list[float], prompts: list[list[int]], new: int) -> TokenTimes:
    """Send every prompt when it is due; when each one's tokens arrive."""
    times: TokenTimes = [[] for _ in at]
    start = time.perf_counter()

    def request(number: int) -> None:
        time.sleep(max(0.0, start + at[number] - time.perf_counter()))
        body = {"prompt": prompts[number], "n_predict": new, "stream": True, "ignore_eos": True, "temperature": 0}
        connection = http.client.HTTPConnection(HOST, port, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                new_tokens = len(json.loads(line[6:])["tokens"])
                times[number] += new_tokens * [time.perf_counter() - start - at[number]]

    threads = [threading.Thread(target=request, args=(number,)) for number in range(len(at))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(times):
        raise Absent("llama-server answered a request without a token")
    return times
