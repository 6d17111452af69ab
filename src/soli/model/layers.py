"""The layers that every block is built from: the linear layer of the seam, RMSNorm, and the gated MLP.

Weights may have higher precision than activations (float32 masters under bfloat16 compute): a product runs in the dtype
of its input, so the dtype of the embedding's output decides for the whole network. No autocast. A layer with a
quantized weight has no parameter: it computes from the bytes of the file and is not trained.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soli import kernels

Device = torch.device | str | None


class Linear(nn.Linear):
    """``x @ weight.T`` by the layer's ``backend``, in the dtype of ``x``."""

    backend: kernels.Backend
    quantized: kernels.QuantizedWeight | None = None

    def __init__(
        self, in_features: int, out_features: int, device: Device, dtype: torch.dtype | None, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.backend = kernels.default_backend()

    def reset_parameters(self) -> None:
        """Nothing: Transformer.init_weights or a checkpoint fills the parameters."""

    def set_quantized(self, weight: kernels.QuantizedWeight) -> None:
        """Compute with a quantized weight from now on, without a parameter."""
        self.register_parameter("weight", None)
        self.quantized = weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`, dequantized if it is quantized."""
        return self.weight.to(dtype) if self.quantized is None else self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized is not None:
            return self.backend.quantized_linear(x, self.quantized, self.bias)
        return self.backend.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; statistics in float32."""

    def __init__(self, width: int, eps: float, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.to(torch.float32), x.shape[-1:], eps=self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias; in float32."""

    def __init__(self, width: int, eps: float, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class MLP(nn.Module):
    """down(silu(gate x) * up x): the dense layers' network, and the shared experts as one."""

    def __init__(self, hidden_size: int, width: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, device, dtype)
        self.up_proj = Linear(hidden_size, width, device, dtype)
        self.down_proj = Linear(width, hidden_size, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def is_plain(linear: nn.Module) -> bool:
    """Whether `linear` multiplies with its weight and does nothing else: no hooks, no other `forward`, no subclass."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is Linear and not hooked and "forward" not in vars(linear)


def set_backend(model: nn.Module, backend: kernels.Backend) -> None:
    """Compute every part of `model` that goes through the seam with `backend`."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend  # type: ignore[assignment]
