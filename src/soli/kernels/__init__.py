"""The compute seam: linear layers, experts and attention over latents, each call answered by the fastest backend that
supports it. Every backend is checked against `kernels.reference`."""

from soli.formats.quantized import QuantizedWeight
from soli.kernels.backend import Backend, QuantizedExperts
from soli.kernels.dispatch import Dispatch, default_backend
from soli.kernels.torch_backend import count_tokens

__all__ = ["Backend", "Dispatch", "QuantizedExperts", "QuantizedWeight", "count_tokens", "default_backend"]
