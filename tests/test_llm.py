"""soli.LLM: whole answers and streams, from threads and event loops, equal to the engine's."""

import asyncio
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

import soli
from soli.analysis.notebook_views import heat_map
from soli.engine.beam_search import BeamSearchParams
from soli.engine.request import EngineLimits
from soli.engine.text_model import open_text_model
from soli.errors import SoliError
from soli.eval.translation import Translation, Translator


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


def test_options_of_openai_and_vllm_do_what_they_say(llm):
    [greedy] = llm.generate("The river", max_new_tokens=8)
    assert llm.generate("The river", max_tokens=8)[0].ids == greedy.ids
    assert llm.generate("The river", max_completion_tokens=3)[0].ids == greedy.ids[:3]
    stopped = llm.generate("The river", max_tokens=8, stop_token_ids=[greedy.ids[2]])[0]
    assert (stopped.ids, stopped.finish_reason) == (greedy.ids[:2], "stop")
    assert llm.generate("The river", max_tokens=8, stop=" ")[0].text == ""
    assert len(llm.generate("The river", max_tokens=40, ignore_eos=True)[0].ids) == 40
    with pytest.raises(SoliError, match="stop_token_ids has 6144, but the model's tokens go from 0 to 6143"):
        llm.generate("The river", stop_token_ids=[6144])


@pytest.mark.parametrize("speculate", [False, True])
def test_an_answer_has_its_least_tokens_before_it_may_end(speculate):
    llm = soli.LLM("nano", limits=EngineLimits(speculate=speculate))
    prompt = [llm.text_model.tokenizer.translation_prompt("Where is the library?", "zh")]  # its answer ends soon
    seeds = [soli.SamplingParams(temperature=0.8, seed=seed) for seed in range(20)]
    answers = {sampling: llm.generate(prompt, sampling, max_tokens=40)[0] for sampling in (None, *seeds)}
    ended = {sampling: answer for sampling, answer in answers.items() if answer.finish_reason == "stop"}
    assert None in ended and len(ended) > 3
    for sampling, free in ended.items():
        least = min(40, len(free.ids) + 5)
        [longer] = llm.generate(prompt, sampling, max_tokens=40, min_tokens=least)
        assert len(longer.ids) >= least
        assert not set(longer.ids[:least]) & llm.text_model.stop_ids
        if sampling is None:  # sampled, tokens that may not come leave the others more of the probability
            assert llm.generate(prompt, max_tokens=40, min_tokens=len(free.ids))[0].ids == free.ids
            assert longer.ids[: len(free.ids)] == free.ids
    with pytest.raises(SoliError, match="min_new_tokens is 9: give 0 to max_new_tokens, 3"):
        llm.generate(prompt, max_tokens=3, min_tokens=9)
    llm.close()


def test_a_prompt_s_log_probabilities(llm):
    [whole] = llm.generate("The river", max_tokens=4, logprobs=2)
    [scored] = llm.generate([[*whole.prompt_ids, *whole.ids]], max_tokens=0, prompt_logprobs=2)
    assert scored.ids == () and len(scored.prompt_logprobs) == len(whole.prompt_ids) + 3
    assert [one.token for one in scored.prompt_logprobs[-4:]] == list(whole.ids)
    expected = [one.logprob for one in whole.logprobs]
    assert [one.logprob for one in scored.prompt_logprobs[-4:]] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(SoliError, match="max_tokens is 0"):
        llm.generate("The river", max_tokens=0)


def test_n_answers_are_those_of_a_request_each(llm):
    sampling = soli.SamplingParams(temperature=0.9, seed=4)
    answers = llm.generate(["The river", "Open the"], sampling, n=3, max_tokens=5)
    expected = [
        llm.generate(prompt, sampling.for_choice(choice), max_tokens=5)[0].ids
        for prompt in ("The river", "Open the")
        for choice in range(3)
    ]
    assert [answer.ids for answer in answers] == expected and len(set(expected[:3])) == 3
    for method in (llm.stream, llm.stream_async, llm.translate, llm.request):
        with pytest.raises(SoliError, match=r"n is 2, but \w+ gives one answer: use generate"):
            method("The river", n=2)


def test_prompts_are_texts_or_lists_of_ids(llm):
    ids = llm.text_model.text_prompt("The river")
    [expected] = llm.generate("The river", max_tokens=4)
    for prompts in (ids, [ids], (tuple(ids),), torch.tensor(ids), torch.tensor([ids]), iter(["The river"])):
        assert llm.generate(prompts, max_tokens=4)[0].ids == expected.ids
    for prompts in (None, 3, b"x", {"prompt": "x"}, [{"prompt": "x"}], [None], [1.5], [[1.5]], [[True]]):
        with pytest.raises(SoliError, match="give a text"):
            llm.generate(prompts, max_tokens=4)


