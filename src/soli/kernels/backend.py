"""The seam: what every backend computes, and the experts of a layer in quantized form.

To add a backend, write one class in one file: derive from `TorchBackend` (torch_backend.py), override the operations
that the hardware does better, and say in `supports` which tensors it can read. Then either put it into
`Dispatch.preferred` (dispatch.py), where it is tried for every call before torch, or give it to chosen modules of a
model, `module.backend = MyBackend()`, as FP8 training does. Test it against reference.py.

Shapes: T tokens, D hidden, E experts, F expert width, K selected; B rows, H heads, P blocks of S slots, M blocks of a
row, X = C latent + R rotary width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from soli.analysis.residency import ResidencyRecorder
from soli.errors import SoliError
from soli.formats.quantized import QuantizedWeight
from soli.kernels.cpu import ExpertTable


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """The experts of a layer, each in place: `gates` and `ups` (F, D), `downs` (D, F), one of each per expert."""

    gates: Sequence[QuantizedWeight]
    ups: Sequence[QuantizedWeight]
    downs: Sequence[QuantizedWeight]

    def __post_init__(self) -> None:
        if not len(self.gates) == len(self.ups) == len(self.downs):
            raise SoliError(
                f"a layer has {len(self.gates)} gates, {len(self.ups)} ups and {len(self.downs)} downs; "
                "every expert needs one of each"
            )

    @cached_property
    def uniform(self) -> bool:
        """Whether all gates and ups have one format, group and shape, and all downs one."""
        kinds = [{(w.format, w.group, w.shape) for w in part} for part in ((*self.gates, *self.ups), self.downs)]
        return all(len(kind) == 1 for kind in kinds)

    @cached_property
    def formats(self) -> tuple[str, str]:
        """Of the first expert's gate and down projection."""
        return self.gates[0].format, self.downs[0].format

    @cached_property
    def table(self) -> ExpertTable:
        """Where the C++ kernels find each matrix; SoliError for experts that are not uniform."""
        return ExpertTable.from_matrices(self.gates, self.ups, self.downs)

    @cached_property
    def values_like(self) -> Tensor:
        """A tensor of the dtype and device of the down projections' values."""
        return self.downs[0].values

    def windows(self, expert_ids_TK: Tensor) -> Iterable[range] | None:
        """The experts 0 ... E - 1 in consecutive ranges, each of which is in memory while it is taken; None where all
        are in memory."""
        return None

    def residency_recorder(self, expert_ids_TK: Tensor) -> ResidencyRecorder | None:
        """Records where the experts are, from now until the layer is computed; None where all are in memory."""
        return None


class Backend(ABC):
    """One implementation of the seam's operations. It is immutable, and copies of a module share it."""

    @abstractmethod
    def supports(self, x: Tensor, weight: Tensor) -> bool:
        """Whether this backend can multiply activations `x` with `weight` where they are, as they are."""

    def supports_format(self, format: str) -> bool:
        """Whether this backend can multiply with quantized weights of a format (soli.formats.quantized)."""
        return True

    def is_faster(self, dtype: torch.dtype, tokens: int, quantized: bool = False) -> bool:
        """Whether this backend multiplies so many tokens with one matrix faster than those after it in a dispatch."""
        return True

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times weight (out, in) transposed, in the dtype of x."""

    @abstractmethod
    def experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """Equation 12's routed part for T tokens: (T, D), (T, K), (T, K) to (T, D) in the dtype of x."""

    @abstractmethod
    def quantized_linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        """x (..., in) times the quantized weight (out, in) transposed, in the dtype of x."""

    @abstractmethod
    def quantized_experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, experts: QuantizedExperts
    ) -> Tensor:
        """Equation 12's routed part from quantized experts; only those that were selected are read."""

    @abstractmethod
    def latent_decode(
        self, q_BHX: Tensor, blocks_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
    ) -> Tensor:
        """Attention of one query per row over latents in blocks, as in reference.py: (B, H, C)."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
