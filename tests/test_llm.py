"""soli.LLM: whole answers and streams, from threads and event loops, equal to the engine's."""

import asyncio

import pytest

import soli
from soli.engine.text_model import open_text_model
from soli.errors import SoliError


@pytest.fixture(scope="module")
def llm():
    nano = soli.LLM("nano")
    yield nano
    nano.close()


def test_many_prompts_are_answered_in_order_and_as_one_alone(llm):
    prompts = ["The river", "Open the", "今天", "A knife"]
    answers = llm.generate(prompts, max_new_tokens=6)
    assert [answer.ids for answer in answers] == [llm.generate(p, max_new_tokens=6)[0].ids for p in prompts]
    tokenizer = open_text_model("nano").tokenizer
    assert all(answer.text == tokenizer.decode(answer.ids) and len(answer.ids) <= 6 for answer in answers)
    assert [answer.prompt_ids for answer in answers] == [tuple(llm.text_model.text_prompt(p)) for p in prompts]


def test_streams_and_event_loops_give_the_same_text(llm):
    [whole] = llm.generate("The river", max_new_tokens=8, logprobs=2, trace=True)
    pieces = [event.text for event in llm.stream("The river", max_new_tokens=8)]
    assert "".join(pieces) == whole.text and len(pieces) >= 8

    async def streamed():
        return [event.text async for event in llm.stream_async("The river", max_new_tokens=8)]

    async def answered():
        return await llm.generate_async(["The river"] * 3, max_new_tokens=8)

    assert asyncio.run(streamed()) == pieces
    assert {answer.text for answer in asyncio.run(answered())} == {whole.text}
    assert [one.token for one in whole.logprobs] == list(whole.ids) and len(whole.logprobs[0].top) == 2
    assert len(whole.routing) == 4 and len(whole.routing[0].expert_ids_TK) == whole.usage.prompt + 7


def test_leaving_a_stream_cancels_it(llm):
    stream = llm.stream("The river", max_new_tokens=400)
    next(stream)
    stream.close()
    llm.generate("A", max_new_tokens=1)  # the cancellation came before
    assert llm.stats().running == 0


def test_what_the_engine_rejects_is_raised_here(llm):
    with pytest.raises(SoliError, match="512 positions"):
        llm.generate("The river", max_new_tokens=600)
    assert llm.generate([]) == []
