"""A chat template is untrusted code: whatever it computes ends within its limits, as an error of one sentence."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from soli.chat.templates import ChatTemplate
from soli.errors import SoliError
from tests.engine.tiny import tiny_tokenizer
from tests.serve.process import chat_folder, server_process, wait_until_ready
from tests.serve.tiny_server import tiny_server

GOOD = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
NAMES = {"bos_token": "<|bos|>"}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}

# Hostile where a message says so, so that the same template also has prompts that are rendered.
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
HOSTILE = {
    "endless loop": LOOP,
    "doubling string": DOUBLING,
    "doubling list": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "power tower": "{{ 9 ** (9 ** 9) }}",
    "power tower of a variable": "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",
    "remainder of a power tower": "{% set n = messages | length + 8 %}{{ (n ** (n ** n)) % 7 }}",
    "repeated string": "{{ 'a' * 10 ** 12 }}",
    "repeated list": "{{ ([0] * 10 ** 9) | length }}",
    "huge range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "centered text": "{{ 'a' | center(10 ** 11) }}",
    "format width": "{{ '%1000000000000d' % 1 }}",
    "format method": "{{ '{:>1000000000000}'.format(1) }}",
    "joined texts": "{{ (['a' * 1000] * 10 ** 8) | join }}",
    "products": "{% for x in [1]*10**5 %}{% for y in [1]*10**5 %}{{ x * y }}{% endfor %}{% endfor %}",
    "filler text": "{{ lipsum(n=10 ** 9) }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "shifts": "{{ 2 ** (63 ** 5) }}",
    "repeated replacement": (
        "{% set n = namespace(s='aa') %}{% for i in range(99) %}{% set n.s = n.s.replace('a', 'aaaa') %}{% endfor %}"
    ),
}
QUICK = ("endless loop", "doubling list", "power tower", "huge range", "format method", "recursion")


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*QUICK, *slow(*(name for name in HOSTILE if name not in QUICK))])
def test_every_kind_of_excess_is_one_sentence(name):
    source = "{% if messages[0].content == 'x' %}" + HOSTILE[name] + "{% endif %}" + GOOD
    template = ChatTemplate(source, tiny_tokenizer(), NAMES)
    start = time.monotonic()
    with pytest.raises(SoliError, match="the model's chat template") as raised:
        template.render([{"role": "user", "content": "x"}], max_tokens=1000)
    assert time.monotonic() - start < 20
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    template.close()


def test_a_template_recovers_from_messages_that_exceed_its_limits():
    source = "{% if messages[0].content == 'x' %}" + LOOP + "{% endif %}" + GOOD
    template = ChatTemplate(source, tiny_tokenizer(), NAMES)
    for _ in range(2):
        with pytest.raises(SoliError, match="more than 2 seconds"):
            template.render([{"role": "user", "content": "x"}])
        ids, _ = template.render([{"role": "user", "content": "hello"}])
        assert tiny_tokenizer().decode(ids) == "hello"
    template.close()


def test_a_process_that_was_killed_is_replaced():
    template = ChatTemplate(GOOD, tiny_tokenizer(), NAMES)
    [process] = template._workers._processes
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert template.render([{"role": "user", "content": "hello"}]).token_ids
    template.close()


def test_closing_ends_a_prompt_that_is_rendered_and_its_process():
    template = ChatTemplate(LOOP, tiny_tokenizer(), NAMES)
    errors = []

    def render() -> None:
        try:
            template.render([{"role": "user", "content": "x"}])
        except SoliError as error:
            errors.append(str(error))

    rendering = threading.Thread(target=render)
    rendering.start()
    time.sleep(0.3)
    start = time.monotonic()
    template.close()
    rendering.join()
    assert time.monotonic() - start < 1 and "shutting down" in errors[0]
    with pytest.raises(SoliError, match="shutting down"):
        template.render([{"role": "user", "content": "x"}])


def test_a_template_that_is_dropped_leaves_no_process():
    template = ChatTemplate(GOOD, tiny_tokenizer(), NAMES)
    [process] = template._workers._processes
    del template
    assert process.wait(5) is not None


def test_the_process_has_no_torch_and_no_secrets():
    code = "import soli.chat.sandbox, sys; print(sorted({'torch', 'numpy', 'tokenizers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    os.environ["SOLI_API_KEY"] = "secret"
    try:
        template = ChatTemplate(GOOD, tiny_tokenizer(), NAMES)
    finally:
        del os.environ["SOLI_API_KEY"]
    [process] = template._workers._processes
    with open(f"/proc/{process.pid}/environ") as environment:
        assert "secret" not in environment.read()
    template.close()


@pytest.mark.parametrize("name", ["power tower", *slow("endless loop", "doubling string")])
def test_the_server_answers_400_and_others_meanwhile(name):
    template = ChatTemplate(HOSTILE[name], tiny_tokenizer(), NAMES)
    with tiny_server(source=template) as url:
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60))
        )
        asking.start()
        others = 0
        while asking.is_alive() or not others:
            start = time.monotonic()
            assert httpx.get(f"{url}/health").status_code == 200
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200 and time.monotonic() - start < 2
            others += 1
    error = answers[0].json()["error"]
    assert answers[0].status_code == 400 and error["param"] == "messages" and "chat template" in error["message"]
    template.close()


@pytest.mark.parametrize("name", ["power tower of a variable", *slow("endless loop")])
def test_sigterm_ends_the_server_while_a_template_computes(tmp_path, name):
    folder = chat_folder(tmp_path / "model", HOSTILE[name])
    with server_process(0, "--drain-seconds", "1", model=folder) as (server, url, lines):
        wait_until_ready(url)
        statuses = []

        def ask() -> None:
            statuses.append(httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.7)
        children = _children(server.pid)
        server.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert server.wait(timeout=10) == 0 and time.monotonic() - start < 6
        asking.join()
    assert children and not any(os.path.exists(f"/proc/{child}") for child in children)
    assert statuses == [503] and not any(re.search("Traceback|Error", line) for line in lines)


def _children(parent: int) -> list[int]:
    with open(f"/proc/{parent}/task/{parent}/children") as children:
        return [int(child) for child in children.read().split()]
