"""Null is absent in every field of every route, values that ask for what happens anyway are accepted, and what would
change the answer and cannot be done is rejected by name."""

import copy

import httpx
import pytest
from pydantic import BaseModel

from soli.serve import protocol_requests as protocol
from soli.serve.protocol_requests import ChatBody, CompletionBody, RequestBody, TranslateBody
from tests.serve.tiny_server import scripted_server

CHAT, COMPLETION, TRANSLATE = "/v1/chat/completions", "/v1/completions", "/soli/translate"
TOOL = {"type": "function", "function": {"name": "f"}}
BODIES = {
    CHAT: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "tools": [TOOL],
        "response_format": {"type": "text"},
        "stream_options": {},
        "soli": {},
        "max_tokens": 3,
    },
    COMPLETION: {"prompt": "hi", "max_tokens": 3, "response_format": {}, "stream_options": {}, "soli": {}},
}


@pytest.fixture(scope="module")
def post():
    with scripted_server(lambda request: "the cat") as (url, _), httpx.Client(base_url=url) as client:
        yield lambda path, body: client.post(path, json=body)


def optional_fields(body: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in body.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path, body in ((CHAT, ChatBody), (COMPLETION, CompletionBody)) for name in optional_fields(body)],
)
def test_null_is_absent_in_every_field(post, path, name):
    answer = post(path, BODIES[path] | {name: None})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_null_is_absent_in_fields_that_are_not_known(post, path):
    names = ("audio", "prediction", "web_search_options", "guided_json", "stop_token_ids", "surprise")
    answer = post(path, BODIES[path] | dict.fromkeys(names))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "place",
    ["messages.0", "messages.0.content.0", "tools.0", "tools.0.function", "response_format", "stream_options", "soli"],
)
def test_null_is_absent_in_objects_of_a_body(post, place):
    """Every optional field of the object at once, and one that is not known."""
    body = copy.deepcopy(BODIES[CHAT])
    value = body
    for key in place.split("."):
        value = value[int(key) if key.isdigit() else key]
    classes = {
        "messages.0": protocol.Message,
        "messages.0.content.0": protocol.TextPart,
        "tools.0": protocol.Tool,
        "tools.0.function": protocol.Function,
        "response_format": protocol.ResponseFormat,
        "stream_options": protocol.StreamOptions,
        "soli": protocol.SoliOptions,
    }
    names = [name for name in optional_fields(classes[place]) if name not in value]
    value |= dict.fromkeys([*names, "surprise"])
    answer = post(CHAT, body)
    assert answer.status_code == 200, answer.text


def test_null_in_a_required_field_is_a_missing_field(post):
    for path, body, param in [
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": [{"role": None, "content": "hi"}]}, "messages.0.role"),
        (COMPLETION, {"prompt": None}, "prompt"),
        (TRANSLATE, {"text": None}, "text"),
    ]:
        error = post(path, body).json()["error"]
        assert error["param"] == param and "required" in error["message"]


def test_null_is_absent_in_translations():
    names = optional_fields(TranslateBody)
    body = TranslateBody.model_validate({"text": "hi", **dict.fromkeys(names)})
    assert body == TranslateBody(text="hi")


