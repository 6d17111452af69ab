"""The page on the real server with the bundled model: what the stand-in shows must be what `soli serve` does."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from soli.checkpoint import open_checkpoint
from tests.serve.page.driving import choose_cell, play, token, until, until_done
from tests.serve.page.test_page import KNIFE, WOOD

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@dataclass
class RunningServer:
    url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """`soli serve` of the bundled model, with a chat template so that it has all three modes, and a key."""
    folder = tmp_path_factory.mktemp("models") / "nano-chat"
    folder.mkdir()
    for path in open_checkpoint("nano").folder.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}), encoding="utf-8")
    command = [sys.executable, "-m", "soli", "serve", str(folder), "--port", "0"]
    environment = os.environ | {"SOLI_API_KEY": "open-sesame"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()) as server:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "http://" in line)
        url = re.search(r"http://[\d.:]+", line)[0]  # type: ignore[index]
        while not _is_healthy(url):
            time.sleep(0.02)
        yield RunningServer(url)
        server.terminate()
        server.stderr.read()


def _is_healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health").status == 200
    except urllib.error.URLError:
        return False


@pytest.fixture
def page(served, open_page):
    page = open_page(served, complaints=("401", "503"), ready=False)
    page.fill("#key-input", "open-sesame")
    page.keyboard.press("Enter")
    until(page, "!document.body.classList.contains('loading')", seconds=30)
    return page


@pytest.fixture(scope="module")
def answer():
    """The output of `soli translate` for the sentence, from the same model, greedily as the server decodes."""
    command = [sys.executable, "-m", "soli", "translate", KNIFE["source"], "--beams", "1", "--experts", "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_translating_on_the_real_server(page, answer):
    page.click("#mode-translate")
    page.fill("#text-a", KNIFE["source"])
    play(page)
    assert page.locator(".reply .words").inner_text() == answer["translation"]
    assert page.locator("#strip-a .token").count() == len(answer["experts"])
    assert page.inner_text("#activated") == "6.37M"
    token(page, WOOD).click()
    heaviest = max(answer["experts"][WOOD]["layers"][3]["selected"], key=lambda expert: expert["weight"])["expert"]
    layer = page.locator("#panel-token .layer").nth(3)
    assert int(layer.locator("tr.plays .expert").first.inner_text()) == heaviest
    choose_cell(page, 3, heaviest)
    page.wait_for_selector(".repertoire li")
    page.click("#mute")
    page.click("#run-again")
    until_done(page)
    token(page, WOOD).click()
    assert str(heaviest) not in layer.locator("tbody .expert").all_inner_texts()


def test_chatting_comparing_and_completing_on_the_real_server(page):
    page.fill("#text-a", "The river")
    page.fill("#max-tokens", "12")
    play(page)
    assert page.locator(".reply .words").inner_text().strip()
    page.click("#mode-complete")
    page.fill("#text-a", "The river")
    page.check("#compare")
    page.fill("#text-b", "The river")
    page.fill("#max-tokens", "12")
    play(page)
    until(page, "document.querySelector('#common').textContent === 'weight in common: 100 %'")
    assert page.inner_text("#alert") == ""
