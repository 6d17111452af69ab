"""The linear seam on torch's own matrix product."""

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed; a weight kept wider (a float32 master) is rounded at use."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
