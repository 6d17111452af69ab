"""What the parts of a model take in a format, what a token reads and computes of each: from a configuration alone, or,
where a folder has the weights, from the headers of its files.

Routed experts may stay on disk, all other weights stay in memory. Shapes: E experts, K chosen, D hidden, F width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

from soli.analysis.parameters import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    HEAD,
    NORMS,
    ROUTED,
    ROUTER,
    SHARED,
    Weights,
    mtp_weights,
    weights,
)
from soli.checkpoint.name_map import Slot
from soli.checkpoint.quantization import SOLI, parse_quantization
from soli.checkpoint.reader import Checkpoint
from soli.config import ModelConfig
from soli.errors import SoliError
from soli.experts.sources import ALIGNMENT, aligned, sources_of
from soli.formats.quantized import CODECS, FP4, FP8_ROW, INT8, IntegerCodec
from soli.kernels.cpu import native

FORMATS: Final = ("fp8", "bf16", "int8", "int4")  # that a table compares
JOINT: Final = "joint projection"  # of MTP modules
PARTS: Final = (ROUTED, SHARED, ATTENTION, DENSE, EMBEDDING, HEAD, ROUTER, NORMS)
# By the name that rates have.
FORMATS_OF_KERNELS: Final = {format: format for format in native.FORMATS} | {
    "int4_bf16": "int4", "fp8_row": "fp8", "nvfp4": "fp4", "mxfp4": "fp4"
}  # fmt: skip
# Of other programs, by the name that config.json leads to: codec and group of linear weights.
ONLY_READ: Final = {"nvfp4": (FP4.name, 16), "mxfp4": (FP4.name, 32), FP8_ROW.name: (FP8_ROW.name, 0)}
_HIGH_DTYPE: Final = {"fp32": 4}  # bytes of what is not quantized; elsewhere 2


@dataclass(frozen=True)
class PartSize:
    """`bytes` in memory or on disk, scales included; what one new token reads of them, and its FLOPs with them.
    `format`: of most of these bytes."""

    name: str
    format: str
    bytes: int
    bytes_per_token: int
    flops_per_token: int


@dataclass(frozen=True)
class ModelSizes:
    """The main model in one format. `expert_bytes`: one routed expert; `slot_bytes`: its slot in the cache of experts;
    `mtp_bytes`: the MTP modules, which are not loaded unless they draft."""

    config: ModelConfig
    format: str
    parts: tuple[PartSize, ...]
    expert_bytes: int
    slot_bytes: int
    mtp_bytes: int

    @property
    def layers(self) -> int:
        """That have routed experts."""
        return self.config.num_moe_layers

    @property
    def experts(self) -> int:
        """In all layers together."""
        return self.layers * self.config.n_routed_experts

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def resident_bytes(self) -> int:
        """Of the weights that stay in memory: all but routed experts."""
        return sum(part.bytes for part in self.parts if part.name != ROUTED)

    @property
    def least_experts(self) -> int:
        """That must be in memory at once: those that a token chooses in a layer."""
        return min(self.config.num_experts_per_tok, self.experts)


def published_formats(config: ModelConfig) -> dict[str, str]:
    """The format of each part by what config.json announces. SoliError for what Soli does not read."""
    dtype = config.extra.get("torch_dtype") or config.extra.get("dtype")
    high = "fp32" if dtype == "float32" else "bf16"
    try:
        quantization = parse_quantization(config.quantization_config)
    except SoliError as error:
        raise SoliError(f"{error}: choose a format with --format") from None
    if quantization.method in (SOLI, "fp8"):  # of every weight that has this format in Soli's own files
        everywhere = quantization.format_of([""]) or high
        return dict.fromkeys((*PARTS, JOINT), FORMATS_OF_KERNELS[everywhere])
    last = config.num_hidden_layers - 1
    modules = {
        ROUTED: f"model.layers.{last}.mlp.experts.0.down_proj",
        SHARED: f"model.layers.{last}.mlp.shared_experts.down_proj",
        ATTENTION: f"model.layers.{last}.self_attn.o_proj",
        DENSE: "model.layers.0.mlp.down_proj",
    }
    names = {part: [module, f"language_model.{module}"] for part, module in modules.items()}
    formats_of = {part: quantization.format_of(names[part]) or high for part in names}
    return dict.fromkeys((*PARTS, JOINT), high) | {
        part: format if format in ONLY_READ else FORMATS_OF_KERNELS[format] for part, format in formats_of.items()
    }


def published_format(config: ModelConfig) -> str:
    """The format of the routed experts that config.json announces. SoliError for one that Soli does not read."""
    return published_formats(config)[ROUTED]


def sizes_in(config: ModelConfig, format: str) -> ModelSizes:
    """Every tensor in `format` as `soli convert` writes it, by the configuration. SoliError for a model without routed
    experts."""
    return _sizes(config, dict.fromkeys((*PARTS, JOINT), format))


def sizes_as_published(config: ModelConfig) -> ModelSizes:
    """Every tensor as the published files have it, by the configuration alone."""
    return _sizes(config, published_formats(config))


def _sizes(config: ModelConfig, formats: Mapping[str, str]) -> ModelSizes:
    _require_experts(config, str(config.model_type), None)
    groups = weights(config)
    names = [name for name in PARTS if any(group.component == name for group in groups)]
    parts = tuple(
        _part(name, [group for group in groups if group.component == name], formats[name]) for name in names
    )
    routed = [group for group in groups if group.component == ROUTED]
    experts = config.num_moe_layers * config.n_routed_experts
    expert = sum(_bytes(group, formats[ROUTED]) for group in routed) // experts
    mtp = sum(_bytes(group, formats[group.component]) for group in mtp_weights(config))
    slot_bytes = aligned(expert) + ALIGNMENT
    format = FORMATS_OF_KERNELS[formats[ROUTED]]
    return ModelSizes(config, format, _with_tied_head(config, parts), expert, slot_bytes, mtp)


def sizes_of(checkpoint: Checkpoint) -> ModelSizes:
    """Of a folder as it is, opened with its MTP modules."""
    config = checkpoint.config
    _require_experts(config, str(checkpoint.folder), sum(_stored(checkpoint, slot) for slot in checkpoint.slots))
    main = [slot for slot in checkpoint.slots if not slot.copy and not slot.soli.startswith("mtp.")]
    mtp = [slot for slot in checkpoint.slots if not slot.copy and slot.soli.startswith("mtp.")]
    by_config = {part.name: part for part in sizes_in(config, "bf16").parts}
    by_part: dict[str, list[Slot]] = {name: [] for name in PARTS}
    for slot in main:
        by_part[_part_of(slot)].append(slot)
    parts = []
    for name, slots in by_part.items():
        if not slots:
            continue
        size = sum(_stored(checkpoint, slot) for slot in slots)
        share = by_config[name].bytes_per_token / by_config[name].bytes  # the same in every format
        format = _format_of(checkpoint, max(slots, key=lambda slot: prod(slot.shape)))
        parts.append(PartSize(name, format, size, round(share * size), by_config[name].flops_per_token))
    routed = next(part for part in parts if part.name == ROUTED)
    expert_bytes = routed.bytes // (config.num_moe_layers * config.n_routed_experts)
    return ModelSizes(
        config=config,
        format=routed.format,
        parts=tuple(parts),
        expert_bytes=expert_bytes,
        slot_bytes=_slot_bytes(checkpoint, expert_bytes),
        mtp_bytes=sum(_stored(checkpoint, slot) for slot in mtp),
    )


def _slot_bytes(checkpoint: Checkpoint, expert_bytes: int) -> int:
    """Of the cache; where experts are not read from these files, of those of a pack of them."""
    try:
        return sources_of(checkpoint).slot_bytes
    except SoliError:
        return aligned(expert_bytes) + ALIGNMENT


def _require_experts(config: ModelConfig, name: str, size: int | None) -> None:
    if config.num_moe_layers == 0:
        total = sum(group.bytes_bf16 for group in weights(config)) if size is None else size
        raise SoliError(
            f"{name}: the model has no routed experts that could stay on disk, so all of its {total:,} bytes must fit "
            "in memory; soli count shows what it has"
        )


def _part(name: str, groups: Iterable[Weights], format: str) -> PartSize:
    groups = list(groups)
    size = sum(_bytes(group, format) for group in groups)
    read = sum(_bytes(group, format) * group.active // group.count for group in groups if group.active)
    flops = sum(2 * group.activated for group in groups if len(group.shape) == 2)
    if name == EMBEDDING:  # a token reads one row
        read, flops = size // groups[0].shape[0], 0
    largest = max(groups, key=lambda group: group.total)
    codec = _codec(largest, format)
    high = "fp32" if format == "fp32" else "bf16"
    return PartSize(name, high if codec is None else FORMATS_OF_KERNELS[codec[0]], size, read, flops)


def _with_tied_head(config: ModelConfig, parts: tuple[PartSize, ...]) -> tuple[PartSize, ...]:
    """Where embedding and head are one matrix, each token reads all of it."""
    if not config.tie_word_embeddings:
        return parts
    flops = 2 * config.vocab_size * config.hidden_size
    return tuple(
        PartSize(part.name, part.format, part.bytes, part.bytes, flops) if part.name == EMBEDDING else part
        for part in parts
    )


def _codec(group: Weights, format: str) -> tuple[str, int] | None:
    """(format, group of inputs) of tensors that are quantized; None for others. As checkpoint.writer.Target."""
    if format in ONLY_READ:
        return ONLY_READ[format] if group.storage == "linear" else None
    codec = CODECS[format]
    if isinstance(codec, IntegerCodec) and (group.storage == "linear" or group.component == HEAD):
        codec = INT8 if group.component == HEAD else codec
        fitting = codec.fitting_group(group.shape[1], codec.groups[0])
        return None if fitting is None else (codec.name, fitting)
    if format == "fp8" and group.storage == "linear":
        return "fp8", codec.groups[0]
    return None


def _bytes(group: Weights, format: str) -> int:
    quantization = _codec(group, format)
    if quantization is None:
        return group.total * (4 if group.storage == "fp32" else _HIGH_DTYPE.get(format, 2))
    codec = CODECS[quantization[0]]
    assert codec.scale_dtype is not None
    values = prod(codec.values_shape(group.shape)) * codec.values_dtype.itemsize
    scales = prod(codec.scale_shape(group.shape, quantization[1])) * codec.scale_dtype.itemsize
    return group.count * (values + scales)


def _part_of(slot: Slot) -> str:
    """The part that a tensor of the main model belongs to."""
    name = slot.soli
    if slot.expert is not None:
        return ROUTED
    by_fragment: Mapping[str, str] = {
        ".shared_experts.": SHARED, "mlp.gate.": ROUTER, "norm": NORMS, ".self_attn.": ATTENTION, ".mlp.": DENSE,
        "embed_tokens": EMBEDDING, "lm_head": HEAD,
    }  # fmt: skip
    return next(part for fragment, part in by_fragment.items() if fragment in name)


def _stored(checkpoint: Checkpoint, slot: Slot) -> int:
    """Bytes of a tensor with its scales in memory."""
    if not checkpoint.holds(slot):
        return 0
    return checkpoint.bytes_as_stored(slot)


def _format_of(checkpoint: Checkpoint, slot: Slot) -> str:
    """By the name that rates are measured by."""
    return FORMATS_OF_KERNELS[checkpoint.format(slot)]
