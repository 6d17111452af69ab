"""The compute seam: ``linear``, ``experts`` and ``latent_decode``, answered by the best implementation at hand and
checked against ``kernels.reference``. Callers give plain tensors and never learn which one ran; weights that stay
packed go to ``packed_linear`` and ``packed_experts``."""

from soli.formats.quantized import PackedWeight
from soli.kernels.dispatch import experts, latent_decode, linear, packed_experts, packed_linear
from soli.kernels.packed_torch import PackedExperts
from soli.kernels.sorted_experts import count_tokens

__all__ = [
    "PackedExperts",
    "PackedWeight",
    "count_tokens",
    "experts",
    "latent_decode",
    "linear",
    "packed_experts",
    "packed_linear",
]
