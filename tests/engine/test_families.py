"""Every family in the engine, from disk and in training: what the table of families changes holds in all of them."""

from pathlib import Path

import pytest
import torch

from soli.checkpoint import load_model, save_model
from soli.engine.engine import Engine
from soli.engine.request import EngineLimits, Request
from soli.engine.runner import ModelRunner
from soli.errors import SoliError
from soli.experts.load import load_paged_model
from soli.families import FAMILIES
from soli.train.setup import prepare
from soli.train.trainer import take_step
from tests.engine.oracle import continuation
from tests.engine.test_engine import ids, run
from tests.engine.tiny import FAMILY_KINDS, tiny_model, tiny_text_model
from tests.experts.folders import SHAPE, answers
from tests.kernels.weights import needs_kernels
from tests.train.toy import MODEL, settings, write_data

CACHE_BYTES = 2**20
MIXTURES = [family for family in FAMILY_KINDS if family != "youtu"]


def test_the_list_is_that_of_the_table() -> None:
    assert [*FAMILY_KINDS] == [name for name in FAMILY_KINDS if name in FAMILIES]
    assert set(FAMILY_KINDS) == {name for name, family in FAMILIES.items() if not family.text_config}


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("runner", ["eager", pytest.param("fused", marks=needs_kernels)])
@pytest.mark.parametrize("family", FAMILY_KINDS)
def test_answers_are_those_of_whole_forward_passes(family: str, runner: str, speculate: bool) -> None:
    """With and without a cached prefix, token for token."""
    model = tiny_text_model(family)
    if speculate and not model.model.mtp:
        pytest.skip("the family has no MTP module")
    prefix = tuple(range(10, 27))
    batch = [Request((5, 6, 7), 9), *(Request((*prefix, 60 + n), 5) for n in range(3))]
    whole = [continuation(model.model, one.prompt_ids, one.max_new_tokens).ids for one in batch]
    limits = EngineLimits(cache_bytes=CACHE_BYTES, block_size=4, tokens_per_step=24, speculate=speculate)
    warm = Engine(model, limits, runner=runner)
    for request, expected in zip(batch, whole, strict=True):
        cold = Engine(model, limits, runner=runner)
        assert [*map(ids, run(cold, [request]).values())] == [expected]
        assert [*map(ids, run(warm, [request]).values())] == [expected]
    assert warm.stats().prefix_hit_tokens >= 32
    together = run(Engine(model, limits, runner=runner), batch)
    assert [ids(together[number]) for number in range(len(batch))] == whole


@needs_kernels
@pytest.mark.parametrize("family", FAMILY_KINDS)
def test_the_fused_runner_computes_it(family: str) -> None:
    model = tiny_model(family)
    assert ModelRunner(model, drafts=len(model.mtp) > 0).active.name == "fused"


@needs_kernels
@pytest.mark.parametrize("runner", ["eager", "fused"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_from_disk_give_the_same_bits(tmp_path: Path, family: str, runner: str) -> None:
    save_model(tiny_model(family, **SHAPE | {"num_hidden_layers": 3}), tmp_path / "m", "bf16")
    prompts = [Request((*range(20, 30), 40 + n), 6, logprobs=0) for n in range(2)]
    expected = answers(load_model(tmp_path / "m", quantized=True, in_place=True), prompts, runner)
    model, store = load_paged_model(tmp_path / "m", 5, poison=True)
    assert answers(model, prompts, runner) == expected
    assert store.stats.misses > 0
    store.close()


@pytest.mark.parametrize("family", FAMILY_KINDS)
def test_three_steps_of_training(tmp_path: Path, family: str) -> None:
    changes = {"num_hidden_layers": 3, **FAMILY_KINDS[family]}
    if FAMILIES[family].sparse_attention:
        with pytest.raises(SoliError, match=f"model_type is '{family}', whose sparse attention cannot be trained"):
            settings(model=changes)
        return
    train_settings = settings(model=changes, schedule={"learning_rate": 1e-2})
    toy = prepare(train_settings, {}, write_data(tmp_path / "data"), tmp_path / "run")
    before = {name: parameter.detach().clone() for name, parameter in toy.model.named_parameters()}
    steps = [take_step(toy) for _ in range(3)]
    assert steps[-1].loss < steps[0].loss < 7
    unchanged = [name for name, parameter in toy.model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged
    assert toy.model.config.model_type == family and MODEL["vocab_size"] == toy.model.config.vocab_size
