"""The mixture layer: routed experts for the tokens that selected them, shared experts for all tokens (equation 12).

Shapes: B batch, T tokens (flattened inside), D hidden, E experts, F expert width, K chosen.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from soli import kernels
from soli.analysis.residency import ResidencyRecorder
from soli.config import ModelConfig
from soli.model.layers import MLP, Device
from soli.model.router import Router, Routing


class RoutedExperts(nn.Module):
    """All routed experts of a layer as two stacked parameters, computed by the layer's ``backend``. Or quantized, each
    in place in its file; then there are no parameters."""

    backend: kernels.Backend
    quantized: kernels.QuantizedExperts | None = None

    def __init__(self, config: ModelConfig, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        E, D, F = config.n_routed_experts or 0, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D, device=device, dtype=dtype))  # gate rows, then up
        self.down_proj = nn.Parameter(torch.empty(E, D, F, device=device, dtype=dtype))
        self.backend = kernels.default_backend()

    def set_quantized(self, experts: kernels.QuantizedExperts) -> None:
        """Compute with quantized weights from now on, without parameters."""
        self.register_parameter("gate_up_proj", None)
        self.register_parameter("down_proj", None)
        self.quantized = experts

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Equation 12's routed part (T, D); the router and the block do not depend on the implementation."""
        if self.quantized is not None:
            return self.backend.quantized_experts(x_TD, expert_ids_TK, weights_TK, self.quantized)
        return self.backend.experts(x_TD, expert_ids_TK, weights_TK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gate = Router(config, device, dtype)
        self.experts = RoutedExperts(config, device, dtype)
        shared_width = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(config.hidden_size, shared_width, device, dtype) if shared_width else None

    def forward(self, x_BTD: Tensor, masked_TE: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The layer's output (B, T, D) and the router's whole decision for its B*T tokens."""
        x_TD = x_BTD.flatten(0, 1)
        routing = self.gate(x_TD, masked_TE)
        recorder = self._residency_recorder(routing)
        y_TD = self.experts(x_TD, routing.expert_ids_TK, routing.weights_TK)
        if recorder is not None:
            routing = replace(routing, residency=recorder.finish())
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD.view_as(x_BTD), routing

    def _residency_recorder(self, routing: Routing) -> ResidencyRecorder | None:
        """Of experts that are read from disk as they are needed."""
        quantized = self.experts.quantized if isinstance(self.experts, RoutedExperts) else None
        return None if quantized is None else quantized.residency_recorder(routing.expert_ids_TK)
