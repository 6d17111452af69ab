"""The meshes of a run: how its ranks share the layers, the dense parameters, and the experts.

World size = pipeline x replicate x data x expert, the expert number varying fastest. The ranks of a pipeline stage are
data-parallel: each has its own share of the batch, which the ranks at its place in the other stages have too. Dense
parameters are sharded over data x expert ranks (FSDP), and copied `replicate` times (HSDP). Expert parallelism borrows
`expert` of these ranks: each has E / expert experts of every layer, whose parameters, moments and gradients are sharded
over the `data` ranks that have the same experts.
"""

import dataclasses
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Meshes:
    """`expert`: ranks with different experts. `dense`, `expert_data`: replicas (if any) and shards of parameters.
    `pipeline`: ranks with the same share of the batch; `shares`: those of one stage."""

    dense: DeviceMesh
    expert: DeviceMesh
    expert_data: DeviceMesh
    pipeline: DeviceMesh | None = None
    shares: DeviceMesh | None = None


def build_meshes(data: int, expert: int, replicate: int, kind: str, pipeline: int = 1) -> Meshes:
    """The meshes of a device `kind` (cpu, cuda) over all ranks. Every rank builds them at the same time."""
    stages = () if pipeline == 1 else (pipeline,)
    name = ("pipeline",) if stages else ()
    dense = init_device_mesh(kind, (*stages, replicate, data * expert), mesh_dim_names=(*name, "replicate", "shard"))
    names = (*name, "replicate", "data", "expert")
    experts = init_device_mesh(kind, (*stages, replicate, data, expert), mesh_dim_names=names)
    if replicate == 1:
        meshes = Meshes(dense["shard"], experts["expert"], experts["data"])
    else:
        shards = dense["replicate", "shard"] if stages else dense
        meshes = Meshes(shards, experts["expert"], experts["replicate", "data"])
    if not stages:
        return meshes
    columns = init_device_mesh(kind, (pipeline, replicate * data * expert), mesh_dim_names=("pipeline", "share"))
    return dataclasses.replace(meshes, pipeline=columns["pipeline"], shares=columns["share"])
