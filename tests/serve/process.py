"""`soli serve` in a process of its own."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


@contextmanager
def server_process(
    port: int = 0, *arguments: str, model: str | Path = "nano", **variables: str
) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """`soli serve MODEL`, with environment `variables`: the process, its address, its log's lines."""
    environment = variables | {name: value for name, value in os.environ.items() if name != "SOLI_API_KEY"}
    command = [sys.executable, "-m", "soli", "serve", str(model), "--port", str(port), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        url = re.search(r"http://[^/]+", first)
        assert url, first
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr))
        reader.start()
        yield process, url[0], lines
    finally:
        process.kill()
        process.wait()
        reader.join()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("never ready")


def chat_folder(folder: Path, template: str) -> Path:
    """The bundled model with a chat template."""
    from soli.checkpoint import open_checkpoint

    folder.mkdir(exist_ok=True)
    for file in open_checkpoint("nano").folder.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
