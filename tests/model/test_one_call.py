"""All layers in one C++ call: what torch computes module by module, in every format, on every instruction set, with the
same bits in any company; and torch itself wherever the call may not answer."""

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from soli import kernels
from soli.engine.latent_cache import FEW, LatentCache
from soli.kernels import Dispatch, QuantizedExperts
from soli.kernels.torch_backend import TorchBackend
from soli.model import BackboneOutput, Transformer, one_call
from soli.model.layers import set_backend
from tests.engine.tiny import KINDS, tiny_model
from tests.kernels import weights
from tests.kernels.weights import needs_kernels
from tests.model.paged import Paged
from tests.model.quantized import quantized_model, scaled

pytestmark = needs_kernels
STEPS = (4, 1, 1, 3, 1)  # tokens read in each pass


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


def drawn_ids(B: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (B, sum(STEPS)), generator=torch.Generator().manual_seed(seed))


def read(model: Transformer, cache: Paged, ids_BT: Tensor, torchs: bool = False) -> list[BackboneOutput]:
    """Some tokens at a time, in the one call or as torch computes them."""
    at, outputs = 0, []
    with pytest.MonkeyPatch.context() as patch:
        if torchs:
            patch.setattr(one_call, "plan", lambda *_, **__: None)
        for count in STEPS:
            outputs += cache.read(model, ids_BT[:, at : at + count], range(len(ids_BT)), at)
            at += count
    return outputs


