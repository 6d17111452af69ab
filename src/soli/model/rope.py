"""Rotary position embedding of the decoupled key and query, with YaRN (paper sections 2.1.1 and 4.3).

Shapes: B batch, T tokens, H heads, R rotary width, P = R/2 pairs.

Released weights have each pair side by side, (x0, x1), (x2, x3), ...; the rotation is done in that layout, so nothing
is permuted at all. A config with ``rope_interleave`` false pairs (x0, x_P), (x1, x_{P+1}), ... instead. YaRN touches
the decoupled part alone: it slows the low frequencies, scales cos and sin by the ratio of two mscales, and the softmax
by the square of one of them. `llama_4_scaling` (Mistral) scales the whole query by its position.
"""

import math

import torch
from torch import Tensor

from soli.config import ModelConfig, RopeScaling


def mscale(factor: float, weight: float) -> float:
    """YaRN's sqrt(1/t) = 0.1 * weight * ln(factor) + 1; one where the context is not extended."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """(nope + rope)^-0.5, times mscale(mscale_all_dim)^2 under YaRN."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    return scale * mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else scale


def cos_sin_scale(config: ModelConfig) -> float:
    """Factor on cos and sin: the ratio of the two mscales, 1 when they are equal or without YaRN."""
    yarn = config.rope_scaling
    return mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim) if yarn else 1.0


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair, float32 (P,)."""
    R = config.qk_rope_head_dim
    inv_P = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R)
    if config.rope_scaling is None:
        return inv_P
    keep_P = _extrapolated_share(config.rope_scaling, R, config.rope_theta)
    return inv_P * keep_P + inv_P / config.rope_scaling.factor * (1.0 - keep_P)


def _extrapolated_share(yarn: RopeScaling, R: int, theta: float) -> Tensor:
    """1 for pairs that rotate over beta_fast times within the original context, 0 under beta_slow, a ramp between."""

    def pair_rotating(rotations: float) -> float:
        return R * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_rotating(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_rotating(yarn.beta_slow)), R - 1)
    ramp_P = (torch.arange(R // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    return 1.0 - ramp_P.clamp(0.0, 1.0)


class Rope:
    """cos and sin of every position. Not a module: frequencies are float32 whatever the model is cast to."""

    def __init__(self, config: ModelConfig) -> None:
        self.query_scaling = config.llama_4_scaling
        self.scale = cos_sin_scale(config)
        self.inv_P = self._device_inv_P = inverse_frequencies(config)

    def __call__(self, positions_BT: Tensor) -> tuple[Tensor, ...]:
        """Positions (B, T) to float32 cos and sin, each (B, T, 1, P): the 1 stands for the heads. With llama_4_scaling
        a third tensor has the factor on each query, (B, T, 1, 1)."""
        # Copied once: a copy from the host in every forward pass would stall a GPU.
        if self._device_inv_P.device != positions_BT.device:
            self._device_inv_P = self.inv_P.to(positions_BT.device)
        angle_BT1P = positions_BT[..., None, None].to(torch.float32) * self._device_inv_P
        cos_sin = angle_BT1P.cos() * self.scale, angle_BT1P.sin() * self.scale
        if self.query_scaling is None:
            return cos_sin
        beta, original = self.query_scaling.beta, self.query_scaling.original_max_position_embeddings
        return *cos_sin, 1 + beta * torch.log(1 + torch.floor(positions_BT[..., None, None] / original))


def rotate(x_BTHR: Tensor, cos_sin: tuple[Tensor, ...], interleaved: bool) -> Tensor:
    """Rotate each pair of the last dimension by its angle, in float32, in the same layout (equations 3 and 8)."""
    cos, sin = cos_sin[:2]
    x = x_BTHR.to(torch.float32)
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return rotated.to(x_BTHR.dtype)
