"""Weights as other programs quantize them: their tensors by published name, and their values in float64.

Each function takes a weight (O, I) and returns ({suffix of `NAME.`: tensor}, values in float64). Values and scales are
drawn near the weight's, which none of these formats' readers has to know.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
Quantized = tuple[dict[str, Tensor], Tensor]


def groups_of(weight_OI: Tensor, group: int) -> Tensor:
    return weight_OI.float().unflatten(1, (-1, group))


def rows_of(values_OGg: Tensor, scale_OG: Tensor) -> Tensor:
    return (values_OGg.double() * scale_OG.double()[..., None]).flatten(1)


def pack_quantized(weight_OI: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """compressed-tensors: -8 ... 7 as + 8 in the nibbles of a 32-bit word, the lowest first; one scale for 32."""
    groups = groups_of(weight_OI, 32)
    scale = (groups.abs().amax(-1) / 7.5).clamp_min(2.0**-24).to(scale_dtype)
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    codes = values.flatten(1).long().unflatten(1, (-1, 8)) + 8
    words = sum(codes[..., i] << 4 * i for i in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    tensors = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight_OI.shape).int()}
    return tensors, rows_of(values, scale)


def e4m3(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_tensor(weight_OI: Tensor, shape: tuple[int, ...] = (), name: str = "weight_scale") -> Quantized:
    scale = weight_OI.float().abs().amax() / 448
    values = e4m3(weight_OI, scale)
    return {"weight": values, name: scale.reshape(shape)}, values.double() * scale.double()


def fp8_rows(weight_OI: Tensor, dtype: torch.dtype = torch.float32) -> Quantized:
    scale = (weight_OI.float().abs().amax(1, keepdim=True) / 448).clamp_min(1e-8).to(dtype)
    values = e4m3(weight_OI, scale)
    return {"weight": values, "weight_scale": scale}, values.double() * scale.double()


def fp8_blocks(weight_OI: Tensor) -> Quantized:
    """128 x 128, the scales called weight_scale."""
    rows, columns = -(-weight_OI.shape[0] // 128), -(-weight_OI.shape[1] // 128)
    scale = torch.rand(rows, columns) / 100 + 0.01
    whole = scale.repeat_interleave(128, 0)[: weight_OI.shape[0]].repeat_interleave(128, 1)[:, : weight_OI.shape[1]]
    values = e4m3(weight_OI, whole)
    return {"weight": values, "weight_scale": scale}, values.double() * whole.double()


def e2m1(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest values, and their bytes: even inputs in the low nibble."""
    ratio = (groups / scale[..., None]).nan_to_num().double()
    nibbles = (ratio.flatten(1)[..., None] - E2M1).abs().argmin(-1)
    pairs = nibbles.unflatten(1, (-1, 2))
    return E2M1[nibbles].unflatten(1, groups.shape[1:]), (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def nvfp4(weight_OI: Tensor) -> Quantized:
    """ModelOpt: an E4M3 scale for 16 inputs, times one number for the tensor."""
    groups = groups_of(weight_OI, 16)
    second = (weight_OI.float().abs().amax() / (6 * 448)).reshape(())
    scale = (groups.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    values, packed = e2m1(groups, scale.float() * second)
    tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": second, "input_scale": torch.tensor(0.5)}
    return tensors, rows_of(values, scale.double() * second.double())


def nvfp4_pack_quantized(weight_OI: Tensor) -> Quantized:
    """compressed-tensors: an E4M3 scale for 16 inputs, divided by one number for the tensor."""
    groups = groups_of(weight_OI, 16)
    divisor = (6 * 448 / weight_OI.float().abs().amax()).reshape(1)
    scale = (groups.abs().amax(-1) / 6 * divisor).to(torch.float8_e4m3fn)
    values, packed = e2m1(groups, scale.float() / divisor)
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor,
               "input_global_scale": torch.ones(1)}  # fmt: skip
    return tensors, rows_of(values, scale.double() / divisor.double())


def mxfp4(weight_OI: Tensor, name: str = "weight_packed") -> Quantized:
    """A byte e for 2^(e - 127) for 32 inputs."""
    groups = groups_of(weight_OI, 32)
    exponent = groups.abs().amax(-1).clamp_min(2.0**-100).log2().floor().long() - 2
    values, packed = e2m1(groups, (2.0**exponent).float())
    return {name: packed, "weight_scale": (exponent + 127).to(torch.uint8)}, rows_of(values, 2.0 ** exponent.double())


def compressed_tensors(
    format: str, ignore: tuple[str, ...] = (), targets: tuple[str, ...] = ("Linear",), **weights: Any
) -> dict[str, Any]:
    """The `quantization_config` that compressed-tensors writes."""
    every = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "observer": "minmax",
             "observer_kwargs": {}, "symmetric": True}  # fmt: skip
    group = {"input_activations": None, "output_activations": None, "targets": [*targets], "weights": every | weights}
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "ignore": ["lm_head", *ignore],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
# What Kimi K2 Thinking and K2.5 have: routed experts alone are quantized.
KIMI_IGNORE = ("re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")
KIMI = compressed_tensors("pack-quantized", KIMI_IGNORE, **INT4)
FLOAT8 = {"type": "float", "num_bits": 8}
FLOAT4 = {"type": "float", "num_bits": 4}

