"""The options of a call of soli.LLM by name: Soli's names, and those of OpenAI and vLLM for the same things.

    llm.generate("Good morning", temperature=0.7, max_tokens=40, n=2, stop=["."])

What the engine cannot do is rejected by name, unless its value changes nothing (`best_of=1`, `echo=False`). None is the
default of every option. Two names of one thing, and `sampling` beside what it holds, are rejected.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypedDict, get_type_hints

from soli.arguments import reject_unknown_arguments, without_neutral
from soli.engine.constraint import ConstraintSpec
from soli.engine.sampler import GREEDY, SamplingParams
from soli.engine.sampling_defaults import sampling_params
from soli.errors import SoliError
from soli.sections import Bounds, convert, reject, shown

Count = Annotated[int, Bounds(at_least=1)]


class SamplingOptions(TypedDict, total=False):
    """How tokens are sampled: the fields of SamplingParams."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None


class GenerationOptions(SamplingOptions, total=False):
    """Every option of `soli.LLM.generate` and its relatives; docs/python.md describes each."""

    max_new_tokens: int | None
    max_tokens: int | None
    max_completion_tokens: int | None
    min_tokens: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    parse_special: bool | None
    logprobs: int | bool | None
    top_logprobs: int | None
    prompt_logprobs: int | None
    trace: bool | None
    masked_experts: Collection[tuple[int, int]] | None
    constraint: ConstraintSpec | None


class BeamSearchOptions(TypedDict, total=False):
    """Those of `soli.LLM.beam_search` beside its own."""

    max_new_tokens: int | None
    max_tokens: int | None
    max_completion_tokens: int | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    parse_special: bool | None
    trace: bool | None
    masked_experts: Collection[tuple[int, int]] | None


LENGTHS: Final = ("max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN: Final = tuple(get_type_hints(GenerationOptions))
SAMPLING: Final = tuple(get_type_hints(SamplingOptions))
_TYPES: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("min_tokens", "prompt_logprobs", "top_logprobs"), Annotated[int, Bounds(at_least=0)]),
    "n": Count,
    **dict.fromkeys(("ignore_eos", "parse_special", "skip_special_tokens"), bool),
    "trace": bool,
    **dict.fromkeys(SAMPLING, float),
    "top_k": Annotated[int, Bounds(at_least=-1)],
    "seed": int,
    "stop_token_ids": list[int],
}

# Options of other engines, with the values of them that change nothing.
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "stream": (False,),
    "use_tqdm": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "detokenize": (True,),
    "truncate_prompt_tokens": (),
    "bad_words": ([], ()),
    "allowed_token_ids": (),
    "logits_processors": ([], ()),
    "lora_request": (),
    "priority": (0,),
    "guided_decoding": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
}

# Options of `generate` that a beam search does not have, with the values of them that change nothing.
BEAM_SEARCH_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("temperature", "min_p", "presence_penalty", "frequency_penalty"), (0, 0.0)),
    **dict.fromkeys(("top_p", "repetition_penalty"), (1, 1.0)),
    **dict.fromkeys(("seed", "sampling", "top_logprobs", "prompt_logprobs", "constraint"), ()),
    "top_k": (0, -1),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "n": (1,),
    "stop": ([], ()),
    "logprobs": (False,),
}

HINTS: Final[Mapping[str, str]] = {
    "sampling_params": "its name is sampling",
    "do_sample": "temperature=0 takes the likeliest token, above 0 samples",
    "max_length": "max_new_tokens counts the answer alone",
    "num_return_sequences": "its name is n",
    **dict.fromkeys(("num_beams", "beam_width", "use_beam_search", "length_penalty"), "use beam_search"),
    "eos_token_id": "its name is stop_token_ids",
    "stop_strings": "its name is stop",
    "stop_sequences": "its name is stop",
    "response_format": "give constraint=soli.engine.constraint.ConstraintSpec.json_schema(...)",
    "model": "the model is that of the LLM",
    "prompt": "prompts are the first argument",
    "prompt_token_ids": "prompts, the first argument, may be lists of token ids",
}


@dataclass(frozen=True)
class GenerationSettings:
    """Checked options. `max_new_tokens` None: the default; `stop_token_ids` end an answer beside the model's own, which
    `ignore_eos` leaves out; `n`: answers to each prompt; `skip_special_tokens`: the text does not show them;
    `parse_special`: names of special tokens in a text prompt are these tokens."""

    sampling: SamplingParams = GREEDY
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    parse_special: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    trace: bool = False
    masked_experts: frozenset[tuple[int, int]] = frozenset()
    constraint: ConstraintSpec | None = None


