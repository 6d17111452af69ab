"""FP8 training as in the paper (section 3.3): which modules multiply in E4M3, and which in high precision."""

import torch

from soli.kernels.fp8 import cuda
from soli.kernels.fp8.emulation import Fp8Emulation
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts
from soli.model.transformer import Transformer

# Besides these, embedding, routers, norms and the attention core keep high precision: they are no `Linear`.
HIGH_PRECISION = ("lm_head", "eh_proj")


def use_fp8(model: Transformer) -> list[str]:
    """Make the linear layers and experts of every block, MTP blocks included, multiply in FP8; their names in order.

    Parameters, names and files are untouched: masters and gradients keep their dtypes. A Hopper GPU multiplies
    in FP8; every other device emulates it.
    """
    backend = Fp8Emulation() if cuda.missing_requirement(model.embed_tokens.weight.device) else cuda.Fp8Cuda()
    names = []
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts) or (isinstance(module, Linear) and not name.endswith(HIGH_PRECISION)):
            module.backend = backend
            names.append(name)
    return names


def fp8_note(device: torch.device) -> str:
    """One line on how this device multiplies in FP8, for whoever starts a run."""
    reason = cuda.missing_requirement(device)
    return f"FP8 is emulated, exactly and slowly: {reason}" if reason else "FP8 products run on the GPU"
