"""Options that have vLLM's names: min_tokens, stop_token_ids, add_special_tokens."""

import httpx
import pytest

from tests.serve.tiny_server import tiny, tiny_server


@pytest.fixture(scope="module")
def send():
    with tiny_server() as url, httpx.Client(base_url=url) as client:

        def post(**fields):
            body = {"prompt": "the cat", "max_tokens": 12, "temperature": 0, "logprobs": 0} | fields
            return client.post("/v1/completions", json=body)

        yield post


@pytest.fixture
def complete(send):
    def post(**fields):
        answer = send(**fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


def test_min_tokens_come_before_the_end(send, complete):
    bias = {str(next(iter(tiny().stop_ids))): 100}
    assert complete(logit_bias=bias)["usage"]["completion_tokens"] == 0
    assert complete(logit_bias=bias, min_tokens=5)["usage"]["completion_tokens"] == 5
    assert send(min_tokens=13).json()["error"]["param"] == "min_tokens"


def test_a_token_of_the_request_ends_the_answer(complete):
    plain = complete(ignore_eos=True)
    tokens = [tiny().tokenizer.encode(name) for name in plain["choices"][0]["logprobs"]["tokens"]]
    single = next(number for number, ids in enumerate(tokens) if len(ids) == 1 and number)
    cut = complete(ignore_eos=True, stop_token_ids=tokens[single])
    first = next(number for number, ids in enumerate(tokens) if ids == tokens[single])
    assert cut["choices"][0]["finish_reason"] == "stop" and cut["usage"]["completion_tokens"] == first


def test_without_special_tokens_a_text_is_its_tokens_alone(complete):
    ids = tiny().tokenizer.encode("the cat")
    bare, listed = complete(add_special_tokens=False), complete(prompt=ids)
    assert bare["choices"] == listed["choices"] and bare["usage"]["prompt_tokens"] == len(ids)
    assert complete()["usage"]["prompt_tokens"] == len(ids) + len(tiny().text_prefix)
