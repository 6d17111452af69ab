"""A model whose routed experts stay in its files, with a cache of them in memory."""

from collections.abc import Mapping
from pathlib import Path

from soli.checkpoint.load import load_model
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.writer import ProgressCallback
from soli.errors import SoliError
from soli.experts.policy import DEFAULT
from soli.experts.sources import sources_of
from soli.experts.store import ExpertStore
from soli.kernels import QuantizedExperts
from soli.model import Transformer


def load_paged_model(
    name_or_folder: str | Path,
    capacity: int,
    *,
    mtp: bool = True,
    policy: str = DEFAULT,
    direct: bool | None = None,
    poison: bool = False,
    progress: ProgressCallback = lambda read, total: None,
) -> tuple[Transformer, ExpertStore]:
    """A model on the CPU, as stored, and the store of its experts, of which `capacity` are in memory at once.

    `policy`, `direct` and `poison` as in ExpertStore. SoliError for a folder without routed experts, and what
    `load_model` raises.
    """
    stores: list[ExpertStore] = []

    def paged(checkpoint: Checkpoint) -> Mapping[str, QuantizedExperts]:
        sources = sources_of(checkpoint)
        K = checkpoint.config.num_experts_per_tok
        if capacity < min(K, sources.count):
            raise SoliError(
                f"{checkpoint.folder}: a token chooses {K} experts of a layer, but only {capacity} fit in memory: give "
                f"{(K - capacity) * sources.slot_bytes:,} bytes more"
            )
        stores.append(ExpertStore(sources, capacity, policy=policy, direct=direct, poison=poison))
        return {source.name: experts for source, experts in zip(sources.layers, stores[0].layers, strict=True)}

    model = load_model(name_or_folder, mtp=mtp, quantized=True, paged=paged, progress=progress)
    return model, stores[0]