def test_translations_are_those_of_the_translator(llm):
    texts = ["Good morning.", " ", "他是我的朋友。"]
    expected = list(Translator(llm.text_model, beam_search=BeamSearchParams(4, 0.6)).translate(texts))
    translations = llm.translate(texts)
    assert [(t.source, t.text, t.to) for t in translations] == [(t.source, t.text, t.to) for t in expected]
    assert translations[1].answer is None
    assert llm.translate("Good morning.") == translations[:1]
    greedy = list(Translator(llm.text_model).translate(texts))
    assert [t.text for t in llm.translate(texts, beam_width=1)] == [t.text for t in greedy]
    assert [t.text for t in llm.translate(texts, logprobs=0)] == [t.text for t in greedy], "what beams do not take"
    [best, _] = llm.translate(["Good morning.", ""], beam_width=2, length_penalty=1.0)
    assert len(best.answer.hypotheses) == 2
    with pytest.raises(SoliError, match="a beam search takes no temperature"):
        llm.translate("a", beam_width=2, temperature=0.5)
    assert llm.translate("Good morning.", "en", max_tokens=2)[0].to == "en"
    for texts in (None, [3], b"x"):
        with pytest.raises(SoliError, match="a text to translate is"):
            llm.translate(texts)
    with pytest.raises(SoliError, match="cannot translate to 'fr'"):
        llm.translate("a", "fr")


def test_a_beam_search_has_its_texts_the_best_first(llm):
    [first, second] = llm.beam_search(["The river", "Open the"], max_tokens=6)
    assert len(first.hypotheses) == len(second.hypotheses) == 4
    assert first.ids == first.hypotheses[0].ids and first.text == first.hypotheses[0].text
    scores = [one.score for one in first.hypotheses]
    assert scores == sorted(scores, reverse=True)
    sums = [one.log_probability for one in first.hypotheses]
    assert scores == pytest.approx([total / 6**0.6 for total in sums]), "the model's own length_penalty"
    params = BeamSearchParams(4, 0.6)
    assert llm.beam_search("The river", params, max_tokens=6)[0].hypotheses == first.hypotheses
    [greedy] = llm.beam_search("The river", beam_width=1, max_tokens=6)
    assert greedy.ids == llm.generate("The river", max_tokens=6)[0].ids
    assert llm.beam_search("The river", temperature=0.0, n=1, top_k=-1, max_tokens=6)[0].ids == first.ids
    scored = llm.generate("The river", max_tokens=6, logprobs=0)[0]
    assert scored.hypotheses == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "beam_search does not support temperature=0.7"),
        ({"n": 2}, "does not support n=2; hypotheses of an answer"),
        ({"num_beams": 2}, "no argument 'num_beams'; its name is beam_width"),
        ({"stop": ["."]}, "does not support stop"),
        ({"logprobs": 1}, "does not support logprobs=1"),
        ({"sampling": soli.SamplingParams()}, "does not support sampling"),
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": 17}, "at most 16 sequences"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"params": BeamSearchParams(2), "beam_width": 3}, "the argument params of beam_search"),
        ({"params": {"beam_width": 3}}, "the argument params of beam_search"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_what_a_beam_search_does_not_take_is_rejected_by_name(llm, options, message):
    with pytest.raises(SoliError, match=message):
        llm.beam_search("The river", **options)


def test_results_are_worth_reading_and_escape_their_texts(llm):
    assert repr(llm).startswith("<soli.LLM nano: 17.4 M parameters, 6.4 M activated") and "512 positions" in repr(llm)
    [answer] = llm.generate("The <b>river</b>", max_tokens=5, trace=True)
    assert repr(answer).startswith(f"<Answer {answer.text!r}, length after ") and "routing of 4 layers" in repr(answer)
    assert repr(answer.routing[0]).startswith("<Routing: 4 of 32 experts for each of ")
    hostile = replace(answer, text="<script>alert(1)</script>")
    views = [llm._repr_html_(), hostile._repr_html_(), answer.routing[0]._repr_html_()]
    views += [Translation("<script>", "<script>", "zh", hostile)._repr_html_(), soli.count("nano")._repr_html_()]
    for view in views:
        tree = ElementTree.fromstring(f"<div>{view}</div>")
        assert not {"script", "img", "link", "iframe"} & {element.tag for element in tree.iter()}
        assert "http" not in view and "url(" not in view and "href" not in view
    cells = ElementTree.fromstring(f"<div>{answer.routing[0]._repr_html_()}</div>").findall(".//g/rect")
    assert len(cells) == 4 * len(answer.routing[0].expert_ids_TK)


def test_the_heat_map_of_a_giant_stays_small():
    rows = [[1.0 + expert for expert in range(256)] for _ in range(500)]
    view = heat_map("a", rows, "token", "weight")
    assert "the first 64 of 500 rows" in view and len(view) < 1_500_000
    assert heat_map("a", [], "token", "weight") and heat_map("a", [[0.0, 0.0]], "token", "weight")
