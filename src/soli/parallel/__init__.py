"""Several processes, one model: the ranks and their meshes, dispatch to experts of other ranks, sharded parameters,
pipeline stages.

The only package that knows torch.distributed for models. `ranks` imports it when more than one process takes part;
`mesh`, `dispatch`, `sharding` and `pipeline` are imported only then.
"""

from typing import Final

GRACE: Final = 3.0  # seconds that a rank waits before it ends, for the one that says why to be the first
