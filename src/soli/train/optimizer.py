"""AdamW with the paper's constants (section 4.2), and Muon for the matrices if the recipe selects it.

Weight decay is decoupled and spares every vector: norms and biases. Muon (Jordan et al. 2024) replaces a matrix's
momentum by the nearest semi-orthogonal matrix, scaled by 0.2 sqrt(max(rows, columns)) so that AdamW's learning rate and
decay fit it (Moonlight, arXiv 2502.16982, eq. 4). Embedding, head, routers and vectors stay with AdamW. Moments are
stored in fp32, or in bf16 if the recipe selects it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from soli.errors import SoliError
from soli.parallel.ranks import ALONE, Ranks, local_tensor
from soli.train.settings import OptimizerSettings

if TYPE_CHECKING:
    from soli.parallel.pipeline import Pipeline

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUTER = "mlp.gate.weight"
EMBEDDING = "embed_tokens.weight"
MAX_BATCH = 2**24  # elements that a GPU orthogonalises in one call: fewer launches if large, less memory if small
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic; five rounds bring singular values near 1


class Bf16AdamW(torch.optim.Optimizer):
    """AdamW with moments stored in bfloat16, as the paper trains (section 3.3.1); weights and gradients stay fp32.

    A moment is converted to fp32, updated and used there, and rounded to nearest even only when it is stored: a step's
    own gradient acts unrounded. The second moment moves by 1 - beta2 of its distance, so beta2 must stay well below
    1 - 2^-8: at the paper's 0.95 a moment forgets far faster than bfloat16 rounds; at 0.999 it could stop changing.
    State names are those of torch's own AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16)
        state["step"] += 1
        count = int(state["step"])
        mean = state["exp_avg"].to(p.dtype).lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].to(p.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = square.div_(1 - beta2**count).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**count))


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (2-d) and stacks of them (3-d, one per expert).

    A group's `matrices` is the number of matrices stacked in one tensor's rows: 2 where gate and up share it. The
    momentum is stored in the dtype `moments`, and used unrounded. `dtype` is that of the orthogonalisation alone.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        moments: torch.dtype = torch.float32,
        sharded: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """`sharded`: of parameters that are this rank's part of a sharded one, that one."""
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1})
        self.dtype = dtype
        self.moments = moments
        self.sharded = sharded or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for batch in _same_shape(parameters, group["matrices"], self.sharded):
                self._update(batch, group)

    def _update(self, batch: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters whose matrices have one shape, in one call: a small model's time goes into kernel launches."""
        grads = [p.grad for p in batch if p.grad is not None]
        momenta = [self._momentum(p).to(p.dtype) for p in batch]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        if any(momentum.dtype != self.moments for momentum in momenta):
            torch._foreach_copy_([self.state[p]["momentum"] for p in batch], momenta)
        steps = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
        whole = [self._gather(step, p) for step, p in zip(steps, batch, strict=True)]
        rows = whole[0].shape[-2] // group["matrices"]
        columns = whole[0].shape[-1]
        stack = torch.cat([step.reshape(-1, rows, columns) for step in whole])
        split = orthogonalise(stack, self.dtype).split([step.numel() // (rows * columns) for step in whole])
        updates = [self._own_part(x.view_as(step), p) for x, step, p in zip(split, whole, batch, strict=True)]
        torch._foreach_mul_(batch, 1 - group["lr"] * group["weight_decay"])
        scale = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
        torch._foreach_add_(batch, updates, alpha=scale)

    def _gather(self, step: Tensor, p: Tensor) -> Tensor:
        """Whole matrices: each rank orthogonalises every matrix of which it has a part, all to the same bits."""
        if p not in self.sharded:
            return step
        from soli.parallel.sharding import gather_matrices

        return gather_matrices(step, self.sharded[p])

    def _own_part(self, update: Tensor, p: Tensor) -> Tensor:
        if p not in self.sharded:
            return update
        from soli.parallel.sharding import keep_own_part

        return keep_own_part(update, self.sharded[p])

    def _momentum(self, p: Tensor) -> Tensor:
        """As stored between steps; zero at first."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=self.moments)
        return cast(Tensor, state["momentum"])


def _same_shape(
    parameters: list[Tensor], matrices: int, sharded: Mapping[Tensor, Tensor]
) -> list[list[Tensor]]:
    """Parameters in batches whose matrices have one shape, of about `MAX_BATCH` elements; on a CPU, whose cache is
    smaller and whose calls cost little, one parameter each."""
    groups: dict[tuple[int, int], list[list[Tensor]]] = {}
    for p in parameters:
        whole = sharded.get(p, p).shape
        of_shape = groups.setdefault((whole[-2] // matrices, whole[-1]), [[]])
        if sum(other.numel() for other in of_shape[-1]) >= (MAX_BATCH if p.is_cuda else 1):
            of_shape.append([])
        of_shape[-1].append(p)
    return [group for of_shape in groups.values() for group in of_shape]


def orthogonalise(matrix: Tensor, dtype: torch.dtype, rounds: int = 5) -> Tensor:
    """Approximately U V^T of the singular value decomposition U S V^T, for (..., rows, columns), by Newton-Schulz."""
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
    """The optimizers of a run behind one step; its state is named tensors, so that saving it needs no pickle.

    They step this rank's parts of the parameters, plain tensors that share the storage of the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
        replicas: int = 1,
        pipeline: "Pipeline | None" = None,
    ) -> None:
        """`replicas`: how many of the ranks have the same part of each parameter. `pipeline`: where `model` has the
        parameters of some of its stages."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names: dict[Tensor, str] = {p: name for name, p in trained.items()}
        self.local: dict[Tensor, Tensor] = {p: local_tensor(p) for p in self.names}
        self.ranks, self.replicas, self.pipeline = ranks, replicas, pipeline
        self.copied = (EMBEDDING,) if pipeline is not None and pipeline.has_copy else ()  # counted by another rank
        self.clip = settings.clip
        self.moments = MOMENTS[settings.moments]
        matrices = {n: p for n, p in trained.items() if settings.name == "muon" and _is_inner_matrix(n, p)}
        by_muon = set(matrices.values())
        rest = [p for p in self.names if p not in by_muon]
        routers = [p for p, name in self.names.items() if name.endswith(ROUTER)]
        matrix_like = [p for p in rest if p.dim() >= 2 and not self.names[p].endswith(ROUTER)]
        vectors = [p for p in rest if p.dim() < 2]
        decayed = {"weight_decay": settings.weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": self._parts(matrix_like), **decayed},
            {"params": self._parts(routers), **decayed, "rate": settings.router_rate},
            {"params": self._parts(vectors), "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self.parts: list[torch.optim.Optimizer] = [
            Bf16AdamW(groups, betas, settings.eps)
            if settings.moments == "bf16"
            else torch.optim.AdamW(groups, betas=betas, eps=settings.eps, fused=True)
        ]
        if matrices:
            double = [p for name, p in matrices.items() if name.endswith("gate_up_proj")]
            single = [p for name, p in matrices.items() if not name.endswith("gate_up_proj")]
            stacks: list[dict[str, Any]] = [
                {"params": self._parts(single)},
                {"params": self._parts(double), "matrices": 2},
            ]
            sharded = {local: p for p, local in self.local.items() if local is not p}
            self.parts.append(Muon(stacks, settings.momentum, settings.weight_decay, dtype, self.moments, sharded))

    def _parts(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [self.local[p] for p in parameters]

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients together, of all ranks, before clipping (0-d fp32)."""
        gradients = {name: local_tensor(p.grad) for p, name in self.names.items() if p.grad is not None}
        if self.pipeline is not None:
            if self.pipeline.ranks == self.ranks.world:
                return self._norm_of_stages(gradients, self.pipeline.names)
            gradients = {name: gradient for name, gradient in gradients.items() if name not in self.copied}
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        if self.ranks.world == 1:
            return norm
        return (self.ranks.sum(norm.double().square()) / self.replicas).sqrt().float()

    def _norm_of_stages(self, gradients: Mapping[str, Tensor], order: Sequence[str]) -> Tensor:
        """Where each rank has whole parameters: the bits of one process, which takes the norm of all their norms."""
        own = torch._foreach_norm(list(gradients.values()))
        norms = {name: float(norm) for name, norm in zip(gradients, own, strict=True)}
        for other in self.ranks.all_objects(norms):
            norms |= other
        return torch.linalg.vector_norm(torch.tensor([norms[name] for name in order if name in norms]))

    def step(self, learning_rate: float, norm: Tensor | None = None) -> float:
        """Clip to the settings' norm, update the parameters, clear the gradients; returns the norm before clipping.

        `norm` is the result of `gradient_norm`, if already computed. SoliError when it is not finite; nothing changes
        then.
        """
        norm = self.gradient_norm() if norm is None else norm
        if not norm.isfinite():
            raise SoliError("the gradient's norm is not finite, so no weight was changed")
        for p, local in self.local.items():
            if local is not p:
                local.grad = None if p.grad is None else local_tensor(p.grad)
        torch.nn.utils.clip_grads_with_norm_(self.local.values(), self.clip, norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * group.get("rate", 1.0)
            part.step()
        self.clear()
        return float(norm)

    def clear(self) -> None:
        """Drop the gradients; no weight and no moment changes."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for p in self.names:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every moment by name: `<parameter>|<moment>`."""
        states: list[tuple[Any, dict[str, Tensor]]] = [item for part in self.parts for item in part.state.items()]
        parameters = {local: p for p, local in self.local.items()}
        return {
            f"{self.names[parameters[local]]}|{key}": _shard(value, parameters[local])
            for local, moments in states
            for key, value in moments.items()
        }

    def load_state(self, tensors: dict[str, Tensor], late_mtp: bool = False) -> None:
        """Restore what `state` returned; SoliError names a parameter whose moments are missing or of another shape.

        With `late_mtp` the parameters of the MTP modules may all be without moments: they were not trained yet.
        """
        parameters = {name: p for p, name in self.names.items()}
        part_of = {local: part for part in self.parts for group in part.param_groups for local in group["params"]}
        for key, value in tensors.items():
            name, _, moment = key.rpartition("|")
            p = parameters.get(name)
            if p is None or (value.dim() and value.shape != p.shape):
                raise SoliError(
                    f"the optimizer state has {key} of shape {tuple(value.shape)}, which this recipe's model lacks"
                )
            dtype = self.moments if value.dim() else value.dtype
            # The step count is moved as well: torch's fused AdamW needs it on the device.
            local = self.local[p]
            part_of[local].state[local][moment] = local_tensor(value).to(local.device, dtype, copy=True)
        missing = {name for p, name in self.names.items() if self.local[p] not in part_of[self.local[p]].state}
        mtp = {name for name in self.names.values() if name.startswith("mtp.")}
        if late_mtp and mtp <= missing:
            missing -= mtp
        if tensors and missing:
            name = next(name for name in self.names.values() if name in missing)
            raise SoliError(f"the optimizer state has nothing for {name}; the run was started with another recipe")


def _shard(moment: Tensor, p: Tensor) -> Tensor:
    """A moment as what is saved: of a sharded parameter a shard, unless it is one number."""
    if local_tensor(p) is p or not moment.dim():
        return moment
    from soli.parallel.sharding import as_shard

    return as_shard(moment, p)


def _is_inner_matrix(name: str, p: Tensor) -> bool:
    return p.dim() >= 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", ROUTER))