FORMATS: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any]]] = {
    "pack-quantized": (pack_quantized, compressed_tensors("pack-quantized", **INT4)),
    "pack-quantized, float16 scales": (
        lambda weight: pack_quantized(weight, torch.float16),
        compressed_tensors("pack-quantized", **INT4),
    ),
    "fp8 per tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8 per tensor, static": (
        lambda weight: (fp8_tensor(weight)[0] | {"input_scale": torch.tensor(0.3)}, fp8_tensor(weight)[1]),
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    ),
    "fp8 per tensor, of transformers": (
        lambda weight: fp8_tensor(weight, name="weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": None, "modules_to_not_convert": ["lm_head"]},
    ),
    "float-quantized per tensor": (
        lambda weight: fp8_tensor(weight, (1,)),
        compressed_tensors("float-quantized", **FLOAT8, strategy="tensor"),
    ),
    "float-quantized per channel": (fp8_rows, compressed_tensors("float-quantized", **FLOAT8, strategy="channel")),
    "float-quantized per channel, bf16 scales": (
        lambda weight: fp8_rows(weight, torch.bfloat16),
        compressed_tensors("float-quantized", **FLOAT8, strategy="channel"),
    ),
    "float-quantized in blocks": (
        fp8_blocks,
        compressed_tensors("float-quantized", **FLOAT8, strategy="block", block_structure=[128, 128]),
    ),
    "modelopt FP8": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
    "modelopt NVFP4": (
        nvfp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"},
         "config_groups": {"group_0": {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                                       "targets": ["Linear"]}}},
    ),
    "nvfp4-pack-quantized": (
        nvfp4_pack_quantized,
        compressed_tensors("nvfp4-pack-quantized", **FLOAT4, strategy="tensor_group", group_size=16),
    ),
    "mxfp4-pack-quantized": (
        mxfp4,
        compressed_tensors("mxfp4-pack-quantized", **FLOAT4, strategy="group", group_size=32, scale_dtype="uint8"),
    ),
    "mxfp4": (lambda weight: mxfp4(weight, "weight"), {"quant_method": "mxfp4"}),
}  # fmt: skip


def quantize_tensors(
    tensors: dict[str, Tensor], quantize: Callable[[Tensor], Quantized], chosen: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Replace the chosen weights by what `quantize` makes of them; returns their values in float64."""
    torch.manual_seed(0)
    reference = {}
    for name in [name for name in tensors if name.endswith(".weight") and chosen(name)]:
        parts, reference[name] = quantize(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + suffix: tensor.contiguous() for suffix, tensor in parts.items()}
    return reference


def is_linear(name: str) -> bool:
    """Whether the modules that Linear names have a weight, of all layers."""
    high = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "shared_head", "eh_proj")
    return not any(part in name for part in high)


def is_routed(name: str) -> bool:
    return ".experts." in name