def read_options(
    function: str,
    sampling: SamplingParams | None,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> GenerationSettings:
    """The settings that a call of `function` gives; `defaults`: of its sampling. SoliError naming the option, its value
    and the fix."""
    remaining = without_neutral(function, options, NEUTRAL, HINTS)
    reject_unknown_arguments(function, remaining, KNOWN, HINTS)
    least = 1 if remaining.get("prompt_logprobs") is None else 0  # new tokens
    values = {name: _converted(name, value, least) for name, value in remaining.items() if value is not None}
    lengths = _only_one(values, LENGTHS)
    for name in ("ignore_eos", "min_tokens"):
        if values.get(name) and values.get("constraint"):
            raise SoliError(f"a constrained answer ends where its format does: leave {name} out")
    return GenerationSettings(
        sampling=_sampling(function, sampling, values, defaults or {}),
        max_new_tokens=values[lengths[0]] if lengths else None,
        min_new_tokens=values.get("min_tokens", 0),
        n=values.get("n", 1),
        stop=values.get("stop", ()),
        stop_token_ids=frozenset(values.get("stop_token_ids", ())),
        ignore_eos=values.get("ignore_eos", False),
        skip_special_tokens=values.get("skip_special_tokens", True),
        parse_special=values.get("parse_special", False),
        logprobs=_logprobs(values),
        prompt_logprobs=values.get("prompt_logprobs"),
        trace=values.get("trace", False),
        masked_experts=values.get("masked_experts", frozenset()),
        constraint=values.get("constraint"),
    )


def read_beam_search_options(function: str, options: Mapping[str, Any]) -> GenerationSettings:
    """The settings of a beam search; SoliError as of `read_options`, also for what only sampling has."""
    hints = {
        **HINTS,
        "num_beams": "its name is beam_width",
        "n": "hypotheses of an answer has the others",
        "num_return_sequences": "hypotheses of an answer has them",
    }
    remaining = without_neutral(function, options, BEAM_SEARCH_NEUTRAL, hints)
    reject_unknown_arguments(function, remaining, [*KNOWN, *NEUTRAL], hints)
    return read_options(function, None, remaining)


def _only_one(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the names, each another name of the same option, that have a value: at most one."""
    present = [name for name in names if name in values]
    if len(present) > 1:
        raise SoliError(f"{present[0]} and {present[1]} are two names of one option: give one of them")
    return present


def _sampling(
    function: str, sampling: SamplingParams | None, values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> SamplingParams:
    fields = {name: values[name] for name in SAMPLING if name in values}
    if sampling is not None:
        if not isinstance(sampling, SamplingParams):
            raise SoliError(f"the argument sampling of {function} is {shown(sampling)}: give a soli.SamplingParams")
        if fields:
            name = next(iter(fields))
            raise SoliError(f"sampling and {name} are both given: put {name} into the SamplingParams, or leave it out")
        return sampling
    if fields.get("top_k") == -1:  # vLLM's spelling of no limit
        fields["top_k"] = 0
    filters = fields.get("top_k", 0) > 0 or fields.get("top_p", 1) < 1 or fields.get("min_p", 0) > 0
    # As elsewhere: greedily these options would change nothing.
    temperature = 1.0 if filters or values.get("n", 1) > 1 else GREEDY.temperature
    return sampling_params(fields, defaults, temperature=temperature)


def _logprobs(values: Mapping[str, Any]) -> int | None:
    """How many alternatives each token's log-probability comes with: vLLM's number, or OpenAI's flag and number."""
    logprobs, top = values.get("logprobs"), values.get("top_logprobs")
    if top is not None and (logprobs is None or logprobs is False):
        raise SoliError("top_logprobs needs logprobs=True")
    if top is not None and logprobs is not True:
        raise SoliError(f"logprobs={logprobs} and top_logprobs={top} are both given: give one of them")
    if isinstance(logprobs, bool):
        return (top or 0) if logprobs else None
    return logprobs


def _converted(name: str, value: Any, least_new_tokens: int) -> Any:
    """One option as its type; numbers of numpy and torch count as Python's."""
    if name in LENGTHS:
        return convert(name, _plain(value), Annotated[int, Bounds(at_least=least_new_tokens)])
    if name == "stop":
        return _stop(value)
    if name == "logit_bias":
        return _logit_bias(value)
    if name == "masked_experts":
        return _masked_experts(value)
    if name == "constraint":
        if not isinstance(value, ConstraintSpec):
            reject(name, value, "it must be a soli.engine.constraint.ConstraintSpec, such as ConstraintSpec.regex(...)")
        return value
    if name == "logprobs":
        return value if isinstance(value, bool) else convert(name, _plain(value), Annotated[int, Bounds(at_least=0)])
    if name == "stop_token_ids":
        value = [_plain(token) for token in _items(name, value, "token ids")]
    return convert(name, _plain(value), _TYPES[name])


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", None) is not None else value


def _items(name: str, value: Any, content: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        reject(name, value, f"it must be a list of {content}")
    return list(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else _items("stop", value, "texts")
    for text in texts:
        if not isinstance(text, str) or not text:
            reject("stop", value, "it must be a text that ends the answer, or a list of them, none empty")
    return tuple(texts)


def _logit_bias(value: Any) -> dict[int, float]:
    """Token ids may be texts of digits, as in JSON."""
    if not isinstance(value, Mapping):
        reject("logit_bias", value, "it must be a dictionary from token ids to numbers")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        is_number = isinstance(key, str) and key.isascii() and key.isdigit()
        token = convert("a token of logit_bias", int(key[:20]) if is_number else _plain(key), int)
        if token in biases:
            raise SoliError(f"logit_bias names token {token} twice: name it once")
        biases[token] = convert(f"logit_bias of token {token}", _plain(bias), float)
    return biases


def _masked_experts(value: Any) -> frozenset[tuple[int, int]]:
    pairs = []
    for pair in _items("masked_experts", value, "(layer, expert) pairs"):
        numbers = [_plain(number) for number in _items("masked_experts", pair, "(layer, expert) pairs")]
        pairs.append(convert("a pair of masked_experts", numbers, tuple[int, int]))
    return frozenset(pairs)
