"""Parameters in shards: FSDP2 per block for the dense ones, experts over the ranks that share them.

A forward pass gathers the parameters of one block at a time, a backward pass sums its gradients over the ranks and
leaves each rank its shard. What a step does with single elements (moments, weight decay) works on local tensors, so it
computes the bits that one process does; what needs whole matrices gathers them.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.export import register_dataclass

from soli.model.layers import Linear
from soli.model.router import Routing
from soli.model.transformer import BackboneOutput, Transformer
from soli.parallel.dispatch import PARAMETERS, distribute_experts
from soli.parallel.mesh import Meshes
from soli.parallel.ranks import local_tensor, own_values


def shard_model(model: Transformer, meshes: Meshes, stages: Sequence[nn.Module] = ()) -> None:
    """Leave this rank its shards of `model`, which holds the same values on every rank. `stages`: what it computes, if
    that is not the model as a whole."""
    if meshes.expert.size() > 1:
        for _, mixture in model.moe_layers():
            _shard_experts(mixture.experts, meshes)
    if meshes.dense.size() == 1:
        return
    register_outputs()
    for block in (*model.layers, *(module.get_submodule("block") for module in model.mtp), *model.mtp):
        if any(True for _ in block.parameters()):  # not in place of one that another rank has
            fully_shard(block, mesh=meshes.dense)
    for root in stages or (model,):
        fully_shard(root, mesh=meshes.dense)
    if not stages:
        for name in ("backbone", "mtp_step", "head"):
            register_fsdp_forward_method(model, name)
    for module in _all_modules(stages or (model,)):
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a loss is divided by the counts of the whole step: ranks add up
            module.set_force_sum_reduction_for_comms(True)
            if meshes.dense.device_type == "cpu":
                module.set_custom_reduce_scatter(_OrderedSum())  # type: ignore[arg-type]


@functools.cache
def register_outputs() -> None:
    """Let FSDP2 find the tensors that a forward pass returns: their gradients tell it to gather parameters again.

    Of dataclasses torch 2.11 looks into registered ones alone; it would compute with freed parameters otherwise.
    """
    for output in (BackboneOutput, Routing):
        register_dataclass(output)


@torch.no_grad()
def init_shards(
    model: Transformer,
    device: torch.device,
    generator: torch.Generator,
    parameters: Mapping[str, Tensor] | None = None,
) -> None:
    """Give a sharded model that was built without memory the values of `Transformer.init_weights`.

    Every rank draws every parameter, one after another, and keeps its part: the same numbers on any number of ranks.
    `parameters`: those of the whole model, of any device, where this rank has not all of its layers.
    """
    model.to_empty(device=device)
    if model.config.tie_word_embeddings and isinstance(model.lm_head, Linear):
        model.lm_head.weight = model.embed_tokens.weight  # which memory of its own has parted
    own = dict(model.named_parameters())
    for name, parameter in (own if parameters is None else parameters).items():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        model.init_parameter(name, whole, generator)
        if name in own:
            local_tensor(own[name]).copy_(own_values(whole, own[name]))
    for _, mixture in model.moe_layers():
        if mixture.gate.e_score_correction_bias is not None:
            mixture.gate.e_score_correction_bias.zero_()


def _shard_experts(experts: nn.Module, meshes: Meshes) -> None:
    distribute_experts(experts, meshes.expert)  # type: ignore[arg-type]
    own = experts.get_parameter(PARAMETERS[0]).shape[0] // meshes.expert.size()
    data = meshes.expert_data.size(-1)
    dimension = 0 if own % data == 0 else 1  # too few experts for every rank to have some: a part of each
    fully_shard(experts, mesh=meshes.expert_data, shard_placement_fn=lambda parameter: Shard(dimension))


class _OrderedSum:
    """Sums gradients in the order of ranks. gloo's own sum depends on the number of ranks and the size of tensors.

    What `set_custom_reduce_scatter` takes; torch has no public name for the type.
    """

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        first, *others = parts.chunk(group.size())
        output_tensor.copy_(first)
        for part in others:
            output_tensor += part


def keep_gathered(model: nn.Module, is_last: bool) -> None:
    """For the next forward and backward pass of a step: parameters stay gathered and gradients whole on their rank,
    until the pass that `is_last` leaves shards of both."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(is_last)
        model.set_requires_gradient_sync(is_last)


def release(*models: nn.Module) -> None:
    """Keep the shards alone, after forward passes that no backward pass followed."""
    for module in _all_modules(models):
        if isinstance(module, FSDPModule):
            module.reshard()


def _all_modules(roots: Sequence[nn.Module]) -> Iterator[nn.Module]:
    return (module for root in roots for module in root.modules())


def as_shard(local: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded as the parameter `like`, as such; a plain tensor itself."""
    return _sharded(local, like, like.placements) if isinstance(like, DTensor) else local


def gather_matrices(local: Tensor, like: Tensor) -> Tensor:
    """Whole matrices (the last two dimensions) of a tensor that is sharded as the parameter `like`: those of which this
    rank has a part. Every rank calls it at the same time."""
    if not isinstance(like, DTensor) or _whole_matrices(like) == like.placements:
        return local
    return _sharded(local, like, like.placements).redistribute(placements=_whole_matrices(like)).to_local()


def keep_own_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part again of what `gather_matrices` returned."""
    if not isinstance(like, DTensor) or _whole_matrices(like) == like.placements:
        return whole
    return _sharded(whole, like, _whole_matrices(like)).redistribute(placements=like.placements).to_local()


def _sharded(local: Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _whole_matrices(like: DTensor) -> tuple[Placement, ...]:
    """The placements of `like` without those that cut its last two dimensions."""
    cut = range(like.ndim - 2, like.ndim)
    return tuple(Replicate() if getattr(p, "dim", None) in cut else p for p in like.placements)
