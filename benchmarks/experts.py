"""Time of one layer's routed experts, forward and backward: Soli's sorted dispatch beside three other contenders.

Dense computes every expert for every token and weighs the results (einsum); transformers loops over experts (eager) or
sorts and calls the grouped product (grouped_mm). All get the same weights, tokens and uniformly random choices, must
agree with Soli, and give gradients of tokens, gate weights and expert weights. transformers' batched_mm copies the
weights once per pair of token and expert, gigabytes here, and is left out.

    python benchmarks/experts.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn import functional as F

from soli import kernels

# T tokens, D hidden, F expert width, E experts, K selected
SHAPES = {
    "nano": {"T": 4096, "D": 256, "F": 128, "E": 32, "K": 4},
    "V3-like": {"T": 512, "D": 512, "F": 256, "E": 64, "K": 6},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest output
DENSE = "every expert, einsum"
CONTENDERS = ("soli", DENSE, "transformers eager", "transformers grouped_mm")
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def dense(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Every expert for every token; an expert that was not selected has weight 0."""
    weights_TE = torch.zeros(x_TD.shape[0], down_EDF.shape[0], dtype=weights_TK.dtype)
    weights_TE = weights_TE.scatter(1, ids_TK, weights_TK).to(x_TD.dtype)
    gate_TEF, up_TEF = torch.einsum("td,efd->tef", x_TD, gate_up_E2FD).chunk(2, dim=-1)
    return torch.einsum("tef,edf->td", F.silu(gate_TEF) * up_TEF * weights_TE[..., None], down_EDF)


def transformers_experts(implementation: str, shape: dict[str, int]) -> Experts:
    """transformers' own module, its parameters replaced by ours at every call."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(
        hidden_size=shape["D"], moe_intermediate_size=shape["F"], n_routed_experts=shape["E"], num_hidden_layers=1
    )
    config._experts_implementation = implementation
    module = DeepseekV3Experts(config)

    def run(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up_E2FD, "down_proj": down_EDF}
        return torch.func.functional_call(module, parameters, (x_TD, ids_TK, weights_TK))

    return run


def draw(shape: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    """Tokens, choices, gate weights and expert weights, all but the choices with gradients."""
    T, D, width, E, K = shape["T"], shape["D"], shape["F"], shape["E"], shape["K"]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    weights_TK, ids_TK = torch.rand(T, E, generator=generator).topk(K, dim=-1)
    x_TD, gate_up_E2FD, down_EDF = normal(T, D), normal(E, 2 * width, D) * D**-0.5, normal(E, D, width) * width**-0.5
    x_TD, gate_up_E2FD, down_EDF = (t.to(dtype).requires_grad_() for t in (x_TD, gate_up_E2FD, down_EDF))
    return [x_TD, ids_TK, weights_TK.requires_grad_(), gate_up_E2FD, down_EDF]


def build(contender: str, name: str, dtype: str) -> Callable[[bool], Any]:
    """A contender, for `record.alone`: asked, it gives its output, or the seconds of a forward and backward."""
    shape = SHAPES[name]
    inputs = draw(shape, DTYPES[dtype])
    own = {"soli": kernels.default_backend().experts, DENSE: dense}
    run = own.get(contender) or transformers_experts(contender.split()[-1], shape)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]

    def training_pass() -> None:
        y_TD = run(*inputs)
        torch.autograd.grad(y_TD, leaves, torch.ones_like(y_TD))

    seconds = record.timed(training_pass)
    return lambda output: run(*inputs).detach().float().numpy() if output else seconds()


def check_same(sides: Mapping[str, Callable[[bool], Any]], tolerance: float) -> None:
    expected_TD = sides["soli"](True)
    for name, side in sides.items():
        error = abs(side(True) - expected_TD).max() / abs(expected_TD).max()
        if error > tolerance:
            sys.exit(f"{name} differs from soli by {error:.1e} of the largest output: nothing was recorded")


def compare(name: str, dtype: str, rounds: int) -> dict[str, Any]:
    """The row of one shape and dtype, in milliseconds."""
    with ExitStack() as stack:
        sides = {who: stack.enter_context(record.alone(build, who, name, dtype)) for who in CONTENDERS}
        check_same(sides, TOLERANCE[dtype])
        seconds = record.interleaved({contender: partial(side, False) for contender, side in sides.items()}, rounds)
    millis = {contender: [1000 * value for value in values] for contender, values in seconds.items()}
    sizes = ", ".join(f"{key} {value}" for key, value in SHAPES[name].items())
    what = f"experts forward and backward, {name} ({sizes}), {dtype}"
    peers = {contender: millis[contender] for contender in CONTENDERS[1:]}
    return record.row(what, "ms", millis["soli"], peers)


def main() -> None:
    arguments = record.parser(__doc__, rounds=7).parse_args()
    rows = []
    for name in SHAPES:
        for dtype in DTYPES:
            record.progress(f"{name}, {dtype}")
            rows.append(compare(name, dtype, arguments.rounds))
    record.finish("experts", {"shapes": SHAPES, "rounds": arguments.rounds}, rows)


if __name__ == "__main__":
    main()
