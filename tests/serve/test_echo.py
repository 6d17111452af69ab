"""`echo` and `logprobs` of completions: the prompt's text, offsets and log-probabilities, exact, streamed or not."""

import json

import httpx
import pytest
import torch

from soli.serve.responses import token_name
from tests.serve.tiny_server import tiny, tiny_server

PROMPT = "the cat sat on 垫子上 ok"


@pytest.fixture(scope="module")
def client():
    with tiny_server() as url, httpx.Client(base_url=url) as client:
        yield client


def complete(client, **fields):
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "echo": True} | fields
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client, **fields):
    """The text and the logprobs of a stream's chunks, joined."""
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "echo": True} | fields
    lines = client.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    joined = {name: [value for one in logprobs for value in one[name]] for name in (logprobs or [{}])[0]}
    return "".join(choice["text"] for choice in choices), joined or None


def teacher_forced(ids):
    model = tiny().model
    with torch.inference_mode():
        logits_TV = model.head(model.backbone(torch.tensor([ids])).hidden_BTD)[0, :-1]
    return torch.log_softmax(logits_TV.double(), dim=-1)


def assert_exact(logprobs, ids):
    """Entries of the prompt `ids`: those of teacher forcing."""
    expected_TV = teacher_forced(ids)
    assert logprobs["tokens"][: len(ids)] == [token_name(tiny(), token) for token in ids]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for position, token in enumerate(ids[1:]):
        assert logprobs["token_logprobs"][position + 1] == pytest.approx(float(expected_TV[position, token]), abs=1e-5)
        top = logprobs["top_logprobs"][position + 1]
        assert max(top.values()) == pytest.approx(float(expected_TV[position].max()), abs=1e-5)
        assert token_name(tiny(), token) in top


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_log_probabilities_of_the_prompt_are_exact(client, max_tokens):
    ids = tiny().text_prompt(PROMPT)
    answer = complete(client, logprobs=2, max_tokens=max_tokens)
    [choice] = answer["choices"]
    assert_exact(choice["logprobs"], ids)
    assert len(choice["logprobs"]["tokens"]) == len(ids) + max_tokens
    assert answer["usage"]["prompt_tokens"] == len(ids) and answer["usage"]["completion_tokens"] == max_tokens
    assert choice["finish_reason"] == "length" and choice["text"].startswith(PROMPT)
    assert (choice["text"] == PROMPT) == (max_tokens == 0)


def test_the_answer_is_that_without_echo(client):
    plain = complete(client, echo=False, logprobs=1)["choices"][0]
    echoed = complete(client, logprobs=1)["choices"][0]
    assert echoed["text"] == PROMPT + plain["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert echoed["logprobs"][name][-4:] == plain["logprobs"][name]
    assert [at - len(PROMPT) for at in echoed["logprobs"]["text_offset"][-4:]] == plain["logprobs"]["text_offset"]


def test_offsets_are_where_tokens_begin(client):
    choice = complete(client, logprobs=0)["choices"][0]
    logprobs = choice["logprobs"]
    for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not name.startswith(("bytes:", "<|")) and "\ufffd" not in name:
            assert choice["text"].startswith(name, offset)


def test_offsets_where_names_of_special_tokens_are_tokens(client):
    for more in ({}, {"add_special_tokens": False}):
        choice = complete(client, prompt="a<|eos|>b<|eos|>c", parse_special=True, logprobs=0, max_tokens=0, **more)
        [choice] = choice["choices"]
        places = dict(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
        assert choice["text"] == "a<|eos|>b<|eos|>c" and (places["a"], places["b"], places["c"]) == (0, 8, 16)
        assert ("<|bos|>" in choice["logprobs"]["tokens"]) == (not more)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"logprobs": 1, "max_tokens": 0}, {"max_tokens": 0}])
def test_a_stream_has_the_same(client, fields):
    [choice] = complete(client, **fields)["choices"]
    assert streamed(client, **fields) == (choice["text"], choice["logprobs"])
    assert (choice["logprobs"] is not None) == ("logprobs" in fields)


def test_tokens_and_many_prompts(client):
    prompts = [[20, 21, 22, 300, 7], [30], [40, 41]]
    choices = complete(client, prompt=prompts, n=2, logprobs=1, max_tokens=1)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    for index, choice in enumerate(choices):
        ids = prompts[index // 2]
        assert_exact(choice["logprobs"], ids)
        assert choice["text"].startswith(tiny().tokenizer.decode(ids))


def test_a_token_that_ends_the_text_is_listed(client):
    """lm_eval asks for one token and leaves out the last entry."""
    ids = tiny().text_prompt(PROMPT)
    bias = {str(next(iter(tiny().stop_ids))): 100}
    choice = complete(client, logprobs=1, max_tokens=5, ignore_eos=False, logit_bias=bias)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert choice["logprobs"]["text_offset"][-1] == len(PROMPT)
    plain = complete(client, echo=False, logprobs=1, ignore_eos=False, logit_bias=bias)["choices"][0]
    assert plain["logprobs"] is None


def test_a_prompt_as_long_as_the_context_can_be_scored(client):
    ids = [20 + number % 300 for number in range(tiny().positions)]
    choice = complete(client, prompt=ids, logprobs=1, max_tokens=0)["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == tiny().positions
    body = {"prompt": ids, "max_tokens": 1, "echo": True}
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == "prompt" and error["code"] == "context_length_exceeded"
    error = client.post("/v1/completions", json=body | {"prompt": [*ids, 20], "max_tokens": 0}).json()["error"]
    assert error["param"] == "prompt" and error["code"] == "context_length_exceeded"


def test_a_cached_prompt_is_scored_anew(client):
    first = complete(client, logprobs=1, max_tokens=1)
    again = complete(client, logprobs=1, max_tokens=1)
    assert again["choices"] == first["choices"]
