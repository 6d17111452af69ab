"""Which experts were used is remembered from run to run, and what is wrong with the file costs nothing but that."""

import json
import logging
import shutil

import numpy as np
import pytest

from soli.cli import main
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.text_model import TextModel, text_model
from soli.experts.load import load_within, usage_file_of
from soli.experts.policy import ExpertUsage
from soli.experts.store import ExpertStore
from soli.llm import LLM
from tests.engine.tiny import tiny_tokenizer
from tests.experts.folders import LAYERS, E, K, bits, fail_next_read, mixture_folder, requests
from tests.kernels.weights import needs_kernels

MEMORY = 2_000_000  # bytes: what stays, and a part of the experts


def paged(folder, memory=MEMORY) -> tuple[TextModel, Engine]:
    model, budget = load_within(folder, memory)
    together = text_model(model, tiny_tokenizer())
    together = TextModel(**{**vars(together), "budget": budget})
    return together, Engine(together, limits_for(together, 1, 100))


def answer(engine):
    return [bits(one) for one in answer_all(engine, requests((30,), 20)) if one is not None]


@needs_kernels
def test_the_experts_used_most_are_read_first_in_the_next_run(remembered) -> None:
    folder = mixture_folder("fp32")
    first, engine = paged(folder)
    expected = answer(engine)
    store = first.budget.store
    assert not store.holds_all
    cold = store.stats.misses
    first.budget.remember()
    usage = usage_file_of(folder).read()
    assert usage is not None and usage.tokens == 49
    hottest = divmod(int(usage.shares_LE.argmax()), E)

    second, engine = paged(folder)
    store = second.budget.store
    assert store.stats.misses == 0
    assert len(store._slots) == store.capacity
    assert hottest in store._slots
    assert answer(engine) == expected
    assert store.stats.misses < cold
    assert [path.name for path in remembered.iterdir()] == [usage_file_of(folder).path.name]


@needs_kernels
def test_another_models_usage_is_not_used(tmp_path, remembered) -> None:
    together, engine = paged(mixture_folder("fp32"))
    answer(engine)
    together.budget.remember()
    other = tmp_path / "other"
    shutil.copytree(mixture_folder("fp32"), other)
    assert usage_file_of(other).read() is not None  # a copy is the same model
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert usage_file_of(other).read() is None


@needs_kernels
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"format": 2, "tokens": 1, "layers": {}}',
        b'{"format": 1, "tokens": -1, "layers": {}}',
        b'{"format": 1, "tokens": true, "layers": {}}',
        b'{"format": 1, "tokens": 1, "layers": []}',
        b'{"format": 1, "tokens": 1, "layers": {"1": [1]}}',
        b'{"format": 1, "tokens": 1, "layers": {"1": ' + json.dumps([2.0] * E).encode() + b"}}",
        b'{"format": 1, "tokens": 1, "layers": {"1": ' + json.dumps(["a"] * E).encode() + b"}}",
        b"\xff\xfe",
        b"[" * 10_000,
        b" " * 5_000_000,
    ],
)
def test_a_damaged_file_is_one_line_and_written_anew(content, caplog) -> None:
    folder = mixture_folder("fp32")
    file = usage_file_of(folder)
    file.path.parent.mkdir(parents=True)
    file.path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "soli.experts.usage"):
        together, engine = paged(folder)
    [record] = caplog.records
    assert str(file.path) in record.getMessage()
    answer(engine)
    together.budget.remember()
    assert file.read() is not None


@needs_kernels
def test_a_cache_folder_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("soli.experts.usage.cache_folder", lambda: tmp_path / "file")
    with caplog.at_level(logging.WARNING, "soli.experts.usage"):
        together, engine = paged(mixture_folder("fp32"))
        answer(engine)
        together.budget.remember()
    assert "is not remembered" in caplog.records[-1].getMessage()


def test_a_layer_that_a_model_is_opened_without_stays_remembered() -> None:
    file = usage_file_of(mixture_folder("int8"))
    assert len(file.layers) == LAYERS
    file.write(ExpertUsage(7, np.full((LAYERS, E), 0.5)))
    partial = type(file)(file.path, file.layers[:-1])
    partial.write(ExpertUsage(9, np.full((LAYERS - 1, E), 0.25)))
    usage = file.read()
    assert usage is not None and usage.tokens == 9
    assert usage.shares_LE.mean(axis=1).tolist() == [0.25] * (LAYERS - 1) + [0.5]


@needs_kernels
def test_the_command_forgets(capsys, remembered) -> None:
    LLM("nano", memory="13MB").close()
    llm = LLM("nano", memory="13MB")
    llm.translate("He drank a cup of tea.")
    llm.close()
    assert len(list(remembered.iterdir())) == 1
    assert main(["experts", "forget", "nano"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert not list(remembered.iterdir())
    assert main(["experts", "forget", "nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forgotten"] is False


def test_an_expert_that_cannot_be_read_ahead_is_read_when_it_is_needed(monkeypatch) -> None:
    from soli.checkpoint import open_checkpoint
    from soli.experts.sources import sources_of

    store = ExpertStore(sources_of(open_checkpoint(mixture_folder("int8"))), K + 1)
    fail_next_read(store, monkeypatch)
    shares = np.zeros((LAYERS, E))
    shares[1, :2] = 1.0, 0.9
    store.begin_with(ExpertUsage(100, shares))
    assert len(store._slots) == 1
    assert store.weights(1, 0)[0].shape == store.weights(1, 1)[0].shape
    store.close()
