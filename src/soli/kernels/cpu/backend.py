"""The C++ kernels as a backend: inference on a CPU, weights of every format multiplied in place."""

from functools import cached_property
from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter

from soli.formats.quantized import QuantizedWeight
from soli.kernels import cpu
from soli.kernels.backend import Backend, QuantizedExperts
from soli.kernels.torch_backend import has_bfloat16_products

# Weights that activations of either dtype may be multiplied with.
LOW_PRECISION: Final = (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8)

# Measured beside torch 2.13 (benchmarks/cpu_kernels.py): the experts of a layer are faster in C++ at every size, and so
# are float32 products of more than one token. One matrix is faster in torch for many bfloat16 tokens, where oneDNN
# multiplies those. For one float32 token and a small matrix torch takes less time before its product, but its bits
# differ from those in a batch.
ONEDNN_FROM: Final = 48  # bfloat16 tokens


class CpuBackend(Backend):
    """`isa` names the instruction set, None the best there is. A `forced` one is used at every size, and is an error
    where the kernels are missing."""

    def __init__(self, isa: str | None = None, forced: bool = False) -> None:
        self._isa_name = isa
        self._forced = forced

    @cached_property
    def isa(self) -> int:
        """The instruction set as `native.ISAS` numbers it. SoliError where it, or the library, is missing."""
        return cpu.native.isa_number(self._isa_name, cpu.require_library().best_isa)

    def supports(self, x: Tensor, weight: Tensor) -> bool:
        """Whether these are real CPU tensors that the kernels can read, and no gradient is needed."""
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        # Exact types: a tensor of a tracing or sharding subclass has no memory to read. A plain weight may have lower
        # precision than its tokens but not higher: torch rounds a float32 master before its product.
        readable = (
            type(x) is Tensor
            and type(weight) in (Tensor, Parameter)
            and x.dtype in cpu.DTYPES
            and weight.dtype in (x.dtype, *LOW_PRECISION)
            and x.is_cpu
            and weight.is_cpu
            and weight.is_contiguous()
            and not torch.compiler.is_compiling()
        )
        return readable and (cpu.available() or self._forced)

    def supports_format(self, format: str) -> bool:
        return format in cpu.FORMATS

    def is_faster(self, dtype: torch.dtype, tokens: int, quantized: bool = False) -> bool:
        fewer = tokens < ONEDNN_FROM
        return quantized or fewer or dtype != torch.bfloat16 or not has_bfloat16_products() or self._forced

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return cpu.plain_linear(self.isa, x, weight, bias)

    def experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        table = cpu.ExpertTable.from_plain(gate_up_E2FD, down_EDF)
        return cpu.experts(self.isa, x_TD, expert_ids_TK, weights_TK, table)

    def quantized_linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        return cpu.linear(self.isa, x, weight, bias)

    def quantized_experts(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, experts: QuantizedExperts
    ) -> Tensor:
        return cpu.experts(
            self.isa, x_TD, expert_ids_TK, weights_TK, experts.table, experts.windows(expert_ids_TK)
        )

    def latent_decode(
        self, q_BHX: Tensor, blocks_PSX: Tensor, table_BM: Tensor, lengths_B: Tensor, *, latent: int, scale: float
    ) -> Tensor:
        return cpu.latent_decode(self.isa, q_BHX, blocks_PSX, table_BM, lengths_B, latent=latent, scale=scale)
