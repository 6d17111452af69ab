"""How a model computes in training: its blocks with activation checkpointing, compiled, or both; products in FP8.

Activation checkpointing: bit-identical. torch.compile: equal to float32 rounding; the routed experts, whose shapes
depend on the data, are not compiled. FP8 as in the paper (section 3.3): products in E4M3 by the backend of the modules
that multiply so. Parameters, their names and checkpoints do not change.
"""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from soli.errors import SoliError
from soli.kernels.fp8 import cuda
from soli.kernels.fp8.emulation import Fp8Emulation
from soli.kernels.torch_backend import has_bfloat16_products
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts
from soli.model.transformer import Transformer
from soli.train.settings import RunSettings

BACKEND = "inductor"
# Besides these, embedding, routers, norms and the attention core keep high precision: they are no `Linear`.
HIGH_PRECISION = ("lm_head", "eh_proj")


def use_fp8(model: Transformer, device: torch.device | None = None) -> list[str]:
    """Make the linear layers and experts of every block, MTP blocks included, multiply in FP8; their names in order.

    Parameters, names and files are untouched: masters and gradients keep their dtypes. A Hopper GPU multiplies
    in FP8; every other device emulates it. `device`: where the model will be, by default where it is.
    """
    device = device or model.embed_tokens.weight.device
    backend = Fp8Emulation() if cuda.missing_requirement(device) else cuda.Fp8Cuda()
    names = []
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts) or (isinstance(module, Linear) and not name.endswith(HIGH_PRECISION)):
            module.backend = backend
            names.append(name)
    return names


def precision_note(precision: str, device: torch.device) -> str | None:
    """One line on how this device multiplies in `run.precision`, for whoever starts a run; None where that is what one
    expects."""
    if precision == "fp8":
        reason = cuda.missing_requirement(device)
        return f"FP8 is emulated, exactly and slowly: {reason}" if reason else "FP8 products run on the GPU"
    has_products = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_bfloat16_products()
    if precision == "bf16" and not has_products:
        return (
            "run.precision is bf16, of which this device has no products, so training is many times slower than in "
            "fp32: --set run.precision=auto takes what is fast here, with other rounding"
        )
    return None


def apply_block_options(model: Transformer, settings: RunSettings) -> None:
    """Set the blocks of `model`, those of MTP modules included, to run as `run.compile` and
    `run.activation_checkpointing` ask. SoliError when they are to be compiled and there is no C++ compiler.
    """
    if settings.compile:
        _require_compiler()
        for _, mixture in model.moe_layers():
            uncompiled = torch.compiler.disable(mixture.experts.forward)
            mixture.experts.forward = _equal_in_inference(uncompiled)  # type: ignore[method-assign]
    for block in blocks(model):
        if settings.compile:
            block.forward = _when_training(torch.compile(block.forward, backend=BACKEND), block.forward)
        if settings.activation_checkpointing:
            block.forward = _when_training(_recomputed(block.forward), block.forward)


def blocks(model: Transformer) -> list[nn.Module]:
    """Every block, in the order of the forward pass; those of MTP modules last."""
    return [*model.layers, *(module.get_submodule("block") for module in model.mtp)]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, keeping only its inputs for the backward pass, which runs it again.

    The caller has the routing of the first run, so the second is not counted. Nothing in a block is random, so no
    random state is saved.
    """
    return lambda *args: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)


def _when_training(wrapped: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapped` where gradients are enabled, else `forward`: decoding has too many shapes to compile."""
    return _equal_in_inference(lambda *args: wrapped(*args) if torch.is_grad_enabled() else forward(*args))


def _equal_in_inference(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a `forward` that computes what the module's own does, so that the engine may still run it in C++."""
    forward.equal_in_inference = True  # type: ignore[attr-defined]
    return forward


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise SoliError(f"run.compile needs a C++ compiler, and there is no {compiler}; install one or name it in CXX")
