"""The default backend: each call goes to the fastest backend that supports it, C++ on a CPU or plain torch.

SOLI_KERNELS forces one: `reference` (the oracle), `torch`, or `cpu` (an error where the C++ kernels are missing; calls
whose tensors they cannot read, or that need a gradient, still go to torch). SOLI_CPU_ISA forces the instruction set of
the C++ kernels. Both are read once, when `default_backend` is first called. Dispatch depends on dtypes, devices and
sizes alone, so the same call always has the same result.

Shapes: T tokens, D hidden, E experts, F expert width, K selected; B rows, H heads, P blocks of S slots, M blocks of a
row, X = C latent + R rotary width.
"""

import os
from functools import cache
from typing import Final, Self

from torch import Tensor

from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels.backend import Backend, QuantizedExperts
from soli.kernels.cpu.backend import CpuBackend
from soli.kernels.reference import REFERENCE
from soli.kernels.torch_backend import TorchBackend

NAMES: Final = ("reference", "torch", "cpu")


class Dispatch(Backend):
    """`forced_backend`: one of NAMES, or None for the fastest; `isa`: one of `cpu.native.ISAS`, or None for the best.

    SoliError for a backend that does not exist; for an instruction set that this machine lacks, at the first C++ call.
    """

    def __init__(self, forced_backend: str | None = None, isa: str | None = None) -> None:
        if forced_backend is not None and forced_backend not in NAMES:
            raise SoliError(f"SOLI_KERNELS is {forced_backend!r}: choose one of {', '.join(NAMES)}, or leave it unset")
        cpu = CpuBackend(isa, forced=forced_backend == "cpu")
        self.forced_backend, self.isa = forced_backend, isa
        # Tried in order, then `fallback`, which supports every call. Not cached properties: torch.compile cannot trace
        # their lock.
        self.preferred: tuple[Backend, ...] = () if forced_backend in ("reference", "torch") else (cpu,)
        self.fallback: Backend = REFERENCE if forced_backend == "reference" else TorchBackend()

    @classmethod
    def from_environment(cls) -> Self:
        """What SOLI_KERNELS and SOLI_CPU_ISA say now."""
        return cls(os.environ.get("SOLI_KERNELS") or None, os.environ.get("SOLI_CPU_ISA") or None)

    def supports(self, x: Tensor, weight: Tensor) -> bool:
        return True

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for backend in self.preferred:
            if backend.supports(x, weight) and backend.is_faster(x.dtype, x.shape[:-1].numel()):
                return backend.linear(x, weight, bias)
        return self.fallback.linear(x, weight, bias)

    def experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        backend = self._backend(x_TD, gate_up_E2FD)
        if not backend.supports(weights_TK, down_EDF):
            backend = self.fallback
        return backend.experts(x_TD, expert_ids_TK, weights_TK, gate_up_E2FD, down_EDF)

    def quantized_linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        return self._backend(x, weight.values, weight.format).quantized_linear(x, weight, bias)

    def quantized_experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, experts: QuantizedExperts
    ) -> Tensor:
        uniform = experts.uniform
        backend = self._backend(x_TD, experts.values_like, *experts.formats) if uniform else self.fallback
        return backend.quantized_experts(x_TD, expert_ids_TK, weights_TK, experts)

    def latent_decode(
        self, q_BHX: Tensor, blocks_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
    ) -> Tensor:
        backend = self._backend(q_BHX, blocks_PSX) if blocks_PSX.dtype == q_BHX.dtype else self.fallback
        return backend.latent_decode(q_BHX, blocks_PSX, table_BM, lengths_B, latent=latent, scale=scale)

    def fused(self, x: Tensor) -> CpuBackend | None:
        """The C++ backend, where it may compute a whole forward pass of activations like `x`."""
        backend = self._backend(x, x)
        return backend if isinstance(backend, CpuBackend) else None

    def _backend(self, x: Tensor, weight: Tensor, *formats: str) -> Backend:
        """The first that supports activations `x` with `weight`, in quantized `formats`."""
        for backend in self.preferred:
            if backend.supports(x, weight) and all(map(backend.supports_format, formats)):
                return backend
        return self.fallback


@cache
def default_backend() -> Dispatch:
    """The backend of every new module: `Dispatch.from_environment()`, made once."""
    return Dispatch.from_environment()