HINTS = [
    {"user": ""}, {"user": "me"}, {"store": True}, {"store": False}, {"metadata": {}}, {"metadata": {"run": "1"}},
    {"service_tier": "auto"}, {"service_tier": "flex"}, {"safety_identifier": "x"}, {"prompt_cache_key": "x"},
    {"prompt_cache_retention": "24h"},
]  # fmt: skip
DEFAULTS = [
    {"n": 1}, {"stop": []}, {"logit_bias": {}}, {"seed": 0}, {"top_p": 1}, {"top_k": 0}, {"top_k": -1}, {"min_p": 0},
    {"repetition_penalty": 1}, {"presence_penalty": 0}, {"frequency_penalty": 0}, {"ignore_eos": False},
    {"stream": False}, {"stream_options": {}}, {"stream_options": {"include_usage": False}},
    {"stream_options": {"include_obfuscation": False}}, {"stream_options": {"continuous_usage_stats": False}},
    {"response_format": {}}, {"response_format": {"type": "text"}}, {"soli": {}}, {"soli": {"routing": "none"}},
    {"logprobs": False}, {"model": ""}, {"model": "tiny"}, {"min_tokens": 0}, {"stop_token_ids": []},
    {"use_beam_search": False}, {"length_penalty": 1.0}, {"early_stopping": False}, {"bad_words": []}, {"priority": 0},
    {"spaces_between_special_tokens": True}, {"include_stop_str_in_output": False}, {"logits_processors": []},
    {"return_tokens_as_token_ids": False}, {"return_token_ids": False}, {"skip_special_tokens": True}, {"echo": False},
]  # fmt: skip
CHAT_DEFAULTS = [
    {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"tools": [], "tool_choice": "auto"},
    {"parallel_tool_calls": True}, {"parallel_tool_calls": False}, {"logprobs": False, "top_logprobs": 0},
    {"top_logprobs": 0}, {"chat_template_kwargs": {}}, {"modalities": ["text"]}, {"modalities": []},
    {"functions": []}, {"functions": None, "function_call": None}, {"function_call": "auto"},
    {"function_call": "none"}, {"verbosity": "low"}, {"reasoning_effort": "high"}, {"reasoning_effort": "none"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": None}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": False}}]},
    {"max_tokens": None, "max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3},
    {"add_special_tokens": False}, {"add_generation_prompt": True},
    {"continue_final_message": False}, {"documents": []},
]  # fmt: skip
COMPLETION_DEFAULTS = [
    {"add_special_tokens": True}, {"parse_special": False},
    {"best_of": 1}, {"n": 2, "best_of": 2}, {"n": 2, "best_of": 1}, {"suffix": ""}, {"logprobs": 0},
    {"max_tokens": 0},
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *((CHAT, fields) for fields in (*HINTS, *DEFAULTS, *CHAT_DEFAULTS)),
        *((COMPLETION, fields) for fields in (*HINTS, *DEFAULTS, *COMPLETION_DEFAULTS)),
    ],
)
def test_values_that_ask_for_nothing_are_accepted(post, path, fields):
    base = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    answer = post(path, base | {"max_tokens": 3} | fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"modalities": ["text", "audio"]}, "modalities.1"),
        (CHAT, {"audio": {"voice": "a", "format": "wav"}}, "audio"),
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"function_call": {"name": "f"}}, "function_call"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        (CHAT, {"top_k": -2}, "top_k"),
        (CHAT, {"use_beam_search": True}, "use_beam_search"),
        (CHAT, {"length_penalty": 0.5}, "length_penalty"),
        (CHAT, {"bad_words": ["x"]}, "bad_words"),
        (CHAT, {"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
        (CHAT, {"stop_token_ids": [330]}, "stop_token_ids"),
        (CHAT, {"min_tokens": 5, "response_format": {"type": "json_object"}}, "min_tokens"),
        (CHAT, {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        (COMPLETION, {"suffix": "end"}, "suffix"),
        (COMPLETION, {"best_of": 2}, "best_of"),
        (COMPLETION, {"logprobs": True}, "logprobs"),
        (COMPLETION, {"verbosity": "low"}, "verbosity"),
        (COMPLETION, {"surprise": []}, "surprise"),
    ],
)
def test_what_cannot_be_done_is_rejected_by_name(post, path, fields, param):
    base = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    answer = post(path, base | fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_the_schemas_say_what_may_be_null():
    for body in (ChatBody, CompletionBody, TranslateBody):
        schema = body.model_json_schema()
        for part in (schema, *schema["$defs"].values()):
            if part["type"] != "object":
                continue
            assert part["additionalProperties"] in ({"type": "null"}, True)  # the latter of messages
            optional = set(part["properties"]) - set(part.get("required", ()))
            assert all({"type": "null"} in part["properties"][name]["anyOf"] for name in optional)


def test_a_null_inside_a_json_schema_stays(post):
    """It is a value there: `default` and `const` may be null."""
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    body = protocol.JsonSchema.model_validate({"name": "x", "schema": schema, "strict": None})
    assert body.schema_ == schema
    assert issubclass(protocol.JsonSchema, RequestBody)
