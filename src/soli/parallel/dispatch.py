"""Expert parallelism behind the experts seam: rows travel to the rank that has their expert, and back.

    counts of rows -> all-to-all -> products of the local experts -> all-to-all -> weighted sum over a token's experts

The rows of a local expert arrive in the order of ranks, and of tokens within a rank: the order that one process has for
the whole batch. The local experts are computed by the layer's own backend, each row as a token with one expert.

Shapes: T tokens, D hidden, E experts, K selected, P = T * K rows sent, R rows received, N ranks.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from soli import kernels
from soli.errors import SoliError
from soli.model.moe import RoutedExperts

PARAMETERS = ("gate_up_proj", "down_proj")


def distribute_experts(experts: RoutedExperts, mesh: DeviceMesh) -> None:
    """Keep this rank's experts of a layer and compute it together with the other ranks of `mesh`."""
    ranks = mesh.size()
    total = experts.gate_up_proj.shape[0]
    if total % ranks:
        raise SoliError(f"{total} experts cannot be shared by {ranks} ranks; parallel.expert must divide them")
    for name in PARAMETERS:
        whole = getattr(experts, name).detach()
        own = whole.chunk(ranks)[mesh.get_local_rank()].clone()
        setattr(experts, name, nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False)))
    group = mesh.get_group()

    def forward(x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        own = [_local(getattr(experts, name)) for name in PARAMETERS]
        return compute_experts(experts.backend, group, x_TD, expert_ids_TK, weights_TK, *own)

    experts.forward = forward  # type: ignore[method-assign]


def dispatch_note(ranks: int) -> str:
    """One line on how tokens reach experts of other ranks, for whoever starts a run."""
    is_installed = importlib.util.find_spec("deep_ep") is not None
    other = "DeepEP is installed, but not used" if is_installed else "DeepEP is not used"
    return f"{ranks} ranks share the experts; tokens travel by torch.distributed's all-to-all ({other})"


def compute_experts(
    backend: kernels.Backend,
    group: dist.ProcessGroup,
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """The routed part of the layer (T, D) for this rank's tokens; every rank of `group` calls it at the same time.

    The parameters are this rank's experts. A rank may have no tokens, and its experts may receive none.
    """
    T, K = expert_ids_TK.shape
    ranks, own_experts = group.size(), gate_up_E2FD.shape[0]
    order_P = expert_ids_TK.flatten().argsort(stable=True)
    counts_NE = kernels.count_tokens(expert_ids_TK, ranks * own_experts).view(ranks, own_experts)
    received_NE = torch.empty_like(counts_NE)
    dist.all_to_all_single(received_NE, counts_NE, group=group)
    send, receive = counts_NE.sum(1).tolist(), received_NE.sum(1).tolist()
    weights_P1 = weights_TK.flatten().index_select(0, order_P)[:, None]
    x_RD, weights_R1 = _Exchange.apply(group, send, receive, x_TD.index_select(0, order_P // K), weights_P1)
    ids_E = torch.arange(own_experts, device=order_P.device)
    ids_R1 = ids_E.repeat(ranks).repeat_interleave(received_NE.flatten())[:, None]
    if ids_R1.numel():
        y_RD = backend.experts(x_RD, ids_R1, weights_R1, gate_up_E2FD, down_EDF)
    else:
        # Nothing arrived: the parameters still take part, with zero gradients, as in every other rank.
        y_RD = x_RD * weights_R1.to(x_RD.dtype) + gate_up_E2FD[:0].sum() + down_EDF[:0].sum()
    (y_PD,) = _Exchange.apply(group, receive, send, y_RD)
    row_of_pair_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(T * K, device=order_P.device))
    return y_PD.index_select(0, row_of_pair_P).unflatten(0, (T, K)).sum(dim=1)


class _Exchange(torch.autograd.Function):
    """Rows to other ranks: `send[n]` of them to rank n, `receive[n]` from it, of each tensor.

    All tensors in one node: ranks whose graphs differ, because one of them has no rows, still run the collectives of
    the backward pass in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.route = group, send, receive
        return tuple(_all_to_all(tensor, group, send, receive) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        group, send, receive = ctx.route
        return None, None, None, *(_all_to_all(gradient, group, receive, send) for gradient in gradients)


def _all_to_all(rows: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), list(receive), list(send), group=group)
    return arrived


def _local(parameter: Tensor) -> Tensor:
    """This rank's experts of a parameter, differentiable."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
