"""The meshes of a run: how its ranks share the dense parameters, and how the experts.

World size = replicate x data x expert, the expert number varying fastest. All ranks are data-parallel: each has its own
share of the batch. Dense parameters are sharded over data x expert ranks (FSDP), and copied `replicate` times (HSDP).
Expert parallelism borrows `expert` of these ranks: each has E / expert experts of every layer, whose parameters,
moments and gradients are sharded over the `data` ranks that have the same experts.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Meshes:
    """`expert`: ranks with different experts. `dense`, `expert_data`: replicas (if any) and shards of parameters."""

    dense: DeviceMesh
    expert: DeviceMesh
    expert_data: DeviceMesh


def build_meshes(data: int, expert: int, replicate: int, kind: str) -> Meshes:
    """The meshes of a device `kind` (cpu, cuda) over all ranks. Every rank builds them at the same time."""
    dense = init_device_mesh(kind, (replicate, data * expert), mesh_dim_names=("replicate", "shard"))
    experts = init_device_mesh(kind, (replicate, data, expert), mesh_dim_names=("replicate", "data", "expert"))
    if replicate == 1:
        return Meshes(dense["shard"], experts["expert"], experts["data"])
    return Meshes(dense, experts["expert"], experts["replicate", "data"])
