"""A model whose routed experts stay in its files, with a cache of them in memory."""

from pathlib import Path
from typing import Final

import torch
from torch import nn

from soli.checkpoint.load import load_checkpoint, open_checkpoint
from soli.checkpoint.reader import Checkpoint
from soli.checkpoint.writer import ProgressCallback
from soli.errors import SoliError
from soli.experts.budget import BandwidthRates, MemoryBudget
from soli.experts.disk import Disk, measured_disk
from soli.experts.memory_rate import measured_memory
from soli.experts.policy import DEFAULT
from soli.experts.reading import USUAL, Settings
from soli.experts.sources import Sources, sources_of
from soli.experts.store import ExpertStore
from soli.experts.usage import UsageFile, usage_file
from soli.machine import resident_memory
from soli.model import Transformer
from soli.model.layers import Linear

MEASURED_BYTES: Final = 2**30  # of experts, below which the time of measuring the disk is not worth it


def load_paged_model(
    name_or_folder: str | Path,
    capacity: int | None = None,
    *,
    mtp: bool = True,
    policy: str = DEFAULT,
    prefetch: str = "auto",
    settings: Settings = USUAL,
    poison: bool = False,
    progress: ProgressCallback = lambda read, total: None,
) -> tuple[Transformer, ExpertStore]:
    """A model on the CPU, as stored, and the store of its experts, of which `capacity` are in memory at once; None: as
    many as a token chooses in a layer, until the store is resized.

    `policy`, `prefetch`, `settings` and `poison` as in ExpertStore. SoliError for a folder without routed experts, and
    what `load_model` raises.
    """
    checkpoint = open_checkpoint(name_or_folder, mtp, mapped=False)
    sources = sources_of(checkpoint)
    least = least_experts(checkpoint, sources)
    if capacity is not None and capacity < least:
        raise SoliError(
            f"{checkpoint.folder}: a token chooses {least} experts of a layer, but only {capacity} fit in memory: "
            f"give {(least - capacity) * sources.slot_bytes:,} bytes more"
        )
    size = least if capacity is None else capacity
    store = ExpertStore(sources, size, policy=policy, prefetch=prefetch, settings=settings, poison=poison)
    return _load(checkpoint, store, progress), store


def load_within(
    name_or_folder: str | Path,
    memory: int,
    *,
    mtp: bool = True,
    progress: ProgressCallback = lambda read, total: None,
) -> tuple[Transformer, MemoryBudget]:
    """A model that takes `memory` bytes, and how they are divided. SoliError, before a weight is read, where the
    weights that stay in memory take more."""
    checkpoint = open_checkpoint(name_or_folder, mtp, mapped=False)
    sources = sources_of(checkpoint)
    least = least_experts(checkpoint, sources)
    resident, experts = least_bytes_of(checkpoint, sources)
    if resident + experts > memory:
        raise SoliError(
            f"{checkpoint.folder}: the weights that stay in memory take {resident:,} bytes and the {least} experts "
            f"that a token chooses in a layer {experts:,}, but {memory:,} bytes are allowed: allow more"
        )
    overhead = resident_memory()
    disk = _disk(checkpoint, sources)
    store = ExpertStore(sources, least, settings=USUAL if disk is None else disk.settings)
    model = _load(checkpoint, store, progress)
    resident = resident_bytes(model)
    return model, MemoryBudget(
        memory,
        resident,
        overhead,
        least,
        store,
        resident_per_pass=resident - _embedding_bytes(model),
        rates=BandwidthRates() if disk is None else BandwidthRates(disk.rate, measured_memory().rate),
        usage_file=usage_file(checkpoint, sources.layers),
    )


def _load(checkpoint: Checkpoint, store: ExpertStore, progress: ProgressCallback) -> Transformer:
    """A model whose experts are those of a store; what else is in the checkpoint is read into memory."""
    paged = {source.name: experts for source, experts in zip(store.sources.layers, store.layers, strict=True)}
    return load_checkpoint(checkpoint, torch.device("cpu"), quantized=True, paged=paged, progress=progress)


def usage_file_of(name_or_folder: str | Path) -> UsageFile:
    """Where it is remembered which experts of a folder were used."""
    checkpoint = open_checkpoint(name_or_folder)
    return usage_file(checkpoint, sources_of(checkpoint).layers)


def _disk(checkpoint: Checkpoint, sources: Sources) -> Disk | None:
    """The disk of a model; None for a model that is too small to measure it with, and where it cannot be measured."""
    if sum(len(layer.experts) * layer.expert_bytes for layer in sources.layers) < MEASURED_BYTES:
        return None
    try:
        return measured_disk(checkpoint.folder)
    except SoliError:
        return None


def least_experts(checkpoint: Checkpoint, sources: Sources) -> int:
    """How many experts must be in memory at once."""
    return min(checkpoint.config.num_experts_per_tok or 1, sources.count)


def least_bytes_of(checkpoint: Checkpoint, sources: Sources) -> tuple[int, int]:
    """(weights that stay in memory, experts that a token chooses in a layer), before a weight is read."""
    slots = (slot for slot in checkpoint.slots if slot.expert is None and not slot.copy)
    resident = sum(map(checkpoint.bytes_as_stored, slots))
    return resident, least_experts(checkpoint, sources) * sources.slot_bytes


def _embedding_bytes(model: Transformer) -> int:
    """Of the embedding, of which a token reads one row; 0 where the head is the same weight, which it reads whole."""
    return 0 if model.config.tie_word_embeddings else model.embed_tokens.weight.nbytes


def resident_bytes(model: nn.Module) -> int:
    """Of all weights but those of routed experts."""
    tensors = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    quantized = (
        module.quantized.nbytes
        for module in model.modules()
        if isinstance(module, Linear) and module.quantized is not None
    )
    return sum(tensors.values()) + sum(quantized)
