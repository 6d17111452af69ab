"""The examples that need clients, against a tiny server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
for package in ("openai", "anthropic"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'soli[clients]'")

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)


def test_ask(tiny_url):
    result = run("ask.py", "the cat", f"{tiny_url}/v1")
    assert result.returncode == 0 and "experts activated" in result.stdout, result.stderr


def test_ask_everywhere(tiny_url):
    result = run("ask_everywhere.py", "hello world", tiny_url)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "the question has" in lines[-1] and lines[-1].endswith("hello world")
    [counts] = [line for line in lines if line.startswith("the prompt has")]
    numbers = [word.strip(",") for word in counts.split() if word.strip(",").isdigit()]
    assert len(numbers) == 3 and len(set(numbers)) == 1


def test_without_a_server_they_say_so():
    for name, address in (("ask.py", "http://127.0.0.1:1/v1"), ("ask_everywhere.py", "http://127.0.0.1:1")):
        result = run(name, "x", address)
        assert result.returncode == 1 and "no answer" in result.stderr and "Traceback" not in result.stderr
