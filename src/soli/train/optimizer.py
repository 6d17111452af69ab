"""AdamW with the paper's constants (section 4.2), and Muon for the matrices when the recipe says so.

Weight decay is decoupled and spares every vector: norms and biases. Muon (Jordan et al. 2024) replaces a matrix's
momentum by the nearest semi-orthogonal matrix, scaled by 0.2 sqrt(max(rows, columns)) so that AdamW's learning rate and
decay fit it (Moonlight, arXiv 2502.16982, eq. 4). Embedding, head, routers and vectors stay with AdamW. Moments are
fp32, or bf16 when the recipe says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from soli.errors import SoliError
from soli.train.adamw import AdamW
from soli.train.settings import OptimizerSettings

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUTER = "mlp.gate.weight"
TOGETHER = 2**24  # elements that a GPU orthogonalises in one call: few launches if small, little room if large
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic; five rounds bring singular values near 1


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (2-d) and stacks of them (3-d, one per expert).

    A group's `matrices` says how many lie in one tensor, one under the other: 2 where gate and up share it. The
    momentum is kept in the dtype `moments`, and used unrounded.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1})
        self.dtype, self.moments = dtype, moments  # the first: of the orthogonalisation alone

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for alike in _alike([p for p in group["params"] if p.grad is not None], group["matrices"]):
                self._move(alike, group)

    def _move(self, alike: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters whose matrices have one shape, in the calls of one: launches are what a small model waits for."""
        grads = [p.grad for p in alike if p.grad is not None]
        momenta = [self._momentum(p).to(p.dtype) for p in alike]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        if any(momentum.dtype != self.moments for momentum in momenta):
            torch._foreach_copy_([self.state[p]["momentum"] for p in alike], momenta)
        steps = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
        rows, columns = alike[0].shape[-2] // group["matrices"], alike[0].shape[-1]
        stack = torch.cat([step.reshape(-1, rows, columns) for step in steps])
        updates = orthogonalise(stack, self.dtype).split([p.numel() // (rows * columns) for p in alike])
        torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
        scale = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
        torch._foreach_add_(alike, [update.view_as(p) for update, p in zip(updates, alike, strict=True)], alpha=scale)

    def _momentum(self, p: Tensor) -> Tensor:
        """As it is kept between steps; zero at first."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=self.moments)
        momentum: Tensor = state["momentum"]
        return momentum


def _alike(parameters: list[Tensor], matrices: int) -> list[list[Tensor]]:
    """Parameters whose matrices have one shape, about `TOGETHER` elements at a time; on a CPU, whose cache is smaller
    and whose calls cost little, each alone."""
    groups: dict[tuple[int, int], list[list[Tensor]]] = {}
    for p in parameters:
        of_shape = groups.setdefault((p.shape[-2] // matrices, p.shape[-1]), [[]])
        if sum(other.numel() for other in of_shape[-1]) >= (TOGETHER if p.is_cuda else 1):
            of_shape.append([])
        of_shape[-1].append(p)
    return [group for of_shape in groups.values() for group in of_shape]


def orthogonalise(matrix: Tensor, dtype: torch.dtype, rounds: int = 5) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, nearly, for (..., rows, columns), by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    stack = matrix.reshape(-1, *matrix.shape[-2:]).to(dtype)
    x = stack.mT if tall else stack
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(dtype)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype).reshape(matrix.shape)


class Optimizer:
    """The optimizers of a run behind one step; its state is named tensors, so that no pickle is needed to keep it."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings, dtype: torch.dtype) -> None:
        self.names = {p: name for name, p in model.named_parameters()}
        self.clip, self.moments = settings.clip, MOMENTS[settings.moments]
        inner = {n: p for n, p in model.named_parameters() if settings.name == "muon" and _is_inner_matrix(n, p)}
        by_muon = set(inner.values())
        rest = [p for p in model.parameters() if p not in by_muon]
        routers = [p for name, p in model.named_parameters() if name.endswith(ROUTER)]
        decayed = {"weight_decay": settings.weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.dim() >= 2 and not self.names[p].endswith(ROUTER)], **decayed},
            {"params": routers, **decayed, "rate": settings.router_rate},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self.parts: list[torch.optim.Optimizer] = []
        if settings.moments == "bf16":
            self.parts.append(AdamW(groups, betas, settings.eps))
        else:
            self.parts.append(torch.optim.AdamW(groups, betas=betas, eps=settings.eps, fused=True))
        if inner:
            double = [p for name, p in inner.items() if name.endswith("gate_up_proj")]
            single = [p for name, p in inner.items() if not name.endswith("gate_up_proj")]
            stacks: list[dict[str, Any]] = [{"params": single}, {"params": double, "matrices": 2}]
            self.parts.append(Muon(stacks, settings.momentum, settings.weight_decay, dtype, self.moments))

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients together, before clipping (0-d fp32)."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.names if p.grad is not None])

    def step(self, learning_rate: float, norm: Tensor | None = None) -> float:
        """Clip to the settings' norm, move the parameters, clear the gradients; returns the norm before clipping.

        `norm` is what `gradient_norm` gave, when it was asked. SoliError when it is not finite; nothing moves then.
        """
        norm = self.gradient_norm() if norm is None else norm
        if not norm.isfinite():
            raise SoliError("the gradient's norm is not finite, so no weight moved")
        torch.nn.utils.clip_grads_with_norm_(self.names, self.clip, norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * group.get("rate", 1.0)
            part.step()
        self.clear()
        return float(norm)

    def clear(self) -> None:
        """Forget the gradients; no weight and no moment moves."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every moment by name: `<parameter>|<moment>`."""
        return {f"{self.names[p]}|{key}": value for p, key, value in self._entries()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave; SoliError names a parameter whose moments are missing or of another shape."""
        parameters = {name: p for p, name in self.names.items()}
        owners = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, _, moment = key.rpartition("|")
            p = parameters.get(name)
            if p is None or (value.dim() and value.shape != p.shape):
                raise SoliError(
                    f"the optimizer state has {key} of shape {tuple(value.shape)}, which this recipe's model lacks"
                )
            kept = self.moments if value.dim() else value.dtype  # fused steps want the count on the device too
            owners[p].state[p][moment] = value.to(p.device, kept, copy=True)
        for p, name in self.names.items():
            if tensors and p not in owners[p].state:
                raise SoliError(f"the optimizer state has nothing for {name}; the run was made by another recipe")

    def _entries(self) -> Iterator[tuple[Any, str, Tensor]]:
        for part in self.parts:
            for p, moments in part.state.items():
                for key, value in moments.items():
                    yield p, key, value


def _is_inner_matrix(name: str, p: Tensor) -> bool:
    return p.dim() >= 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", ROUTER))
