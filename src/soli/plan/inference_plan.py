"""`soli plan`: what a model takes, what of it fits in a memory, and how fast it will be there, before it is downloaded.

The division of memory is the engine's (soli.experts.budget, soli.engine.scratch) for one request at a time; the time is
soli.plan.inference's. Upgrades and other formats are answered by the same functions with other arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from soli.analysis.parameters import ROUTED, cache_bytes, cache_read_bytes
from soli.checkpoint.load import BUNDLED, open_checkpoint
from soli.checkpoint.quantization import announced_quantization
from soli.config import ModelConfig, resolve
from soli.engine.offline import limits_of_texts
from soli.engine.scratch import limit_scratch, token_bytes, tokens_per_call
from soli.errors import SoliError
from soli.experts.budget import divide_bytes
from soli.experts.load import usage_file_of
from soli.experts.policy import ExpertUsage, policy_bytes
from soli.hub.cache import INDEX, cache_folder, find_folder, shards_of
from soli.input_files import TABLE_BYTES, read_object
from soli.plan.inference import (
    KERNEL_EFFICIENCY,
    MachineRates,
    Prediction,
    expected_hit_rate,
    predict_decode,
    predict_prompt,
    remembered_hit_rate,
)
from soli.plan.sizes import FORMATS, ModelSizes, sizes_as_published, sizes_in, sizes_of

PROMPT: Final = 512  # tokens, after which decoding begins
ANSWER: Final = 256  # tokens that the latent cache has room for beside the prompt
USUAL_MEMORY: Final = (
    *(size * 10**6 for size in (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)),
    *(size * 10**9 for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)),
)
COLUMNS: Final = 6  # memory sizes beside the one at hand
GPU_RATE: Final = 900e9  # bytes per second of a GPU whose rate is not stated: that of a card with 24 GB of 2020 to 2023


@dataclass(frozen=True)
class PlannedWorkload:
    """A prompt of so many tokens, and how experts are chosen: as in earlier runs (`usage`), or as often as `skew` says
    where that is None."""

    prompt: int = PROMPT
    skew: float = 0.0
    usage: ExpertUsage | None = None

    @property
    def tokens(self) -> int:
        """That the latent cache has room for."""
        return self.prompt + ANSWER


USUAL_WORKLOAD: Final = PlannedWorkload()


@dataclass(frozen=True)
class PlannedModel:
    """A model before it is opened: `folder` None for what is not on this machine, `stored` whether weights are there,
    `place` where they are or would be."""

    name: str
    config: ModelConfig
    folder: Path | None
    stored: bool
    place: Path

    def sizes(self, format: str | None = None) -> ModelSizes:
        """In a format, None: as published or stored."""
        if format is None and self.stored:
            assert self.folder is not None
            return sizes_of(open_checkpoint(self.folder))
        try:
            return sizes_as_published(self._published_config()) if format is None else sizes_in(self.config, format)
        except SoliError as error:
            raise SoliError(f"{self.name}: {error}") from None

    def _published_config(self) -> ModelConfig:
        """The configuration with what ModelOpt's file beside it says of the weights."""
        if self.folder is None:
            return self.config
        return replace(self.config, quantization_config=announced_quantization(self.folder, self.config))

    def usage(self) -> ExpertUsage | None:
        """Which experts earlier runs of this model chose; None where that is not known."""
        if not self.stored or self.folder is None or self.config.num_moe_layers == 0:
            return None
        usage = usage_file_of(self.folder).read()
        return usage if usage is not None and usage.shares_LE.any() else None

    @property
    def index_bytes(self) -> int | None:
        """Of all tensors, MTP modules included, as the index of the files says; None without one."""
        index = None if self.folder is None else self.folder / INDEX
        if index is None or not index.is_file():
            return None
        metadata = read_object(index, TABLE_BYTES).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        return int(size) if isinstance(size, int | float) and 0 < size < 2**62 else None


