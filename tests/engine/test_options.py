"""Options by name: what is known is used, what is not is rejected by name, what changes nothing is accepted."""

import numpy as np
import pytest
import torch

from soli.arguments import UnknownArgument
from soli.engine.constraint import ConstraintSpec
from soli.engine.options import HINTS, KNOWN, NEUTRAL, GenerationSettings, read_options
from soli.engine.sampler import GREEDY, SamplingParams
from soli.errors import SoliError


def read(sampling: SamplingParams | None = None, **options: object) -> GenerationSettings:
    return read_options("generate", sampling, options)


def test_nothing_is_greedy_and_none_is_nothing():
    assert read() == GenerationSettings()
    assert read(**dict.fromkeys(KNOWN)) == GenerationSettings()
    assert read(**dict.fromkeys(NEUTRAL)) == GenerationSettings()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NEUTRAL.items() for value in values])
def test_a_value_that_changes_nothing_is_accepted(name, value):
    assert read(**{name: value}) == GenerationSettings()


@pytest.mark.parametrize("name", NEUTRAL)
def test_any_other_value_is_rejected_by_name(name):
    with pytest.raises(UnknownArgument, match=f"generate does not support {name}=") as error:
        read(**{name: [7]})
    assert isinstance(error.value, TypeError) and isinstance(error.value, SoliError)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_token", "did you mean max_tokens"),
        ("max_new_token", "did you mean max_new_tokens"),
        ("temprature", "did you mean temperature"),
        ("stops", "did you mean stop"),
        ("sampling_params", "its name is sampling"),
        ("do_sample", "temperature=0"),
        ("frobnicate", "choose one of temperature, "),
    ],
)
def test_an_unknown_name_is_rejected_with_a_suggestion(name, advice):
    with pytest.raises(UnknownArgument, match=f"generate has no argument '{name}'; {advice}"):
        read(**{name: None})


def test_hints_are_about_names_that_are_not_known():
    assert not HINTS.keys() & set(KNOWN)


def test_sampling_options_are_the_fields_of_sampling_params():
    options = dict(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=4, repetition_penalty=1.1)
    options |= dict(presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={5: 1.0})
    assert read(**options).sampling == SamplingParams(**options)
    assert read(logit_bias={"5": 1}).sampling.logit_bias == {5: 1.0}
    assert read(SamplingParams(0.7)).sampling == SamplingParams(0.7)
    assert read(seed=3).sampling == SamplingParams(seed=3)


def test_filters_and_several_answers_sample_at_one_where_no_temperature_is_named():
    for options in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"n": 2}):
        assert read(**options).sampling.temperature == 1
        assert read(temperature=0, **options).sampling.temperature == 0
    for options in ({"top_p": 1}, {"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"n": 1}):
        assert read(**options).sampling == GREEDY


def test_numbers_of_numpy_and_torch_are_numbers():
    settings = read(max_tokens=np.int64(5), temperature=np.float32(0.5), stop_token_ids=np.array([3, 4]))
    assert (settings.max_new_tokens, settings.sampling.temperature) == (5, 0.5)
    assert settings.stop_token_ids == {3, 4}
    assert read(max_tokens=torch.tensor(5), masked_experts=torch.tensor([[1, 2]])).masked_experts == {(1, 2)}


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "max_completion_tokens"])
def test_three_names_of_the_length(name):
    assert read(**{name: 5}).max_new_tokens == 5
    other = "max_tokens" if name == "max_new_tokens" else "max_new_tokens"
    assert read(**{name: 5, other: None}).max_new_tokens == 5
    with pytest.raises(SoliError, match="are two names of one option"):
        read(**{name: 5, other: 5})


def test_log_probabilities_by_number_or_by_flag():
    assert [read(logprobs=value).logprobs for value in (3, 0, True, False)] == [3, 0, 0, None]
    assert read(logprobs=True, top_logprobs=4).logprobs == 4
    for options in ({"top_logprobs": 2}, {"top_logprobs": 2, "logprobs": False}, {"top_logprobs": 2, "logprobs": 3}):
        with pytest.raises(SoliError, match="top_logprobs"):
            read(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "sampling and temperature are both given"),
        ({"logit_bias": {}}, "sampling and logit_bias are both given"),
        ({"seed": 0}, "sampling and seed are both given"),
    ],
)
def test_sampling_beside_what_it_holds_is_rejected(options, message):
    with pytest.raises(SoliError, match=message):
        read(SamplingParams(), **options)
    assert read(SamplingParams(), max_tokens=3, n=2, stop="x", top_p=None).max_new_tokens == 3


@pytest.mark.parametrize("sampling", [{"temperature": 1}, 0.7, "greedy", SamplingParams])
def test_sampling_of_another_type_is_rejected(sampling):
    with pytest.raises(SoliError, match=r"give a soli\.SamplingParams"):
        read(sampling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "5"}, "max_tokens is '5'; it must be a whole number of at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"n": True}, "n is True"),
        ({"n": 0}, "n is 0"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 3}, "top_p is 3"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": ["a", ""]}, "stop is "),
        ({"stop": 3}, "stop is 3"),
        ({"stop": b"x"}, "stop is b'x'"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": "all"}, "logprobs is 'all'"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"logit_bias": {"a": 1}}, "a token of logit_bias is 'a'"),
        ({"logit_bias": {"3": 1, 3: 1}}, "logit_bias names token 3 twice"),
        ({"logit_bias": {3: 1000}}, "logit_bias of token 3 is 1000"),
        ({"logit_bias": {-3: 1}}, "logit_bias of token -3"),
        ({"masked_experts": [3]}, "masked_experts is 3"),
        ({"masked_experts": [(1, 2, 3)]}, "a pair of masked_experts"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"constraint": ConstraintSpec.regex("[0-9]"), "min_tokens": 3}, "leave min_tokens out"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"trace": "yes"}, "trace is 'yes'"),
        ({"constraint": "[0-9]"}, "constraint is '\\[0-9\\]'"),
        ({"constraint": ConstraintSpec.regex("[0-9]"), "ignore_eos": True}, "leave ignore_eos out"),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_it(options, message):
    with pytest.raises(SoliError, match=message):
        read(**options)


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "seed", "min_p", "presence_penalty"])
def test_sampling_params_reject_what_is_no_number(field):
    for value in ("1", True, [1]):
        with pytest.raises(SoliError, match=f"{field} is .*: give a "):
            SamplingParams(**{field: value})


def test_sampling_params_name_what_generate_takes():
    with pytest.raises(UnknownArgument, match="no argument 'max_tokens'; it is an argument of generate"):
        SamplingParams(max_tokens=3)
    with pytest.raises(UnknownArgument, match="did you mean temperature"):
        SamplingParams(temprature=3)
