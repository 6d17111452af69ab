"""The sampling that a model folder asks for in generation_config.json, where a request says nothing about it.

temperature, top_k, top_p, min_p and repetition_penalty are read; `do_sample: false` means temperature 0 whatever the
others say, and true means 1 where they say nothing. In the API, the CLI and Python alike, what a request says takes
precedence. `soli serve --generation-config none` leaves the file out.

num_beams, length_penalty and early_stopping are read by `translate` alone: elsewhere text is sampled or greedy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soli.engine.beam_search import BeamSearchParams
from soli.engine.sampler import SamplingParams
from soli.errors import SoliError
from soli.input_files import read_object_if_present
from soli.sections import PositiveInt, convert, shown

FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_sampling_defaults(file: Path) -> dict[str, Any]:
    """The fields of SamplingParams that a generation_config.json has; none for an absent file. SoliError for a value
    out of its range."""
    document = read_object_if_present(file)
    do_sample = document.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise SoliError(f"{file}: do_sample is {shown(do_sample)}; it must be true, false or null")
    if do_sample is False:
        return {"temperature": 0.0}
    values = {name: document[name] for name in FIELDS if document.get(name) is not None}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
            raise SoliError(f"{file}: {name} is {shown(value)}; it must be a number")
    if do_sample:
        values.setdefault("temperature", 1.0)
    values["top_k"] = max(0, values.get("top_k", 0))  # -1 is vLLM's "off"
    try:
        SamplingParams(**values)
    except SoliError as error:
        raise SoliError(f"{file}: {error}") from None
    return {name: value for name, value in values.items() if name in document or name == "temperature"}


def read_beam_search(file: Path) -> BeamSearchParams | None:
    """The beam search of a generation_config.json; None for an absent file or one beam. SoliError for a value out of
    its range."""
    document = read_object_if_present(file)
    try:
        beams = convert("num_beams", 1 if document.get("num_beams") is None else document["num_beams"], PositiveInt)
        names = ("length_penalty", "early_stopping")
        values = {name: document[name] for name in names if document.get(name) is not None}
        return BeamSearchParams(beams, **values) if beams > 1 else None
    except SoliError as error:
        raise SoliError(f"{file}: {error}") from None


def sampling_params(values: Mapping[str, Any], defaults: Mapping[str, Any], **fallbacks: Any) -> SamplingParams:
    """`values` but for those that are None; what they lack has the folder's `defaults`, else `fallbacks`, else the
    defaults of SamplingParams."""
    return SamplingParams(**fallbacks | dict(defaults) | {k: v for k, v in values.items() if v is not None})
