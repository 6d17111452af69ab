"""Every public function of soli rejects keyword arguments that it does not have, and says what was meant."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import soli
from soli.arguments import UnknownArgument, checks_arguments
from soli.checkpoint import load_model
from soli.engine.options import KNOWN
from soli.errors import SoliError

CALLABLES = [name for name in soli.__all__ if callable(getattr(soli, name)) and name != "SoliError"]


@pytest.mark.parametrize("name", CALLABLES)
def test_no_public_function_ignores_a_name(name):
    with pytest.raises(TypeError, match="frobnicate"):
        getattr(soli, name)(frobnicate=1)


@pytest.mark.parametrize(
    "method", ["generate", "generate_async", "stream", "stream_async", "request", "translate"]
)
def test_no_method_of_an_llm_ignores_a_name(llm, method):
    function = getattr(llm, method)
    with pytest.raises(UnknownArgument, match=f"^{method} has no argument 'max_token'; did you mean max_tokens"):
        result = function("The river", max_token=5)
        if inspect.isawaitable(result):
            result.send(None)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def llm():
    nano = soli.LLM("nano", trust_remote_code=False, tensor_parallel_size=1, revision=None)
    yield nano
    nano.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devise": "cpu"}, "soli.LLM has no argument 'devise'; did you mean device"),
        ({"max_model_len": 512}, "give limits="),
        ({"tensor_parallel_size": 2}, "does not support tensor_parallel_size=2"),
        ({"trust_remote_code": True}, "does not support trust_remote_code=True; code of a model's folder is never run"),
        ({"enforce_eager": True}, "give runner='eager'"),
        ({"max_tokens": 5}, "give it to generate"),
    ],
)
def test_arguments_of_an_llm(arguments, message):
    with pytest.raises(UnknownArgument, match=message):
        soli.LLM("nano", **arguments)


def test_names_of_other_libraries_are_translated():
    with pytest.raises(UnknownArgument, match="its name is dtype"):
        load_model("nano", torch_dtype="auto")


def test_none_is_the_default_of_every_argument_that_has_one():
    options = ("tokenizer", "device", "dtype", "limits", "runner", "progress")
    soli.LLM("nano", **dict.fromkeys(options)).close()
    assert soli.SamplingParams(temperature=None, logit_bias=None) == soli.SamplingParams()
    assert soli.count("nano", None, mtp=None, context=None) == soli.count("nano")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soli.LLM("nano", limits={"max_running": 1}), "limits of soli.LLM is {'max_running': 1}; give a soli"),
        (lambda: soli.LLM("nano", device=3), "device of soli.LLM is 3; give cpu or cuda"),
        (lambda: soli.LLM("nano", device="gpu"), "device is 'gpu'"),
        (lambda: soli.LLM("nano", dtype=torch.float32), "dtype of soli.LLM is torch.float32; give auto"),
        (lambda: soli.LLM("nano", progress=3), "progress of soli.LLM is 3"),
        (lambda: soli.LLM("nano", tokenizer="x"), "tokenizer of soli.LLM is 'x'"),
        (lambda: soli.LLM(None), "model is a NoneType: give a folder"),
        (lambda: soli.load_model(None), "name_or_folder of soli.load_model is None; give a folder"),
        (lambda: soli.load_model("nano", dtype="float32"), "dtype of soli.load_model is 'float32'; give a torch.dtype"),
        (lambda: soli.load_model("nano", device="gpu"), "device is 'gpu'; give cpu, cuda or meta"),
        (lambda: soli.load_model("nano", device="cuda:99"), "PyTorch sees"),
        (lambda: soli.save_model(None, "x"), "model of soli.save_model is None"),
        (lambda: soli.preset(None), "there is no preset None"),
    ],
)
def test_values_of_another_type_are_one_sentence(call, message):
    with pytest.raises(SoliError, match=re.escape(message)):
        call()


def test_a_device_of_torch_is_one():
    soli.LLM("nano", device=torch.device("cpu")).close()


def test_a_checked_function_keeps_its_signature_and_its_own_errors():
    @checks_arguments("add")
    def add(a: int, *, b: int = 1) -> int:
        """Adds."""
        return a + b

    assert (add(1), add(a=1, b=2), add.__doc__) == (2, 3, "Adds.")
    assert list(inspect.signature(add).parameters) == ["a", "b"]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        add(b=1)


def test_every_option_is_in_the_documents():
    page = (Path(soli.__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in KNOWN if f"`{name}`" not in page] == []
