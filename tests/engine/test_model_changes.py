"""A model that is hooked, patched, trained or replaced in part between requests answers as it then is, on a CPU with a
prefix cache."""

import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import soli
from soli.engine.engine import Engine
from soli.engine.latent_cache import LatentCache
from soli.engine.model_state import Change, ModelState, modification
from soli.engine.request import EngineLimits, Request
from soli.engine.runner import EagerRunner, ModelRunner
from soli.engine.text_model import text_model
from soli.errors import SoliError
from soli.kernels import Dispatch
from soli.model import Transformer
from soli.model.layers import Linear, set_backend
from soli.model.transformer import Block
from tests.engine.test_engine import ids, run
from tests.engine.tiny import tiny_model, tiny_tokenizer
from tests.kernels.weights import needs_kernels

pytestmark = needs_kernels
PROMPT = tuple(range(20, 60))


@pytest.fixture
def model() -> Transformer:
    return copy.deepcopy(tiny_model(vocab_size=330, max_position_embeddings=96))


@pytest.fixture
def llm(model: Transformer) -> Iterator[soli.LLM]:
    llm = soli.LLM(model, tokenizer=tiny_tokenizer(), limits=EngineLimits(cache_bytes=2**20, block_size=4))
    yield llm
    llm.close()


def answer(llm: soli.LLM) -> tuple[int, ...]:
    """The same prompt twice: its prefix is found in the cache, and changes nothing."""
    answers = [llm.generate([PROMPT], max_new_tokens=8)[0] for _ in range(2)]
    assert answers[1].usage.cached == 36
    assert answers[0].ids == answers[1].ids
    return answers[0].ids


def fresh_answer(model: Transformer) -> tuple[int, ...]:
    """What a new eager engine says, which has seen nothing before."""
    engine = Engine(text_model(model, tiny_tokenizer()), EngineLimits(cache_bytes=2**20), runner="eager")
    [events] = run(engine, [Request(PROMPT, 8, stop_ids=frozenset({1}))]).values()
    return ids(events)


def runner_name(llm: soli.LLM) -> str:
    return llm.engine.worker.engine._runner.active.name


@torch.no_grad()
def step(model: Transformer) -> None:
    """As an optimizer writes: in place, every parameter."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std(), alpha=0.5)


def use_optimizer(model: Transformer) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([PROMPT])).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def replace_parameter(model: Transformer) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).contiguous())


def replace_data(model: Transformer) -> None:
    model.lm_head.weight.data = model.lm_head.weight.detach().flip(0).contiguous()


def replace_layer(model: Transformer) -> None:
    model.layers[1] = model.layers[2]


def load_state(model: Transformer) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    model.load_state_dict(state)


def move_bias(model: Transformer) -> None:
    bias = model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(bias.flip(0) * 5)


CHANGES = [step, use_optimizer, replace_parameter, replace_data, replace_layer, load_state, move_bias]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_changes_the_next_answer(llm, model, change: Callable[[Transformer], None]) -> None:
    before = answer(llm)
    assert before == fresh_answer(model)
    change(model)
    after = answer(llm)
    assert after == fresh_answer(model)
    assert after != before or change is move_bias
    assert runner_name(llm) == "fused"


def test_a_change_while_others_run_leaves_no_stale_prefix(model) -> None:
    engine = Engine(text_model(model, tiny_tokenizer()), EngineLimits(cache_bytes=2**20, block_size=4))
    engine.add(Request(PROMPT, 40))
    for _ in range(3):
        engine.step()
    step(model)
    second = engine.add(Request(PROMPT, 8))  # while the first one continues, on latents of both
    events = []
    while engine.has_work:
        events += [event for event in engine.step() if event.request_id == second]
    assert events[-1].usage.cached == 0
    again = run(engine, [Request(PROMPT, 8)])
    assert again[2][-1].usage.cached == 36
    assert ids(events) == ids(again[2]) == fresh_answer(model)


@pytest.mark.parametrize("path", ["", "embed_tokens", "layers.1", "layers.2.self_attn.kv_b_proj", "layers.1.mlp.gate"])
def test_hooks_fire_and_the_fused_runner_is_back_when_they_are_gone(llm, model, path: str, caplog) -> None:
    before = answer(llm)
    module, calls = model.get_submodule(path), []
    with caplog.at_level(logging.INFO, "soli.engine"):
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        assert answer(llm) == before and runner_name(llm) == "eager"
        handle.remove()
        calls_with_hook = len(calls)
        assert answer(llm) == before and runner_name(llm) == "fused"
    assert len(calls) == calls_with_hook
    # The engine calls the parts of a model, not the model: its own forward has no cache.
    assert (calls_with_hook >= 16) == (path != "")
    name = path or "the model itself"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"the eager runner computes this model, module by module: {name} has a forward hook"),
        ("INFO", "the fused runner computes this model, in C++: its modules are unmodified"),
    ]


def test_a_hook_that_changes_the_output_changes_the_answer_and_another_hook_again(llm, model) -> None:
    before = answer(llm)
    handle = model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 3, *args[1:]))
    hooked = answer(llm)
    assert hooked == fresh_answer(model) != before
    handle.remove()
    handle = model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * -1, *args[1:]))
    assert answer(llm) == fresh_answer(model) not in (before, hooked)
    handle.remove()
    assert answer(llm) == before


def test_global_hooks_fire(llm) -> None:
    before, calls = answer(llm), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        assert answer(llm) == before and len(calls) > 100
    finally:
        handle.remove()
    assert answer(llm) == before and runner_name(llm) == "fused"


@pytest.mark.parametrize("path", ["layers.1", "layers.2.mlp", "layers.1.self_attn.kv_b_proj", "norm"])
def test_a_patched_forward_takes_effect(llm, model, path: str) -> None:
    before = answer(llm)
    module = model.get_submodule(path)
    plain = module.forward

    def patched(x: torch.Tensor, *args: object) -> object:
        output = plain(x, *args)
        return (output[0].flip(-1), *output[1:]) if isinstance(output, tuple) else output.flip(-1)

    module.forward = patched
    assert modification(model) == f"{path} has its own forward()"
    assert answer(llm) == fresh_answer(model) != before
    del module.forward
    assert answer(llm) == before and runner_name(llm) == "fused"


def test_a_forward_that_is_equal_in_inference_leaves_the_fused_runner(llm, model) -> None:
    """As recomputed and compiled blocks are, which training samples with."""
    before, plain = answer(llm), model.layers[1].forward
    model.layers[1].forward = lambda *args: plain(*args)
    model.layers[1].forward.equal_in_inference = True
    assert answer(llm) == before and runner_name(llm) == "fused"


def test_a_patched_class_takes_effect(llm, model, monkeypatch) -> None:
    before, plain = answer(llm), Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x_BTD, *args: plain(self, -x_BTD, *args))
    assert answer(llm) == fresh_answer(model) != before
    assert modification(model) == "a method of Block was replaced"
    monkeypatch.undo()
    assert answer(llm) == before


class Adapter(nn.Module):
    """A sub-layer that no C++ knows: a low-rank addition to a block's output."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.down, self.up = nn.Linear(32, 4), nn.Linear(4, 32)
        nn.init.normal_(self.up.weight)
        nn.init.normal_(self.down.weight)

    def forward(self, x_BTD: torch.Tensor, *args: object) -> tuple[torch.Tensor, object]:
        y_BTD, routing = self.block(x_BTD, *args)
        return y_BTD + self.up(self.down(x_BTD)), routing


