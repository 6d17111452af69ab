"""The fused runner: what the eager runner computes module by module, in every format, on every instruction set, batch-
invariant; and the eager runner wherever C++ cannot compute the model."""

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from soli import kernels
from soli.engine import scratch
from soli.engine.latent_cache import MAX_ABSORBED_TOKENS, LatentCache
from soli.engine.layer_table import Unsupported
from soli.engine.runner import EagerRunner, FusedRunner, ModelRunner, Runner
from soli.kernels import Dispatch, QuantizedExperts
from soli.kernels.torch_backend import TorchBackend
from soli.model import BackboneOutput, Transformer
from soli.model.layers import set_backend
from tests.engine.quantized import quantized_model, scaled
from tests.engine.shuffled_cache import ShuffledCache
from tests.engine.tiny import KINDS, tiny_model
from tests.kernels import weights
from tests.kernels.weights import needs_kernels

pytestmark = needs_kernels
STEPS = (4, 1, 1, 3, 1)  # tokens of each step


@pytest.fixture(params=weights.isas())
def isa(request, monkeypatch):
    """Each instruction set, in the backend of every model that is made in the test."""
    backend = Dispatch(isa=request.param)
    monkeypatch.setattr(kernels, "default_backend", lambda: backend)
    tiny_model.cache_clear()
    yield request.param
    tiny_model.cache_clear()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def random_ids(B: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (B, sum(STEPS)), generator=torch.Generator().manual_seed(seed))


def runner_of(model: Transformer, eager: bool = False) -> Runner:
    return EagerRunner(model) if eager else FusedRunner(model, drafts=len(model.mtp) > 0)


def read(model: Transformer, cache: ShuffledCache, ids_BT: Tensor, eager: bool = False) -> list[BackboneOutput]:
    """A few tokens in each step, by the fused runner or the eager one."""
    at, outputs, runner = 0, [], runner_of(model, eager)
    for count in STEPS:
        outputs += cache.read(runner, ids_BT[:, at : at + count], range(len(ids_BT)), at)
        at += count
    return outputs


