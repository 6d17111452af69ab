"""Attention over latents in blocks against float64, on every instruction set; the same bits wherever the blocks are."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soli.kernels import Dispatch, cpu
from soli.kernels.cpu.native import DTYPES, ISAS, library
from soli.kernels.reference import REFERENCE
from tests.kernels import weights
from tests.kernels.weights import needs_kernels

#: |y - exact| <= BOUND * the largest latent: shares sum to one. float32: sums and exponentials; bfloat16: the result's
#: one rounding, queries and latents being taken as they are.
BOUND = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8 + 1e-5}


@pytest.fixture(params=weights.isas())
def isa(request):
    """The number of each instruction set."""
    return ISAS.index(request.param)


def in_blocks(rows: list[Tensor], S: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (L, X) of each row in blocks of S slots in any order, between blocks of NaN and with NaN after their
    ends; the table has blocks that do not exist where a row needs none."""
    needed = [-(-len(row) // S) for row in rows]
    P, X = 2 * sum(needed) + 1, rows[0].shape[1]
    blocks_PSX = torch.full((P, S, X), float("nan"), dtype=rows[0].dtype)
    table_BM = torch.full((len(rows), max(needed) + 1), -7, dtype=torch.int32)
    order = torch.randperm(P, generator=generator).tolist()
    for row, table_M, count in zip(rows, table_BM, needed, strict=True):
        for m in range(count):
            part = row[m * S : (m + 1) * S]
            block = order.pop()
            blocks_PSX[block, : len(part)] = part
            table_M[m] = block
    return blocks_PSX, table_BM, torch.tensor([len(row) for row in rows], dtype=torch.int32)


def into_poison(
    isa: int, q_BHX: Tensor, blocks: tuple[Tensor, Tensor, Tensor], C: int, scale: float, threads: int = 1
) -> Tensor:
    """The C++ entry into memory full of NaN; what surrounds the result must stay as it was."""
    B, H, X = q_BHX.shape
    blocks_PSX, table_BM, lengths_B = blocks
    margin = 64
    space = torch.full((B * H * C + 2 * margin,), float("nan"), dtype=q_BHX.dtype)
    code = library().latent_decode(
        isa, DTYPES[q_BHX.dtype], B, H, X, C, q_BHX.data_ptr(), blocks_PSX.data_ptr(),
        *blocks_PSX.shape[:2], table_BM.data_ptr(), table_BM.shape[1], lengths_B.data_ptr(), scale,
        space[margin:].data_ptr(), threads,
    )  # fmt: skip
    assert code == 0 and space[:margin].isnan().all() and space[-margin:].isnan().all()
    return space[margin:-margin].view(B, H, C)


def exact(q_HX: Tensor, row_LX: Tensor, C: int, scale: float) -> Tensor:
    row_LX = row_LX.double()
    return (q_HX.double() @ row_LX.T * scale).softmax(dim=-1) @ row_LX[:, :C]


@needs_kernels
@settings(weights.SETTINGS, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4), H=st.integers(1, 21), C=st.integers(1, 150),
    R=st.integers(0, 40), S=st.sampled_from((1, 3, 16, 400)), bf16=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_is_the_attention_within_the_bound(isa, lengths, H, C, R, S, bf16, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if bf16 else torch.float32
    rows = [torch.randn(length, C + R, generator=generator).to(dtype) for length in lengths]
    q_BHX, scale = torch.randn(len(rows), H, C + R, generator=generator).to(dtype), 2.0 * (C + R) ** -0.5
    y_BHC = into_poison(isa, q_BHX, in_blocks(rows, S, generator), C, scale)
    for q_HX, row_LX, y_HC in zip(q_BHX, rows, y_BHC, strict=True):
        error = (y_HC.double() - exact(q_HX, row_LX, C, scale)).abs().max()
        assert error <= BOUND[dtype] * row_LX[:, :C].double().abs().max()
        alone = cpu.latent_decode(isa, q_HX[None], *in_blocks([row_LX], 7, generator), latent=C, scale=scale)
        assert torch.equal(alone[0], y_HC)


@needs_kernels
@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_long_rows_have_the_same_bits_with_any_number_of_threads(isa, dtype) -> None:
    """From nine chunks on they are summed two by two; a first latent with nearly all attention shrinks later ones."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(length, 40, generator=generator).to(dtype) for length in (1024, 1025, 2100, 5)]
    q_BHX = torch.randn(4, 19, 40, generator=generator).to(dtype)
    rows[2][0] = 6 * q_BHX[2, 0] / q_BHX[2, 0].float().norm()
    blocks = in_blocks(rows, 16, generator)
    results = [into_poison(isa, q_BHX, blocks, 32, 0.9, threads) for threads in (1, 2, 3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for q_HX, row_LX, y_HC in zip(q_BHX, rows, results[0], strict=True):
        error = (y_HC.double() - exact(q_HX, row_LX, 32, 0.9)).abs().max()
        assert error <= BOUND[dtype] * row_LX.double().abs().max()


@needs_kernels
def test_the_plain_torch_reference_agrees_and_the_dispatch_goes_to_cpp(isa, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(length, 24, generator=generator) for length in (1, 17, 40)]
    blocks = in_blocks(rows, 16, generator)
    q_BHX = torch.randn(3, 4, 24, generator=generator)
    plain = REFERENCE.latent_decode(q_BHX, *blocks, latent=16, scale=0.3)
    torch.testing.assert_close(cpu.latent_decode(isa, q_BHX, *blocks, latent=16, scale=0.3), plain)
    monkeypatch.setattr(cpu, "latent_decode", lambda *_, **__: "C++")
    assert Dispatch().latent_decode(q_BHX, *blocks, latent=16, scale=0.3) == "C++"
    with_gradient = Dispatch().latent_decode(q_BHX.requires_grad_(), *blocks, latent=16, scale=0.3)
    torch.testing.assert_close(with_gradient.detach(), plain)


@needs_kernels
def test_nan_in_a_latent_stays_with_that_row_and_no_rows_give_no_rows(isa) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(50, 24, generator=generator) for _ in range(3)]
    rows[1][49, 3] = float("nan")
    q_BHX = torch.randn(3, 4, 24, generator=generator)
    blocks = in_blocks(rows, 16, generator)
    y_BHC = cpu.latent_decode(isa, q_BHX, *blocks, latent=16, scale=0.3)
    assert y_BHC[1].isnan().all() and not y_BHC[[0, 2]].isnan().any()
    none = (torch.zeros(0, 4, 24), blocks[0], blocks[1][:0], blocks[2][:0])
    for decode in (partial(cpu.latent_decode, isa), REFERENCE.latent_decode):
        assert decode(*none, latent=16, scale=0.3).shape == (0, 4, 16)


@needs_kernels
@pytest.mark.parametrize(("block", "length"), [(-1, 20), (5, 20), (0, 33), (0, 0), (0, -4)])
def test_a_slot_in_no_block_is_rejected(block, length) -> None:
    table_BM, lengths_B = torch.tensor([[1, block]], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    with pytest.raises(IndexError, match="does not lead to as many slots"):
        cpu.latent_decode(0, torch.zeros(1, 2, 24), torch.zeros(5, 16, 24), table_BM, lengths_B, latent=16, scale=1.0)


@needs_kernels
def test_tensors_that_do_not_fit_are_rejected() -> None:
    table_BM, lengths_B = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"blocks torch.bfloat16 .* do not fit"):
        blocks_PSX = torch.zeros(5, 16, 24, dtype=torch.bfloat16)
        cpu.latent_decode(0, torch.zeros(1, 2, 24), blocks_PSX, table_BM, lengths_B, latent=16, scale=1.0)
    with pytest.raises(ValueError, match=r"table torch.int64 .* do not fit"):
        cpu.latent_decode(
            0, torch.zeros(1, 2, 24), torch.zeros(5, 16, 24), table_BM.long(), lengths_B, latent=16, scale=1.0
        )