def assert_same(found: list[BackboneOutput], expected: list[BackboneOutput], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.hidden_BTD.float(), other.hidden_BTD.float(), rtol=0, atol=bound)
        for decision, plain in zip(one.routing, other.routing, strict=True):
            assert torch.equal(decision.expert_ids_TK, plain.expert_ids_TK)
            for name in ("weights_TK", "scores_TE", "biased_TE"):
                torch.testing.assert_close(getattr(decision, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
            assert (decision.groups_TG is None) == (plain.groups_TG is None)
            assert decision.groups_TG is None or torch.equal(decision.groups_TG, plain.groups_TG)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "rope_interleave": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_torch_computes_and_leaves_the_same_latents(isa, kind, changes) -> None:
    model, ids_BT = tiny_model(kind, **changes), drawn_ids(3)
    if changes:
        model = copy.deepcopy(model)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    fast, plain = Paged(model, 3, 20, 3), Paged(model, 3, 20, 3)
    assert_same(read(model, fast, ids_BT), read(model, plain, ids_BT, torchs=True), 2e-5)
    for layer, pages_PSX in plain._layers.items():
        torch.testing.assert_close(fast._layers[layer], pages_PSX, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("format", weights.FORMATS)
def test_every_format_with_float32_rows(isa, format) -> None:
    model, ids_BT = quantized_model(format, torch.float32), drawn_ids(2)
    assert_same(
        read(model, Paged(model, 2, 20, 4), ids_BT), read(model, Paged(model, 2, 20, 4), ids_BT, torchs=True), 1e-4
    )


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8", "int4"])
def test_bfloat16_rows_are_nearer_to_float32_than_torchs(isa, format) -> None:
    """Torch rounds after every product and sum, the call only before products. Of one layer, before choices differ."""
    error, ids_BT = {}, drawn_ids(3)
    wide, narrow = quantized_model(format, torch.float32), quantized_model(format, torch.bfloat16)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    for model in (wide, narrow):
        model.layers = model.layers[1:2]
    exact = read(wide, Paged(wide, 3, 20, 4), ids_BT, torchs=True)[0]
    for torchs in (False, True):
        found = read(narrow, Paged(narrow, 3, 20, 4), ids_BT, torchs)[0]
        same = (found.routing[0].expert_ids_TK == exact.routing[0].expert_ids_TK).all(dim=1)
        assert same.float().mean() > 0.5
        error[torchs] = (found.hidden_BTD.float() - exact.hidden_BTD).flatten(0, 1)[same].square().mean().sqrt()
    if weights.rounds_tokens(isa, format, torch.bfloat16):  # to 8 bits, which torch does not
        assert error[False] < 0.03
    else:
        assert error[False] < 0.01 and error[False] < 1.05 * error[True]


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_a_row_has_the_same_bits_in_any_company_and_with_any_threads(isa, dtype) -> None:
    model, ids_BT, threads = quantized_model("int8", dtype), drawn_ids(9), torch.get_num_threads()
    together: list[list[BackboneOutput]] = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            together.append(read(model, Paged(model, 9, 20, 3), ids_BT))
    finally:
        torch.set_num_threads(threads)
    for row in (0, 4, 8):
        cache = Paged(model, 9, 20, 16, seed=5)
        for number, count in enumerate(STEPS):
            at = sum(STEPS[:number])
            for t in range(count):  # one by one
                alone = cache.read(model, ids_BT[row : row + 1, at + t : at + t + 1], [row], at + t)
                for found in together:
                    for step, one in enumerate(alone):
                        other, place = found[2 * number + step], row * count + t
                        assert torch.equal(one.hidden_BTD[0, 0], other.hidden_BTD[row, t])
                        assert torch.equal(one.routing[0].weights_TK[0], other.routing[0].weights_TK[place])


def read_texts(
    model: Transformer, cut: Sequence[int], ids_BT: Tensor, rows: Sequence[int], torchs: bool = False
) -> Tensor:
    """Hidden states (B, T, D) of whole texts, read `cut` tokens of each at a time."""
    cache, found, at = Paged(model, 9, 80, 16, seed=3), [], 0
    with pytest.MonkeyPatch.context() as patch:
        if torchs:
            patch.setattr(one_call, "plan", lambda *_, **__: None)
        for count in cut:
            now = cache.begin(rows, [at] * len(rows), [count] * len(rows))
            ids_1T = ids_BT[:, at : at + count].reshape(1, -1)
            found.append(model.backbone(ids_1T, now.positions_T[None], now).hidden_BTD.view(len(rows), count, -1))
            at += count
    return torch.cat(found, dim=1)


def texts(B: int, T: int = 70) -> Tensor:
    return torch.randint(0, 97, (B, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("format", weights.FORMATS)
@pytest.mark.parametrize("cut", [(70,), (7, 1, 62)])
def test_prompts_are_what_torch_computes(isa, format, cut) -> None:
    model, ids_BT = quantized_model(format, torch.float32), texts(2)
    found, plain = (read_texts(model, cut, ids_BT, (0, 1), torchs) for torchs in (False, True))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_every_kind_of_model(isa, kind) -> None:
    model, ids_BT = tiny_model(kind), texts(3)
    found, plain = (read_texts(model, (70,), ids_BT, (0, 1, 2), torchs) for torchs in (False, True))
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-5)


def test_bfloat16_prompts_are_nearer_to_float32_than_torchs(isa) -> None:
    error, ids_BT = {}, texts(2)
    wide, narrow = quantized_model("bf16", torch.float32), quantized_model("bf16", torch.bfloat16)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    for model in (wide, narrow):
        model.layers = model.layers[:1]  # before a router may choose otherwise
    exact = read_texts(wide, (70,), ids_BT, (0, 1), torchs=True)
    for torchs in (False, True):
        error[torchs] = (read_texts(narrow, (70,), ids_BT, (0, 1), torchs).float() - exact).square().mean().sqrt()
    assert error[False] < 0.01 and error[False] < 1.05 * error[True]


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_a_prompt_has_the_same_bits_however_it_is_cut_and_in_any_company(isa, dtype, monkeypatch) -> None:
    model, ids_BT, threads = quantized_model("int8", dtype), texts(4), torch.get_num_threads()
    whole = read_texts(model, (70,), ids_BT, (0, 1, 2, 3))
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(read_texts(model, (13, 5, 52), ids_BT, (0, 1, 2, 3)), whole)
            for row in range(4):
                assert torch.equal(read_texts(model, (70,), ids_BT[row : row + 1], (row,)), whole[row : row + 1])
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(one_call, "LEAST_ROWS", 6)
    monkeypatch.setattr(one_call, "SCRATCH", 1)
    one_call._built.clear()  # calls of six rows, which cut texts anywhere
    assert torch.equal(read_texts(model, (70,), ids_BT, (0, 1, 2, 3)), whole)
    one_call._built.clear()


def test_a_prompt_reads_what_decoding_wrote_and_the_other_way_round(isa) -> None:
    model, ids_BT = tiny_model("v3"), texts(2)
    cut = (1, 3, 40, 2, 24)
    found, plain = (read_texts(model, cut, ids_BT, (0, 1), torchs) for torchs in (False, True))
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-5)


def test_a_chunk_that_leads_past_the_pages_is_refused() -> None:
    model, ids_BT = tiny_model("v3"), texts(1)[:, :9]
    now = Paged(model, 1, 20, 4).begin([0], [0], [9])

    def run(**changes: object) -> None:
        chunk = dataclasses.replace(now.chunks[0], **changes)
        model.backbone(ids_BT, now.positions_T[None], dataclasses.replace(now, chunks=[chunk]))

    run()
    slots_S = now.chunks[0].slots_S
    for wrong in (-1, 6 * 4):
        with pytest.raises(IndexError, match="does not lead to as many slots"):
            run(slots_S=torch.cat((slots_S[:-1], torch.tensor([wrong]))))
    for changes in ({"start": 1}, {"stop": 8}):
        with pytest.raises(IndexError, match="does not lead to as many slots"):
            run(**changes)
    with pytest.raises(ValueError, match=r"torch.int64 \(8,\) is no contiguous torch.int64 \(9,\)"):
        run(slots_S=slots_S[:8])


def planned(model: Transformer, tokens: int = 2, chunk: bool = False) -> bool:
    x_BTD = model.embed_tokens.weight[None, :1].expand(1, tokens, -1).contiguous()
    cache = LatentCache(100, 16, 1, 96)
    now = cache.begin([0], [0], [tokens]) if chunk else cache.begin([0] * tokens, range(tokens), [1] * tokens)
    return one_call.plan(model.layers, model.norm, model.rope, x_BTD, now.positions_T[None], now) is not None


def test_torch_answers_where_the_call_may_not() -> None:
    model = copy.deepcopy(tiny_model("v3"))
    assert planned(model, 65) and planned(model, FEW + 1, chunk=True)
    with torch.inference_mode(False), torch.enable_grad():
        assert not planned(copy.deepcopy(model))
    for way, taken in (("reference", False), ("torch", False), ("cpu", True)):
        set_backend(model, Dispatch(way))
        assert planned(model) is taken
    model.layers[1].mlp.experts.backend = TorchBackend()
    assert not planned(model)
    mixed = quantized_model("int8", torch.float32)
    experts = mixed.layers[2].mlp.experts
    last = scaled("bf16", experts.quantized.downs[0].shape, torch.Generator())
    gates, ups, downs = experts.quantized.gates, experts.quantized.ups, experts.quantized.downs
    experts.set_quantized(QuantizedExperts(gates, ups, (*downs[:-1], last)))
    assert not planned(mixed)
    masters = copy.deepcopy(tiny_model("v3"))
    masters.compute_dtype = torch.bfloat16
    x_BTD = masters.embed_tokens(torch.tensor([[3]])).bfloat16()
    now = LatentCache(1, 16, 1, 16).begin([0], [0], [1])
    assert one_call.plan(masters.layers, masters.norm, masters.rope, x_BTD, now.positions_T[None], now) is None


def test_weights_that_were_changed_replaced_or_moved_are_seen() -> None:
    model, ids_BT = copy.deepcopy(tiny_model("v3")), drawn_ids(1)

    def agree() -> None:
        assert_same(
            read(model, Paged(model, 1, 20, 4), ids_BT), read(model, Paged(model, 1, 20, 4), ids_BT, torchs=True), 2e-5
        )

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


def test_a_muted_expert_does_not_play(isa) -> None:
    model, ids_BT = tiny_model("v3"), drawn_ids(2)[:, :1]
    now, x_BTD = Paged(model, 2, 20, 4).tokens([0, 1], 0, 1), model.embed_tokens(ids_BT)
    masked_TE = torch.zeros(2, 16, dtype=torch.bool)

    def chosen() -> list[list[int]]:
        plan = one_call.plan(model.layers, model.norm, model.rope, x_BTD, now.positions_T[:, None], now, {2: masked_TE})
        assert plan is not None
        _, (first, second) = plan.run(x_BTD)
        assert first.biased_TE.isfinite().all() and torch.equal(second.biased_TE.isinf(), masked_TE)
        return second.expert_ids_TK.tolist()

    before = chosen()
    masked_TE[0, before[0][0]] = True
    after = chosen()
    assert before[0][0] not in after[0] and after[1] == before[1] and len(set(after[0])) == 3


def test_a_muted_expert_does_not_play_in_a_prompt(isa, monkeypatch) -> None:
    model, ids_BT = tiny_model("v3"), texts(1)[:, :40]
    masked_TE = torch.zeros(40, 16, dtype=torch.bool)
    masked_TE[::2, :5] = True

    def played() -> BackboneOutput:
        now = Paged(model, 1, 80, 16).begin([0], [0], [40])
        return model.backbone(ids_BT, now.positions_T[None], now, {2: masked_TE})

    found = played()
    monkeypatch.setattr(one_call, "plan", lambda *_, **__: None)
    assert_same([found], [played()], 2e-5)
    assert (found.routing[1].expert_ids_TK[::2] >= 5).all()
    assert torch.equal(found.routing[1].biased_TE.isinf(), masked_TE)


def test_what_does_not_fit_is_refused() -> None:
    model, ids_BT = tiny_model("v3"), torch.tensor([[3]])
    now = Paged(model, 1, 20, 4).tokens([0], 0, 1)

    def run(**changes: Tensor) -> None:
        model.backbone(ids_BT, now.positions_T[None], dataclasses.replace(now, **changes))

    for table, length in (([[-1]], 1), ([[99]], 1), ([[0]], 5), ([[0]], 0)):
        with pytest.raises(IndexError, match="does not lead to as many slots"):
            run(table_BM=torch.tensor(table, dtype=torch.int32), lengths_B=torch.tensor([length], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"torch.int64 \(1, 1\) is no contiguous torch.int32"):
        run(table_BM=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"torch.int32 \(1, 1\) is no contiguous torch.int32 \(0, 1\)"):
        run(lengths_B=torch.ones(0, dtype=torch.int32))
    now.cache._layers[1] = now.cache._layers[1].bfloat16()
    with pytest.raises(ValueError, match=r"torch.bfloat16 .* is no contiguous torch.float32"):
        run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", weights.FORMATS)
def test_reading_is_the_trunk_and_the_head_with_the_same_bits(isa, format, dtype) -> None:
    model, ids_BT, found = quantized_model(format, dtype), texts(3), []
    for by_hand in (False, True):
        cache = Paged(model, 3, 80, 16)
        for starts, counts, ends in (((0, 0, 0), (2, 3, 30), (1, 4, 34)), ((2, 3, 30), (1, 1, 1), (0, 2))):
            now = cache.begin(range(3), starts, counts)
            ids_T = torch.cat(
                [ids_BT[row, at : at + n] for row, (at, n) in enumerate(zip(starts, counts, strict=True))]
            )
            if by_hand:
                backbone = model.backbone(ids_T[None], now.positions_T[None], now)
                hidden_TD, routing = backbone.hidden_BTD[0], backbone.routing
                logits_NV = model.head(hidden_TD[list(ends)]).float()
            else:
                read = model.read(ids_T, now.positions_T, now, ends)
                logits_NV, hidden_TD, routing = read.logits_NV, read.hidden_TD, read.routing
            found.append((logits_NV, hidden_TD, *(layer.weights_TK for layer in routing)))
    for one, other in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, one, other)) and one[0].dtype == torch.float32


def test_reading_goes_to_torch_where_the_ends_are_not_for_the_call(monkeypatch) -> None:
    model, ids_T = copy.deepcopy(tiny_model("v3")), texts(1)[0, :3]

    def logits() -> tuple[Tensor, bool]:
        called: list[object] = []
        with monkeypatch.context() as patch:
            patch.setattr(model, "backbone", lambda *given: called.append(given) or Transformer.backbone(model, *given))
            now = Paged(model, 1, 20, 4).begin([0], [0], [3])
            return model.read(ids_T, now.positions_T, now, [2]).logits_NV, bool(called)

    whole, torchs = logits()
    assert not torchs
    model.lm_head.backend = TorchBackend()
    other, torchs = logits()
    assert torchs
    torch.testing.assert_close(whole, other, rtol=0, atol=1e-5)


def test_words_and_ends_that_do_not_exist_are_refused() -> None:
    model = tiny_model("v3")

    def run(ids: list[int], ends: list[int]) -> None:
        now = Paged(model, 1, 20, 4).begin([0], [0], [len(ids)])
        model.read(torch.tensor(ids), now.positions_T, now, ends)

    run([0, 96], [0, 1])
    for wrong in (-1, 97):
        with pytest.raises(IndexError, match="a token id is not in the vocabulary"):
            run([3, wrong], [1])
    for end in (-1, 2):
        with pytest.raises(ValueError, match="do not fit"):
            run([3, 4], [end])


def test_weights_are_looked_for_again_when_a_text_begins() -> None:
    model, ids_T = copy.deepcopy(tiny_model("v3")), texts(1)[0, :3]
    cache = Paged(model, 2, 20, 4)

    def logits(row: int, at: int) -> Tensor:
        now = cache.begin([row], [at], [1])
        return model.read(ids_T[at : at + 1], now.positions_T, now, [0]).logits_NV

    assert [cache.begin([0], [at], [count]).begins for at, count in ((0, 1), (3, 1), (3, FEW), (3, FEW + 1))] == [
        True, False, True, True,
    ]  # fmt: skip
    before, _ = logits(0, 0), logits(0, 1)
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight, False)
    assert torch.equal(logits(1, 0), 2 * before)
