"""One token through the experts of a layer on one core, in every weight format: Soli's C++ kernels beside torch's own
products and beside the memory itself.

The shape is that of a 1.19 B model (64 experts of width 512 over 1024, six chosen), several layers in turn so that no
weight is still in a cache. torch has no call for a layer's experts: its side is one product per matrix, bfloat16 mm,
_weight_int8pack_mm (a scale per row) or _weight_int4pack_mm_for_cpu (groups of 32), each on weights in its own layout.
"memory" sums as many bytes of float32 numbers with torch: no product can be faster than that for long.

    python benchmarks/cpu_kernels.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn import functional as F

from soli.formats.fp8 import E4M3
from soli.formats.quantized import CODECS, QuantizedWeight, plain
from soli.kernels import cpu
from soli.kernels.cpu.backend import CpuBackend

E, D, WIDTH, K, LAYERS, GROUP = 64, 1024, 512, 6, 4, 32
TOKENS = 12  # of one measurement
BYTES_PER_WEIGHT = {"bf16": 2.0, "fp8": 1.0, "int8": 1 + 2 / GROUP, "int4": 0.5 + 2 / GROUP}
TORCH = {"bf16": "torch.mm", "int8": "torch._weight_int8pack_mm", "int4": "torch._weight_int4pack_mm_for_cpu"}
MEMORY = "memory"


def soli_layer(format: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A layer of random quantized values; the scales keep the hidden values' variance near 1."""

    codec = CODECS[format]
    group = GROUP if GROUP in codec.groups else codec.groups[0]

    def stack(rows: int, columns: int) -> QuantizedWeight:
        if format == "bf16":
            return plain((torch.randn(E, rows, columns) * columns**-0.5).bfloat16())
        shape = (E, rows, columns)
        size = {"fp8": 1.0, "int8": 1 / 73, "int4": 1 / 4.6}[format] * columns**-0.5
        scale = torch.full(codec.scale_shape(shape, group), size, dtype=codec.scale_dtype)
        if format == "fp8":
            values = torch.randn(shape).to(E4M3)
        elif format == "int8":
            values = torch.randint(-127, 128, shape, dtype=torch.int8)
        else:
            values = torch.randint(0, 256, codec.values_shape(shape), dtype=torch.uint8)
        return QuantizedWeight(format, values, scale, shape, group)

    stacks = (stack(WIDTH, D), stack(WIDTH, D), stack(D, WIDTH))
    table = cpu.ExpertTable.from_matrices(*([weights[e] for e in range(E)] for weights in stacks))
    isa = CpuBackend().isa
    return lambda x_TD, ids_TK, weights_TK: cpu.experts(isa, x_TD, ids_TK, weights_TK, table)


def torch_matrix(format: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """One matrix as torch's product for this format wants it."""
    if format == "bf16":
        weight = (torch.randn(rows, columns) * columns**-0.5).bfloat16()
        return lambda x: torch.mm(x, weight.T)
    if format == "int8":
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        scale = torch.rand(rows).bfloat16() / 2000
        return lambda x: torch._weight_int8pack_mm(x, values, scale)
    nibbles = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 2)
    scale = (torch.rand(columns // GROUP, rows, 2) / 100).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scale)


def torch_layer(format: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One product per matrix of each selected expert, and the sum."""
    experts = [(torch_matrix(format, 2 * WIDTH, D), torch_matrix(format, D, WIDTH)) for _ in range(E)]

    def run(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for e, weight in zip(ids_TK[0].tolist(), weights_TK[0], strict=True):
            gate, up = experts[e][0](x_TD).chunk(2, dim=-1)
            y_TD = y_TD + weight * experts[e][1](F.silu(gate) * up)
        return y_TD.to(x_TD.dtype)

    return run


def memory_layer(format: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Reads as many bytes, somewhere in a block larger than any cache."""
    count = int(3 * D * WIDTH * K * BYTES_PER_WEIGHT[format]) // 4
    block = torch.ones(2**26)

    def run(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        start = int(torch.randint(block.numel() - count, ()))
        return block[start : start + count].sum()

    return run


def build(contender: str, format: str) -> Callable[[], float]:
    """A contender, for `record.alone`: milliseconds of processor time per token and layer."""
    torch.manual_seed(0)
    make = {"soli": soli_layer, MEMORY: memory_layer}.get(contender, torch_layer)
    layers = [make(format) for _ in range(LAYERS)]
    x_TD, weights_TK = torch.randn(1, D).bfloat16(), torch.full((1, K), 1 / K)

    def measure() -> float:
        choices = [torch.randperm(E)[None, :K] for _ in range(TOKENS * LAYERS)]
        with torch.inference_mode():
            start = time.process_time()
            for number, ids_TK in enumerate(choices):
                layers[number % LAYERS](x_TD, ids_TK, weights_TK)
        return 1000 * (time.process_time() - start) / len(choices)

    return measure


def compare(format: str, rounds: int) -> dict[str, Any]:
    """The row of one format: Soli, torch's product where there is one, and the memory."""
    contenders = ["soli", *([TORCH[format]] if format in TORCH else []), MEMORY]
    with ExitStack() as stack:
        sides = {contender: stack.enter_context(record.alone(build, contender, format)) for contender in contenders}
        millis = record.interleaved(sides, rounds)
    what = f"experts of one layer, one token, {format} (D {D}, F {WIDTH}, E {E}, K {K})"
    return record.row(what, "ms", millis["soli"], {contender: millis[contender] for contender in contenders[1:]})


def main() -> None:
    arguments = record.parser(__doc__, rounds=9).parse_args()
    rows = []
    for format in BYTES_PER_WEIGHT:
        record.progress(format)
        rows.append(compare(format, arguments.rounds))
    size = {"E": E, "D": D, "F": WIDTH, "K": K, "layers": LAYERS, "group": GROUP, "rounds": arguments.rounds}
    record.finish("cpu_kernels", size, rows)


if __name__ == "__main__":
    main()