@dataclass(frozen=True)
class Division:
    """How `memory` bytes are divided, as `--memory` does: `slots` for routed experts, of which `least` must be there at
    once. With `needed` bytes the model fits."""

    memory: int
    resident: int
    scratch: int
    latent_cache: int
    slots: int
    experts: int
    least: int
    tokens_per_call: int
    needed: int = 0

    @property
    def fits(self) -> bool:
        return self.slots >= self.least

    @property
    def share(self) -> float:
        """Of the routed experts that are in memory."""
        return self.slots / self.experts


@dataclass(frozen=True)
class Speed:
    """Decoding after a prompt, and the prompt."""

    decode: Prediction
    prompt: Prediction


@dataclass(frozen=True)
class Upgrade:
    """What one change of the machine brings. `resource`: memory, disk or memory rate; `value`: bytes, or bytes per
    second, after it."""

    resource: str
    value: float
    decode_tokens_per_second: float
    prefill_tokens_per_second: float


@dataclass(frozen=True)
class GpuSplit:
    """Experts in memory, everything else on one GPU, as other programs offer it and Soli does not."""

    gpu_bytes: int
    needed_bytes: int
    expert_bytes: int
    fits_gpu: bool
    fits_memory: bool
    decode_tokens_per_second: float | None


def find_model(name: str) -> PlannedModel:
    """A preset, a folder, or a downloaded model by its ID, of which config.json suffices. SoliError that names the
    command which fetches it."""
    config = resolve(name)
    folder: Path | None = Path(name)
    if not Path(name).exists():
        bundled = BUNDLED / name
        folder = bundled if bundled.is_dir() else find_folder(name, config_only=True)
    elif Path(name).is_file():
        folder = Path(name).parent
    stored = folder is not None and _has_weights(folder) and not Path(name).is_file()
    return PlannedModel(name, config, folder, stored, folder or cache_folder())


def _has_weights(folder: Path) -> bool:
    """Whether all weight files that a folder should have are there."""
    index = folder / INDEX
    if index.is_file():
        return all((folder / file).is_file() for file in shards_of(index))
    return any(folder.glob("*.safetensors"))


def divide(sizes: ModelSizes, memory: int, tokens: int) -> Division:
    """Of `memory` bytes for one request of `tokens` tokens, prompt and answer."""
    division = _divide(sizes, memory, tokens)
    below, enough = (sizes.resident_bytes, memory) if division.fits else (memory, 2 * max(memory, sizes.resident_bytes))
    while not _divide(sizes, enough, tokens).fits:
        enough *= 2
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (below, middle) if _divide(sizes, middle, tokens).fits else (middle, enough)
    return replace(division, needed=enough)


def _divide(sizes: ModelSizes, memory: int, tokens: int) -> Division:
    """As the engine divides it, without `needed`."""
    config = sizes.config
    dtype = torch.float32 if sizes.format == "fp32" else torch.bfloat16
    limits = limits_of_texts(config, dtype, 1, tokens, paged=True)
    limits, scratch = limit_scratch(config, limits, dtype, memory - sizes.resident_bytes)
    free = memory - sizes.resident_bytes - scratch
    policy = policy_bytes(sizes.layers, config.n_routed_experts)
    latent_cache, slots = divide_bytes(free, limits.cache_bytes, sizes.slot_bytes, sizes.experts, policy)
    return Division(
        memory=memory,
        resident=sizes.resident_bytes,
        scratch=scratch,
        latent_cache=latent_cache,
        slots=max(0, min(slots, sizes.experts)),
        experts=sizes.experts,
        least=sizes.least_experts,
        tokens_per_call=min(limits.tokens_per_step, tokens_per_call(token_bytes(config), paged=True)),
    )


