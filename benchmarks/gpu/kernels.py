"""Kernels at the shapes that FlashMLA and DeepGEMM publish, as shares of ceilings measured in the same run.

mla decode    one absorbed query per sequence over a bf16 latent cache, 128 heads of 576/512: bytes and FLOPs
              (FlashMLA: 3,000 GB/s where memory bounds it, 660 TFLOP/s where arithmetic does, H800)
mla prefill   causal attention with keys of 192 and values of 128, by each of torch's backends
              (FlashAttention 4: 634 TFLOP/s, H100)
fp8 gemm      1x128 by 128x128 scales, quantized beforehand (DeepGEMM: up to 1,550 TFLOP/s, H800)
fp8 experts   the same for contiguous groups, one per expert; and what quantizing the input costs

python benchmarks/gpu/kernels.py
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import chip
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from soli.kernels.fp8 import cuda
from soli.model.attention import attend

GEMM = [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)]  # N, K of V3's layers
GROUPS = [(4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (8, 4096, 7168, 2048)]
BF16 = torch.bfloat16


def mla_decode(batch: int, context: int, heads: int, repeats: int) -> dict[str, Any]:
    at = chip.device()
    query = torch.randn(batch, 1, heads, 576, device=at, dtype=BF16)
    latent = torch.randn(batch, 1, context, 576, device=at, dtype=BF16)
    mask = torch.ones(batch, 1, 1, context, dtype=torch.bool, device=at)
    seconds = chip.seconds(lambda: attend(query, latent, latent[..., :512], mask, 0.135), repeats)
    bytes_, flops = latent.nbytes, 2 * batch * heads * context * (576 + 512)
    return {"ms": seconds * 1e3, "gb_s": bytes_ / seconds / 1e9, "tflops": flops / seconds / 1e12}


def mla_prefill(
    backend: SDPBackend | None, pad: bool, batch: int, length: int, heads: int, repeats: int
) -> dict[str, Any]:
    """Forward and forward with backward; `pad`: values filled up to the keys' width, for backends that want it."""
    at = chip.device()
    q, k, v = (
        torch.randn(batch, heads, length, width, device=at, dtype=BF16, requires_grad=True) for width in (192, 192, 128)
    )
    up = torch.randn(batch, heads, length, 128, device=at, dtype=BF16)

    def forward() -> torch.Tensor:
        values = F.pad(v, (0, 64)) if pad else v
        return F.scaled_dot_product_attention(q, k, values, is_causal=True)[..., :128]

    with nullcontext() if backend is None else sdpa_kernel(backend):
        with torch.no_grad():
            ahead = chip.seconds(forward, repeats)
        both = chip.seconds(lambda: torch.autograd.grad(forward(), (q, k, v), up), repeats)
    flops = batch * heads * length**2 * (192 + 128)  # causal: half of 2 * 2
    backward = batch * heads * length**2 * (3 * 192 + 2 * 128)
    return {"forward_ms": ahead * 1e3, "forward_tflops": flops / ahead / 1e12,
            "both_ms": both * 1e3, "both_tflops": (flops + backward) / both / 1e12}  # fmt: skip


def fp8_gemm(m: int, n: int, k: int, repeats: int) -> dict[str, Any]:
    at = chip.device()
    x, w = torch.randn(m, k, device=at, dtype=BF16), torch.randn(n, k, device=at)
    a, b = cuda.tiles(x), cuda.blocks(w)
    seconds = chip.seconds(lambda: cuda.product(a, b, BF16), repeats)
    packing = chip.seconds(lambda: cuda.tiles(x), repeats)
    w_bf16 = w.to(BF16)
    bf16 = chip.seconds(lambda: F.linear(x, w_bf16), repeats)
    bytes_ = m * k + n * k + 2 * m * n
    return {"ms": seconds * 1e3, "tflops": 2 * m * n * k / seconds / 1e12, "gb_s": bytes_ / seconds / 1e9,
            "quantise_x_gb_s": 3 * m * k / packing / 1e9, "bf16_ms": bf16 * 1e3}  # fmt: skip


def fp8_experts(groups: int, m: int, n: int, k: int, repeats: int) -> dict[str, Any]:
    from soli.kernels.fp8 import triton_kernels

    at = chip.device()
    ids = torch.arange(groups, device=at).repeat_interleave(m)[:, None]
    layout = cuda.lay_out_rows(ids, groups)
    x, w = torch.randn(layout.rows, k, device=at, dtype=BF16), torch.randn(groups, n, k, device=at)
    a, b = cuda.tiles(x), cuda.blocks(w)
    grouped = chip.seconds(
        lambda: triton_kernels.grouped(a.values_MK, a.scale, b.values_MK, b.scale, layout.expert_tile, BF16), repeats
    )
    g, xt = cuda.tiles(torch.randn(layout.rows, n, device=at, dtype=BF16), transposed=True), cuda.retiled(a)
    sides = g.values_MK, g.scale, xt.values_MK, xt.scale
    weights = chip.seconds(lambda: triton_kernels.by_expert(*sides, layout.first_tile, torch.float32), repeats)
    flops = 2 * groups * m * n * k
    w_bf16 = w.to(BF16)
    ends = torch.arange(1, groups + 1, device=at, dtype=torch.int32) * m
    bf16 = chip.seconds(lambda: F.grouped_mm(x[: groups * m], w_bf16.transpose(1, 2), offs=ends), repeats)
    return {"tflops": flops / grouped / 1e12, "weight_gradient_tflops": flops / weights / 1e12,
            "bf16_grouped_mm_tflops": flops / bf16 / 1e12}  # fmt: skip


def main() -> None:
    arguments = chip.parser(__doc__).parse_args()
    tiny, repeats = arguments.tiny, 2 if arguments.tiny else 30
    chip.require_gpu(tiny)
    rows = []
    for batch, context in [(2, 128)] if tiny else [(1, 4096), (32, 4096), (128, 4096), (128, 8192)]:
        rows.append(chip.attempt(f"mla decode, batch {batch}, context {context}",
                                 lambda b=batch, s=context: mla_decode(b, s, 4 if tiny else 128, repeats)))  # fmt: skip
    shape = (1, 64, 2) if tiny else (2, 4096, 128)
    for backend, pad in [(None, False), (SDPBackend.FLASH_ATTENTION, True), (SDPBackend.CUDNN_ATTENTION, False),
                         (SDPBackend.EFFICIENT_ATTENTION, False)]:  # fmt: skip
        name = "as torch chooses" if backend is None else backend.name.lower()
        rows.append(chip.attempt(f"mla prefill 192/128, {name}{', padded' if pad else ''}",
                                 lambda b=backend, p=pad: mla_prefill(b, p, *shape, repeats)))  # fmt: skip
    for m in [128] if tiny else [64, 128, 4096]:
        for n, k in [(256, 128)] if tiny else GEMM:
            rows.append(chip.attempt(f"fp8 gemm {m} x {n} x {k}", lambda s=(m, n, k): fp8_gemm(*s, repeats)))
    for shape4 in [(2, 128, 256, 128)] if tiny else GROUPS:
        rows.append(chip.attempt(f"fp8 experts {shape4}", lambda s=shape4: fp8_experts(*s, repeats)))
    chip.finish("kernels", arguments, {"ceilings": chip.ceilings(tiny), "rows": rows})


if __name__ == "__main__":
    main()
