"""soli.LLM.chat: the prompt of the API for the same messages, answers parsed, and sent back as they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import soli
from soli.chat.answer import ChatAnswer, conversations, parse_answer, render_chat
from soli.chat.parsers.families import DEEPSEEK
from soli.chat.templates import ChatTemplate
from soli.data.tokenizer import Tokenizer
from soli.engine.constraint import ConstraintSpec
from soli.engine.request import Answer, EngineLimits, Usage
from soli.errors import SoliError
from soli.serve.chat_prompts import chat_batch
from soli.serve.protocol_requests import ChatBody
from soli.serve.server import load
from soli.serve.service import ServiceLimits
from tests.engine.tiny import tiny_folder
from tests.serve.tiny_server import TEMPLATE

USER = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
LIMITS = EngineLimits(cache_bytes=2**22)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(tiny_folder(tmp_path_factory.mktemp("tiny")))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path):
    chatting = soli.LLM(folder, limits=LIMITS)
    yield chatting
    chatting.close()


def test_a_chat_has_the_prompt_and_the_text_of_the_api(llm: soli.LLM, folder: Path) -> None:
    loaded = load(str(folder), "cpu", "auto", LIMITS)
    for messages in (USER, [{"role": "system", "content": "Be brief."}, *USER]):
        body = ChatBody(messages=messages, temperature=0, max_tokens=8)
        [request] = chat_batch(body, loaded, ServiceLimits()).requests
        [answer] = llm.chat(messages, max_tokens=8)
        assert answer.answer.prompt_ids == request.prompt_ids
        events = list(loaded.engine.open(request))
        assert answer.text == answer.content == "".join(event.text for event in events)
    loaded.engine.close()
    loaded.template.close()


def test_conversations_and_several_answers(llm: soli.LLM) -> None:
    other = [{"role": "user", "content": "goodbye"}]
    one, two = llm.chat([USER, other], max_tokens=4)
    assert one.answer.ids == llm.chat(USER, max_tokens=4)[0].answer.ids
    assert two.answer.ids == llm.chat(other, max_completion_tokens=4)[0].answer.ids
    answers = llm.chat(USER, n=3, temperature=1.0, seed=1, max_tokens=4)
    assert len({answer.answer.ids for answer in answers}) > 1
    assert llm.chat(USER)[0].answer.usage.completion <= llm.text_model.positions


def test_what_was_answered_may_be_sent_back(llm: soli.LLM) -> None:
    [answer] = llm.chat(USER, max_tokens=4)
    following = {"role": "user", "content": "and now?"}
    by_message, by_answer = llm.chat([[*USER, one, following] for one in (answer.message, answer)], max_tokens=4)
    assert by_message.answer == by_answer.answer
    assert by_message.answer.prompt_ids[: len(answer.answer.prompt_ids)] == answer.answer.prompt_ids


def text_answer(text: str) -> Answer:
    return Answer((1,), (2, 3), text, "stop", Usage(1, 2), None, None)


def test_reasoning_and_calls_are_parsed(folder: Path) -> None:
    template = ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder))
    prompt = render_chat(template, USER, [TOOL])
    call = f'{DEEPSEEK.call_begin}get_weather{DEEPSEEK.separator}{{"city": "Paris"}}{DEEPSEEK.call_end}'
    text = f"<think>hm</think>Let me see.{DEEPSEEK.section_begin}{call}{call}{DEEPSEEK.section_end}"
    answer = parse_answer(text_answer(text), prompt.new_parser())
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("hm", "Let me see.", "tool_calls")
    arguments = [(one.name, json.loads(one.arguments)) for one in answer.tool_calls]
    assert arguments == [("get_weather", {"city": "Paris"})] * 2
    assert len({one.call_id for one in answer.tool_calls}) == 2
    message = answer.message
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert message["reasoning_content"] == "hm" and message["role"] == "assistant"
    results = [{"role": "tool", "tool_call_id": one.call_id, "content": "rain"} for one in answer.tool_calls]
    [conversation] = conversations([*USER, answer, *results])
    assert render_chat(template, conversation, [TOOL]).token_ids
    assert "calls get_weather(" in repr(answer) and "after reasoning 'hm'" in repr(answer)
    plain = parse_answer(text_answer(text), render_chat(template, USER, is_constrained=True).new_parser())
    assert plain.content == text and plain.tool_calls == ()
    empty = parse_answer(text_answer(call), prompt.new_parser())
    assert empty.message["content"] is None
    template.close()


def test_its_view_escapes_texts() -> None:
    answer = text_answer("")
    view = ChatAnswer("<script>", "<img>", (), answer)._repr_html_()
    assert "<script>" not in view and "<img>" not in view


def test_constrained_answers(llm: soli.LLM) -> None:
    [answer] = llm.chat(USER, constraint=ConstraintSpec.regex("[0-9]{3}"))
    assert answer.content.isdigit() and len(answer.content) == 3
    with pytest.raises(SoliError, match="leave tools or constraint out"):
        llm.chat(USER, tools=[TOOL], constraint=ConstraintSpec.regex("[0-9]{3}"))


NO_MESSAGES = [None, "hello", [], [[]], ["hello"], [{"content": "x"}], [{"role": 3}], [[{}]], {"role": "user"}, [None]]


@pytest.mark.parametrize("messages", [*NO_MESSAGES, [USER, []]])
def test_what_are_no_messages(llm: soli.LLM, messages: object) -> None:
    with pytest.raises(SoliError, match=r"a message is|messages is"):
        llm.chat(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [{"name": "x"}]}, "a tool is"),
        ({"tools": {"type": "function"}}, "a tool is"),
        ({"tools": "x"}, "a tool is"),
        ({"tool_choice": "required"}, "chat does not support tool_choice='required'"),
        ({"max_token": 3}, "chat has no argument 'max_token'; did you mean max_tokens"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs is 3; give a dictionary"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"add_generation_prompt": False}, "chat does not support add_generation_prompt=False"),
    ],
)
def test_bad_options(llm: soli.LLM, options: dict[str, object], message: str) -> None:
    with pytest.raises(SoliError, match=message):
        llm.chat(USER, **options)


def test_neutral_options(llm: soli.LLM) -> None:
    neutral = {"tools": None, "tool_choice": "auto", "add_generation_prompt": True, "chat_template": None}
    assert llm.chat(USER, max_tokens=2, **neutral)[0].answer == llm.chat(USER, max_tokens=2, tools=[])[0].answer


def test_null_and_empty_fields_are_absent() -> None:
    message = {"role": "user", "content": "hello", "name": None, "tool_calls": [], "refusal": None}
    assert conversations([message]) == [USER]
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": None}]
    [[stored]] = conversations([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert stored["content"] is None and "index" not in stored["tool_calls"][0]


def test_a_model_without_a_template_says_so() -> None:
    nano = soli.LLM("nano")
    with pytest.raises(SoliError, match="nano has no chat template, so it was not trained to chat: use generate"):
        nano.chat(USER)
    nano.close()


def test_special_tokens_are_shown_where_that_is_asked_for(llm: soli.LLM) -> None:
    special = sorted(llm.text_model.tokenizer.special_ids - llm.text_model.stop_ids)[0]
    bias = {special: 100}
    [hidden] = llm.generate("hello", max_tokens=2, logit_bias=bias)
    [visible] = llm.generate("hello", max_tokens=2, logit_bias=bias, skip_special_tokens=False)
    assert hidden.ids == visible.ids and special in visible.ids
    name = llm.text_model.tokenizer.token_text(special)
    assert name in visible.text and name not in hidden.text
    [parsed] = llm.generate(f"hello{name}", max_tokens=1, parse_special=True)
    assert special in parsed.prompt_ids
    assert special not in llm.generate(f"hello{name}", max_tokens=1)[0].prompt_ids[1:]
    assert replace(parsed, text="") != parsed


def test_strict_tools_constrain_the_answer(llm: soli.LLM) -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    prompt = render_chat(llm._chat_template, USER, [strict])
    assert prompt.constraint is not None and render_chat(llm._chat_template, USER, [TOOL]).constraint is None
    impossible = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
    with pytest.raises(SoliError, match="'not' at /not, which cannot be enforced"):
        llm.chat(USER, tools=[impossible])