def assert_same(outputs: list[BackboneOutput], expected: list[BackboneOutput], bound: float) -> None:
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one.hidden_BTD.float(), other.hidden_BTD.float(), rtol=0, atol=bound)
        for decision, plain in zip(one.routing, other.routing, strict=True):
            assert torch.equal(decision.expert_ids_TK, plain.expert_ids_TK)
            for name in ("weights_TK", "scores_TE", "biased_TE"):
                torch.testing.assert_close(getattr(decision, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
            assert (decision.groups_TG is None) == (plain.groups_TG is None)
            assert decision.groups_TG is None or torch.equal(decision.groups_TG, plain.groups_TG)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "rope_interleave": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_eager_runner_and_leaves_the_same_latents(isa, kind, changes) -> None:
    model, ids_BT = tiny_model(kind, **changes), random_ids(3)
    if changes:
        model = copy.deepcopy(model)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    fast, plain = ShuffledCache(model, 3, 20, 3), ShuffledCache(model, 3, 20, 3)
    assert_same(read(model, fast, ids_BT), read(model, plain, ids_BT, eager=True), 2e-5)
    for layer, kv_PSX in plain._layers.items():
        torch.testing.assert_close(fast._layers[layer], kv_PSX, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("format", weights.FORMATS)
@pytest.mark.parametrize("kind", ["v3", "v3.2"])
def test_every_format_with_float32_hidden_states(isa, format, kind) -> None:
    model, ids_BT = quantized_model(format, torch.float32, kind=kind), random_ids(2)
    fused, plain = (read(model, ShuffledCache(model, 2, 20, 4), ids_BT, eager) for eager in (False, True))
    assert_same(fused, plain, 1e-4)


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "int4"])
def test_bfloat16_is_nearer_to_float32_than_the_eager_runner(isa, format) -> None:
    """Torch rounds after every product and sum, C++ only before products. One layer, before selections differ."""
    error, ids_BT = {}, random_ids(3)
    high, low = quantized_model(format, torch.float32), quantized_model(format, torch.bfloat16)
    high.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    for model in (high, low):
        model.layers = model.layers[1:2]
    exact = read(high, ShuffledCache(high, 3, 20, 4), ids_BT, eager=True)[0]
    for eager in (False, True):
        output = read(low, ShuffledCache(low, 3, 20, 4), ids_BT, eager)[0]
        same = (output.routing[0].expert_ids_TK == exact.routing[0].expert_ids_TK).all(dim=1)
        assert same.float().mean() > 0.5
        error[eager] = (output.hidden_BTD.float() - exact.hidden_BTD).flatten(0, 1)[same].square().mean().sqrt()
    if weights.rounds_tokens(isa, format, torch.bfloat16):  # to 8 bits, which torch does not
        assert error[False] < 0.03
    else:
        assert error[False] < 0.01 and error[False] < 1.05 * error[True]


@pytest.mark.parametrize("dtype", weights.DTYPES)
@pytest.mark.parametrize("kind", ["v3", "glm with shared indexers"])
def test_decode_tokens_are_batch_invariant_with_any_number_of_threads(isa, dtype, kind) -> None:
    model, ids_BT, threads = quantized_model("int8", dtype, kind=kind), random_ids(9), torch.get_num_threads()
    together: list[list[BackboneOutput]] = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            together.append(read(model, ShuffledCache(model, 9, 20, 3), ids_BT))
    finally:
        torch.set_num_threads(threads)
    for row in (0, 4, 8):
        cache = ShuffledCache(model, 9, 20, 16, seed=5)
        for number, count in enumerate(STEPS):
            at = sum(STEPS[:number])
            for t in range(count):  # one by one
                alone = cache.read(runner_of(model), ids_BT[row : row + 1, at + t : at + t + 1], [row], at + t)
                for outputs in together:
                    for step, one in enumerate(alone):
                        other, place = outputs[2 * number + step], row * count + t
                        assert torch.equal(one.hidden_BTD[0, 0], other.hidden_BTD[row, t])
                        assert torch.equal(one.routing[0].weights_TK[0], other.routing[0].weights_TK[place])


def read_texts(
    model: Transformer, cut: Sequence[int], ids_BT: Tensor, rows: Sequence[int], eager: bool = False
) -> Tensor:
    """Hidden states (B, T, D) of whole texts, computed in steps of `cut` tokens each."""
    cache, parts, at, runner = ShuffledCache(model, 9, 80, 16, seed=3), [], 0, runner_of(model, eager)
    for count in cut:
        step = cache.step(rows, [at] * len(rows), [count] * len(rows))
        ids_T = ids_BT[:, at : at + count].flatten().contiguous()
        parts.append(runner.forward(ids_T, step.positions_T, step, []).hidden_TD.view(len(rows), count, -1))
        at += count
    return torch.cat(parts, dim=1)


def texts(B: int, T: int = 70) -> Tensor:
    return torch.randint(0, 97, (B, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("format", weights.FORMATS)
@pytest.mark.parametrize("cut", [(70,), (7, 1, 62)])
def test_prompts_equal_those_of_the_eager_runner(isa, format, cut) -> None:
    model, ids_BT = quantized_model(format, torch.float32), texts(2)
    fused, plain = (read_texts(model, cut, ids_BT, (0, 1), eager) for eager in (False, True))
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_every_kind_of_model(isa, kind) -> None:
    model, ids_BT = tiny_model(kind), texts(3)
    fused, plain = (read_texts(model, (70,), ids_BT, (0, 1, 2), eager) for eager in (False, True))
    torch.testing.assert_close(fused, plain, rtol=0, atol=2e-5)


def test_bfloat16_prompts_are_nearer_to_float32_than_those_of_the_eager_runner(isa) -> None:
    error, ids_BT = {}, texts(2)
    high, low = quantized_model("bf16", torch.float32), quantized_model("bf16", torch.bfloat16)
    high.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    for model in (high, low):
        model.layers = model.layers[:1]  # before a router may choose otherwise
    exact = read_texts(high, (70,), ids_BT, (0, 1), eager=True)
    for eager in (False, True):
        error[eager] = (read_texts(low, (70,), ids_BT, (0, 1), eager).float() - exact).square().mean().sqrt()
    assert error[False] < 0.01 and error[False] < 1.05 * error[True]


@pytest.mark.parametrize("dtype", weights.DTYPES)
@pytest.mark.parametrize("kind", ["v3", "glm with shared indexers"])
def test_prompts_are_batch_invariant_and_invariant_to_chunks(isa, dtype, kind, monkeypatch) -> None:
    model, ids_BT, threads = quantized_model("int8", dtype, kind=kind), texts(4), torch.get_num_threads()
    whole = read_texts(model, (70,), ids_BT, (0, 1, 2, 3))
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(read_texts(model, (13, 5, 52), ids_BT, (0, 1, 2, 3)), whole)
            for row in range(4):
                assert torch.equal(read_texts(model, (70,), ids_BT[row : row + 1], (row,)), whole[row : row + 1])
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(scratch, "MIN_TOKENS", 6)
    monkeypatch.setattr(scratch, "SCRATCH", 1)  # calls of six tokens, which cut texts anywhere
    assert torch.equal(read_texts(model, (70,), ids_BT, (0, 1, 2, 3)), whole)


def test_a_prompt_attends_to_what_decoding_wrote_and_the_reverse(isa) -> None:
    model, ids_BT = tiny_model("v3"), texts(2)
    cut = (1, 3, 40, 2, 24)
    fused, plain = (read_texts(model, cut, ids_BT, (0, 1), eager) for eager in (False, True))
    torch.testing.assert_close(fused, plain, rtol=0, atol=2e-5)


def test_a_chunk_that_leads_past_the_blocks_is_rejected() -> None:
    model, ids_BT = tiny_model("v3"), texts(1)[:, :9]
    step, runner = ShuffledCache(model, 1, 20, 4).step([0], [0], [9]), FusedRunner(model)

    def run(**changes: object) -> None:
        chunk = dataclasses.replace(step.chunks[0], **changes)
        runner.forward(ids_BT[0], step.positions_T, dataclasses.replace(step, chunks=[chunk]), [])

    run()
    slots_S = step.chunks[0].slots_S
    for wrong in (-1, 6 * 4):
        with pytest.raises(IndexError, match="does not lead to as many slots"):
            run(slots_S=torch.cat((slots_S[:-1], torch.tensor([wrong]))))
    for changes in ({"start": 1}, {"stop": 8}):
        with pytest.raises(IndexError, match="does not lead to as many slots"):
            run(**changes)
    with pytest.raises(ValueError, match=r"torch.int64 \(8,\) is no contiguous torch.int64 \(9,\)"):
        run(slots_S=slots_S[:8])


@pytest.mark.parametrize("chunk", [False, True])
def test_a_step_may_have_more_tokens_than_fit_into_a_call(chunk: bool, monkeypatch) -> None:
    model, tokens, hidden = tiny_model("v3"), MAX_ABSORBED_TOKENS + 1 if chunk else 65, []
    for runner in (EagerRunner(model), FusedRunner(model)):
        cache = LatentCache.whole_rows([96])  # blocks of its own: threads write in any order
        step = cache.step([0], [0], [tokens]) if chunk else cache.step([0] * tokens, range(tokens), [1] * tokens)
        hidden.append(runner.forward(torch.arange(tokens), step.positions_T, step, [0]).hidden_TD)
    torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=2e-5)


def test_what_the_fused_runner_cannot_compute_is_named() -> None:
    model = copy.deepcopy(tiny_model("v3"))
    for backend in ("reference", "torch"):
        set_backend(model, Dispatch(backend))
        with pytest.raises(Unsupported, match=f"SOLI_KERNELS is {backend}"):
            FusedRunner(model)
    set_backend(model, Dispatch("cpu"))
    FusedRunner(model)
    model.layers[1].mlp.experts.backend = TorchBackend()
    with pytest.raises(Unsupported, match=r"^layers\.1\.mlp\.experts computes with TorchBackend"):
        FusedRunner(model)
    mixed = quantized_model("int8", torch.float32)
    experts = mixed.layers[2].mlp.experts
    last = scaled("bf16", experts.quantized.downs[0].shape, torch.Generator())
    gates, ups, downs = experts.quantized.gates, experts.quantized.ups, experts.quantized.downs
    experts.set_quantized(QuantizedExperts(gates, ups, (*downs[:-1], last)))
    with pytest.raises(Unsupported, match=r"^layers\.2\.mlp\.experts has experts of different formats"):
        FusedRunner(mixed)
    masters = copy.deepcopy(tiny_model("v3"))
    masters.compute_dtype = torch.bfloat16
    with pytest.raises(Unsupported, match=r"a weight of torch.float32 beside hidden states of torch.bfloat16"):
        FusedRunner(masters)


def test_weights_that_were_changed_replaced_or_moved_are_seen() -> None:
    model, ids_BT = copy.deepcopy(tiny_model("v3")), random_ids(1)

    chosen = ModelRunner(model, drafts=True)

    def agree() -> None:
        assert chosen.update() and chosen.active.name == "fused"
        caches, outputs = [ShuffledCache(model, 1, 20, 4) for _ in range(2)], []
        for cache, runner in zip(caches, (chosen.active, EagerRunner(model)), strict=True):
            outputs.append(cache.read(runner, ids_BT[:, :4], [0], 0) + cache.read(runner, ids_BT[:, 4:5], [0], 4))
        assert_same(*outputs, 2e-5)

    agree()
    attention, moe = model.layers[1].self_attn, model.layers[2].mlp
    attention.kv_b_proj.weight.mul_(1.5)
    agree()
    attention.kv_b_proj.weight = torch.nn.Parameter(attention.kv_b_proj.weight.flip(0).contiguous(), False)
    agree()
    attention.o_proj.weight.data = attention.o_proj.weight * 0.5
    agree()
    moe.gate.e_score_correction_bias = moe.gate.e_score_correction_bias.flip(0).contiguous()
    attention.scale *= 2
    agree()
    attention.kv_b_proj.set_quantized(scaled("fp8", attention.kv_b_proj.weight.shape, torch.Generator().manual_seed(1)))
    agree()


def test_a_masked_expert_is_not_selected(isa) -> None:
    model, ids_BT = tiny_model("v3"), random_ids(2)[:, :1]
    step, runner = ShuffledCache(model, 2, 20, 4).tokens([0, 1], 0, 1), FusedRunner(model)
    masked_TE = torch.zeros(2, 16, dtype=torch.bool)

    def chosen() -> list[list[int]]:
        output = runner.forward(ids_BT.flatten().contiguous(), step.positions_T, step, [], {2: masked_TE})
        first, second = output.routing
        assert first.biased_TE.isfinite().all() and torch.equal(second.biased_TE.isinf(), masked_TE)
        return second.expert_ids_TK.tolist()

    before = chosen()
    masked_TE[0, before[0][0]] = True
    after = chosen()
    assert before[0][0] not in after[0] and after[1] == before[1] and len(set(after[0])) == 3


def test_a_masked_expert_is_not_selected_in_a_prompt(isa) -> None:
    model, ids_BT = tiny_model("v3"), texts(1)[:, :40]
    masked_TE = torch.zeros(40, 16, dtype=torch.bool)
    masked_TE[::2, :5] = True

    def output(runner: Runner) -> BackboneOutput:
        step = ShuffledCache(model, 1, 80, 16).step([0], [0], [40])
        forward = runner.forward(ids_BT[0], step.positions_T, step, [], {2: masked_TE})
        return BackboneOutput(forward.hidden_TD, forward.routing)

    fused = output(FusedRunner(model))
    assert_same([fused], [output(EagerRunner(model))], 2e-5)
    assert (fused.routing[1].expert_ids_TK[::2] >= 5).all()
    assert torch.equal(fused.routing[1].biased_TE.isinf(), masked_TE)


def test_what_does_not_fit_is_rejected() -> None:
    model, ids_BT = tiny_model("v3"), torch.tensor([[3]])
    step, runner = ShuffledCache(model, 1, 20, 4).tokens([0], 0, 1), FusedRunner(model)

    def run(**changes: Tensor) -> None:
        runner.forward(ids_BT[0], step.positions_T, dataclasses.replace(step, **changes), [])

    for table, length in (([[-1]], 1), ([[99]], 1), ([[0]], 5), ([[0]], 0)):
        with pytest.raises(IndexError, match="does not lead to as many slots"):
            run(table_BM=torch.tensor(table, dtype=torch.int32), lengths_B=torch.tensor([length], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"torch.int64 \(1, 1\) is no contiguous torch.int32"):
        run(table_BM=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"torch.int32 \(1, 1\) is no contiguous torch.int32 \(0, 1\)"):
        run(lengths_B=torch.ones(0, dtype=torch.int32))
    step.cache._layers[1, "latent"] = step.cache._layers[1, "latent"].bfloat16()
    with pytest.raises(ValueError, match=r"torch.bfloat16 .* is no contiguous torch.float32"):
        run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", weights.FORMATS)
def test_embedding_and_head_in_the_call_have_the_bits_of_those_in_torch(isa, format, dtype) -> None:
    model, ids_BT, outputs = quantized_model(format, dtype), texts(3), []
    if (format, dtype) == ("fp32", torch.bfloat16):
        with pytest.raises(Unsupported, match=r"a weight of torch\.float32"):
            FusedRunner(model)
        return
    runner = FusedRunner(model)
    for apart in (False, True):
        if apart:
            runner._embedding_and_head = None
        cache = ShuffledCache(model, 3, 80, 16)
        for starts, counts, ends in (((0, 0, 0), (2, 3, 30), (1, 4, 34)), ((2, 3, 30), (1, 1, 1), (0, 2))):
            step = cache.step(range(3), starts, counts)
            ids_T = torch.cat(
                [ids_BT[row, at : at + n] for row, (at, n) in enumerate(zip(starts, counts, strict=True))]
            )
            output = runner.forward(ids_T, step.positions_T, step, ends)
            outputs.append((output.logits_NV, output.hidden_TD, *(layer.weights_TK for layer in output.routing)))
    for one, other in zip(outputs[:2], outputs[2:], strict=True):
        assert all(map(torch.equal, one, other)) and one[0].dtype == torch.float32


def test_a_head_that_is_not_for_the_call_goes_to_torch() -> None:
    model, ids_T = copy.deepcopy(tiny_model("v3")), texts(1)[0, :3]

    def logits() -> tuple[Tensor, bool]:
        runner, step = FusedRunner(model), ShuffledCache(model, 1, 20, 4).step([0], [0], [3])
        return runner.forward(ids_T, step.positions_T, step, [2]).logits_NV, runner._embedding_and_head is None

    whole, apart = logits()
    assert not apart
    model.lm_head.backend = TorchBackend()
    other, apart = logits()
    assert apart
    torch.testing.assert_close(whole, other, rtol=0, atol=1e-5)


def test_token_ids_and_logit_indices_that_do_not_exist_are_rejected() -> None:
    model = tiny_model("v3")
    runner = FusedRunner(model)

    def run(ids: list[int], logit_indices: list[int]) -> None:
        step = ShuffledCache(model, 1, 20, 4).step([0], [0], [len(ids)])
        runner.forward(torch.tensor(ids), step.positions_T, step, logit_indices)

    run([0, 96], [0, 1])
    for wrong in (-1, 97):
        with pytest.raises(IndexError, match="a token id is not in the vocabulary"):
            run([3, wrong], [1])
    for index in (-1, 2):
        with pytest.raises(ValueError, match="do not fit"):
            run([3, 4], [index])
