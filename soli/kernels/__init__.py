"""The compute seam: ``linear`` and ``experts``, answered by the best implementation at hand and checked against
``kernels.reference``. Callers give plain tensors and never learn which one ran."""

from soli.kernels.sorted_experts import count_tokens, experts
from soli.kernels.torch_linear import linear

__all__ = ["count_tokens", "experts", "linear"]
