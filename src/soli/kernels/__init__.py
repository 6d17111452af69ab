"""The compute seam: ``linear``, ``experts`` and ``latent_decode``, answered by the best implementation at hand and
checked against ``kernels.reference``. Callers give plain tensors and never learn which one ran; weights that stay
quantized go to ``quantized_linear`` and ``quantized_experts``."""

from soli.formats.quantized import QuantizedWeight
from soli.kernels.dispatch import experts, latent_decode, linear, quantized_experts, quantized_linear
from soli.kernels.packed_torch import QuantizedExperts
from soli.kernels.sorted_experts import count_tokens

__all__ = [
    "QuantizedExperts",
    "QuantizedWeight",
    "count_tokens",
    "experts",
    "latent_decode",
    "linear",
    "quantized_experts",
    "quantized_linear",
]