def speed(
    sizes: ModelSizes, division: Division, machine: MachineRates, workload: PlannedWorkload = USUAL_WORKLOAD
) -> Speed | None:
    """None where the model does not fit."""
    if not division.fits:
        return None
    prompt, usage = workload.prompt, workload.usage
    if usage is None or division.slots == division.experts:
        hit_rate = expected_hit_rate(division.share, sizes.config.n_routed_experts, workload.skew)
    else:
        hit_rate = remembered_hit_rate(usage.shares_LE, usage.tokens, division.slots)
    return Speed(
        predict_decode(sizes, machine, division.share, prompt, hit_rate),
        predict_prompt(sizes, machine, division.share, prompt, division.tokens_per_call),
    )


def table_of_formats(
    model: PlannedModel, machine: MachineRates, memories: Sequence[int], workload: PlannedWorkload
) -> dict[str, tuple[ModelSizes, list[Speed | None]]]:
    """By format, as published first, the speed for each memory; None where a model does not fit."""
    formats: dict[str, ModelSizes] = {"as stored" if model.stored else "as published": model.sizes()}
    formats |= {format: sizes_in(model.config, format) for format in FORMATS}

    def speed_in(sizes: ModelSizes, memory: int) -> Speed | None:
        return speed(sizes, divide(sizes, memory, workload.tokens), machine, workload)

    return {name: (sizes, [speed_in(sizes, memory) for memory in memories]) for name, sizes in formats.items()}


def memories_to_compare(sizes: ModelSizes, memory: int) -> list[int]:
    """The memory at hand, and sizes that machines have, from the first that may do to one that holds all."""
    useful = [size for size in USUAL_MEMORY if sizes.resident_bytes < size < 2 * sizes.total_bytes] or [memory]
    step = max(1, -(-len(useful) // COLUMNS))
    return sorted({memory, *useful[::-1][::step]})


def upgrades(
    sizes: ModelSizes, memory: int, machine: MachineRates, workload: PlannedWorkload = USUAL_WORKLOAD
) -> list[Upgrade]:
    """Twice the memory, a disk twice as fast, memory twice as fast: each alone, the one that brings most first."""
    faster_disk = replace(machine, disk_rate=2 * machine.disk_rate)
    faster_memory = replace(
        machine,
        memory_rate=2 * machine.memory_rate,
        weight_rates={format: 2 * rate for format, rate in machine.weight_rates.items()},
    )
    changes = [
        ("memory", 2.0 * memory, 2 * memory, machine),
        ("disk", faster_disk.disk_rate, memory, faster_disk),
        ("memory rate", faster_memory.memory_rate, memory, faster_memory),
    ]
    results = []
    for resource, value, size, changed in changes:
        after = speed(sizes, divide(sizes, size, workload.tokens), changed, workload)
        if after is not None:
            results.append(
                Upgrade(resource, value, after.decode.tokens_per_second, after.prompt.tokens_per_second)
            )
    return sorted(results, key=lambda upgrade: -upgrade.decode_tokens_per_second)


def gpu_split(
    sizes: ModelSizes, memory: int, machine: MachineRates, gpu: int, gpu_rate: float = GPU_RATE, tokens: int = PROMPT
) -> GpuSplit:
    """Speeds are bandwidth-bound: the GPU reads all but experts and the latents, the CPU the experts of a token, one
    after the other; transfers between them are not counted."""
    needed = sizes.resident_bytes + tokens * cache_bytes(sizes.config)
    experts = sizes.expert_bytes * sizes.experts
    weights_read = sum(part.bytes_per_token for part in sizes.parts if part.name != ROUTED)
    read = weights_read + cache_read_bytes(sizes.config, tokens)
    routed = next(part for part in sizes.parts if part.name == ROUTED)
    seconds = read / (KERNEL_EFFICIENCY * gpu_rate) + routed.bytes_per_token / machine.weight_rates[routed.format]
    fits_gpu, fits_memory = needed <= gpu, experts <= memory
    return GpuSplit(gpu, needed, experts, fits_gpu, fits_memory, 1 / seconds if fits_gpu and fits_memory else None)
