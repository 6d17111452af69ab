"""The linear seam on torch's own matrix product."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed; a weight kept wider (a float32 master) is rounded at use."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if widens(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def widens(x: Tensor) -> bool:
    """Whether `x` shall be multiplied as float32: bfloat16 where torch has no products of it, and no gradient is
    recorded, which would keep the copies."""
    return x.dtype == torch.bfloat16 and x.is_cpu and not torch.is_grad_enabled() and not narrow_products()


@cache
def narrow_products() -> bool:
    """Whether torch multiplies bfloat16 on this processor at more than float32's speed, by oneDNN.

    Measured beside torch 2.13 on AVX2: 512 x 2,048 by 4,096 takes 254 ms in bfloat16 and 67 in float32.
    """
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or bool(found.get("avx512_f"))
