"""/tokenize and /detokenize: the tokens that the other routes read, and back."""

import httpx
import pytest

from tests.serve.tiny_server import tiny, tiny_server

HELLO = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def post():
    with tiny_server() as url, httpx.Client(base_url=url) as client:
        yield lambda path, **body: client.post(path, json=body)


@pytest.mark.parametrize("text", ["the cat", "你好 <|eos|> 🦊", "", " \n", "a" * 5000])
def test_a_text_has_the_tokens_of_a_completion(post, text):
    answer = post("/tokenize", prompt=text, return_token_strs=True).json()
    tokens = answer["tokens"]
    assert tokens == [*tiny().text_prefix, *tiny().tokenizer.encode(text)]
    assert answer["count"] == len(tokens) == len(answer["token_strs"]) and answer["max_model_len"] == tiny().positions
    if 0 < len(tokens) < 900:
        body = {"prompt": text, "max_tokens": 1, "soli": {"routing": "full"}}
        read = post("/v1/completions", **body).json()["choices"][0]["soli"]["tokens"]
        assert [token["token"] for token in read if token["part"] == "prompt"] == tokens
    bare = post("/tokenize", prompt=text, add_special_tokens=False).json()
    assert bare["token_strs"] is None
    assert post("/detokenize", tokens=bare["tokens"]).json() == {"prompt": text}


def test_names_of_special_tokens_are_text_unless_the_switch_is_set(post):
    eos = tiny().tokenizer.eos_id
    switched = {"add_special_tokens": False, "parse_special": True}
    assert post("/tokenize", prompt="a<|eos|>", **switched).json()["tokens"][-1] == eos
    assert eos not in post("/tokenize", prompt="a<|eos|>").json()["tokens"]
    assert post("/detokenize", tokens=[eos]).json() == {"prompt": "<|eos|>"}


def test_messages_have_the_tokens_of_a_chat(post):
    tools = [{"type": "function", "function": {"name": "get_time"}}]
    for more in ({}, {"tools": tools}, {"chat_template_kwargs": {"thinking": True}}, {"tools": [], "prompt": None}):
        tokens = post("/tokenize", messages=HELLO, **more).json()["tokens"]
        chat = {"messages": HELLO, "max_tokens": 1, "soli": {"routing": "full"}, **more}
        chat.pop("prompt", None)
        read = post("/v1/chat/completions", **chat).json()["choices"][0]["soli"]["tokens"]
        assert [token["token"] for token in read if token["part"] == "prompt"] == tokens


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "surprise": 1}, "surprise"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [330]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_errors_name_the_field(post, path, body, param):
    answer = post(path, **body)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param


def test_null_is_absent(post):
    assert post("/tokenize", prompt="a", messages=None, tools=None, model=None, surprise=None).status_code == 200
    assert post("/detokenize", tokens=[], model=None).json() == {"prompt": ""}
