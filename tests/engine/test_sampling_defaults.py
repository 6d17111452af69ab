"""Sampling of generation_config.json holds where nothing else is said, in the API, the CLI and Python alike."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from soli import LLM
from soli.cli import app
from soli.engine.sampler import SamplingParams
from soli.engine.sampling_defaults import read_sampling_defaults, sampling_params
from soli.errors import SoliError
from tests.engine.tiny import tiny_folder

R1 = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1, "transformers_version": "4.39.3"}


def defaults(tmp_path, document):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(document))
    return read_sampling_defaults(file)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (R1, {"temperature": 0.6, "top_p": 0.95}),
        ({"top_k": 20, "repetition_penalty": 1.05}, {"top_k": 20, "repetition_penalty": 1.05}),
        ({"temperature": None, "top_k": -1, "min_p": 0.1}, {"top_k": 0, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 50}, {"temperature": 0.0}),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"_from_model_config": True, "bos_token_id": 0}, {}),
    ],
)
def test_the_files_sampling_is_read(tmp_path, document, expected):
    assert defaults(tmp_path, document) == expected


def test_a_folder_without_the_file_has_no_defaults(tmp_path):
    assert read_sampling_defaults(tmp_path / "generation_config.json") == {}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 0.5}, "top_k is 0.5"),
        ({"top_p": True}, "top_p is True"),
        ({"do_sample": 1}, "do_sample is 1"),
    ],
)
def test_values_out_of_range_are_rejected_by_file(tmp_path, document, message):
    with pytest.raises(SoliError) as raised:
        defaults(tmp_path, document)
    assert str(tmp_path / "generation_config.json") in str(raised.value)
    assert message.lower() in str(raised.value).lower()


def test_what_is_given_takes_precedence():
    file = {"temperature": 0.6, "top_p": 0.95}
    assert sampling_params({"temperature": None}, file, temperature=1.0) == SamplingParams(0.6, top_p=0.95)
    assert sampling_params({"temperature": 0.0, "top_k": 5}, file) == SamplingParams(0.0, top_k=5, top_p=0.95)
    assert sampling_params({}, {}, temperature=1.0) == SamplingParams(1.0)
    assert sampling_params({}, {}) == SamplingParams()


def test_python_and_the_command_line_use_them(tmp_path):
    folder = Path(tiny_folder(tmp_path))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 5.0, "top_k": 1}))
    llm = LLM(folder)
    assert llm.request("hello").sampling == SamplingParams(5.0, top_k=1)
    assert llm.request("hello", temperature=0.5).sampling == SamplingParams(0.5, top_k=1)
    assert llm.request("hello", SamplingParams(seed=1)).sampling == SamplingParams(seed=1)
    [greedy] = llm.generate("hello", SamplingParams(), max_new_tokens=8)
    llm.close()
    run = CliRunner().invoke(app, ["generate", str(folder), "hello", "--max-new-tokens", "8"])
    assert run.exit_code == 0 and run.stdout.strip("\n") == greedy.text.strip("\n")  # one token is left to sample from
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    run = CliRunner().invoke(app, ["generate", str(folder), "hello"])
    assert isinstance(run.exception, SoliError) and "generation_config.json: top_p is 7" in str(run.exception)