def test_a_new_sub_layer_works_eagerly(model) -> None:
    before = fresh_answer(model)
    model.layers[1] = Adapter(model.layers[1])
    llm = soli.LLM(model, tokenizer=tiny_tokenizer(), limits=EngineLimits(cache_bytes=2**20, block_size=4))
    assert answer(llm) == fresh_answer(model) != before
    assert runner_name(llm) == "eager"
    assert modification(model) == "layers.1 is of the class Adapter, which is not one of soli.model"
    llm.close()


class LowRank(Linear):
    """A subclass with a weight that the absorbed form of attention does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - super().forward(x.flip(-1))


def test_a_subclassed_up_projection_works_with_a_cache(model) -> None:
    old = model.layers[1].self_attn.kv_b_proj
    new = LowRank(old.in_features, old.out_features, None, torch.float32)
    new.weight = old.weight
    model.layers[1].self_attn.kv_b_proj = new
    hidden = []
    for cut in ((12,), (5, 1, 1, 5)):
        cache, parts, at = LatentCache.whole_rows([12]), [], 0
        for count in cut:
            step = cache.step([0], [at], [count])
            with torch.inference_mode():
                output = EagerRunner(model).forward(torch.arange(at, at + count), step.positions_T, step, [])
            parts.append(output.hidden_TD)
            at += count
        hidden.append(torch.cat(parts))
    with torch.inference_mode():
        whole = model.backbone(torch.arange(12)[None]).hidden_BTD[0]
    for one in hidden:
        torch.testing.assert_close(one, whole, rtol=0, atol=1e-4)


class Tagged(torch.Tensor):
    """A tensor of a subclass, as sharded parameters are."""


def test_a_subclassed_parameter_is_named(model) -> None:
    model.norm.weight = nn.Parameter(torch.ones(32).as_subclass(Tagged), False)
    assert modification(model) == "norm has a Tagged as its weight"
    assert ModelRunner(model).active.name == "eager"


def test_a_fused_runner_that_cannot_be_had_is_an_error_by_name(model) -> None:
    handle = model.layers[2].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(SoliError, match=r"the fused runner cannot be had: layers\.2\.mlp has a forward hook"):
        soli.LLM(model, tokenizer=tiny_tokenizer(), runner="fused")
    handle.remove()
    llm = soli.LLM(model, tokenizer=tiny_tokenizer(), runner="fused")
    assert llm.generate([PROMPT], max_new_tokens=2)
    handle = model.layers[2].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(SoliError, match=r"layers\.2\.mlp has a forward hook"):
        llm.generate([PROMPT], max_new_tokens=2)
    handle.remove()
    assert llm.generate([PROMPT], max_new_tokens=2)
    llm.close()
    set_backend(model, Dispatch("torch"))
    with pytest.raises(SoliError, match="cannot be had: SOLI_KERNELS is torch"):
        ModelRunner(model, "fused")


def test_a_model_that_moves_needs_a_new_engine(model) -> None:
    chosen = ModelRunner(model)
    model.bfloat16()
    with pytest.raises(SoliError, match=r"was on cpu in torch.float32 and is on cpu in torch.bfloat16"):
        chosen.update()


def test_what_a_model_needs_beside_itself_is_said(model) -> None:
    with pytest.raises(SoliError, match="a Transformer needs its tokenizer"):
        soli.LLM(model)
    with pytest.raises(SoliError, match="a folder has its own tokenizer"):
        soli.LLM("nano", tokenizer=tiny_tokenizer())
    with pytest.raises(SoliError, match="runner is 'fast': choose auto, eager or fused"):
        soli.LLM(model, tokenizer=tiny_tokenizer(), runner="fast")


def test_an_unchanged_model_is_seen_as_unchanged(model) -> None:
    state = ModelState(model)
    with torch.inference_mode():
        model.backbone(torch.tensor([PROMPT]))
    assert state.change() is Change.NONE
    step(model)
    assert state.change() is Change.VALUES
    state.accept_values()
    assert state.change() is Change.NONE
