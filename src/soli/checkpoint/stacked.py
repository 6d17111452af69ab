"""Experts that a file holds stacked, as transformers 5 writes them on request, seen as the separate tensors of others;
and written so, in the families whose readers know nothing else.

    experts.gate_up_proj (E, 2F, D): of each expert the gate's F rows, then up's      experts.down_proj (E, D, F)

An expert's rows lie one after another, so each is a tensor of its own at a place in the same file: nothing is read or
copied. FP8 scales are stacked likewise, one row for 128; or there is one scale for each expert of a stack.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import prod
from typing import Final

from soli.checkpoint.name_map import Slot
from soli.checkpoint.shard import ITEM_BYTES, TensorEntry

STACKED: Final = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
MAX_EXPERTS: Final = 65_536  # of a layer; a header may claim 10^9
PARTS: Final = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split_stacked(entries: Mapping[str, TensorEntry], experts: int) -> dict[str, TensorEntry]:
    """`entries` with each stack of `experts` experts replaced by its parts; one of another shape stays as it is."""
    split: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        match = STACKED.fullmatch(name)
        parts = PARTS[match[2]] if match is not None else ()
        if match is not None and match[3] and entry.shape in ((experts,), (experts, 1, 1)) and experts <= MAX_EXPERTS:
            split.update(_scales_of_experts(entry, match[1], parts, match[3]))
        elif match is not None and _is_stack(entry, experts, len(parts)):
            split.update(_parts(entry, match[1], parts, match[3] or ""))
        else:
            split[name] = entry
    return split


def _is_stack(entry: TensorEntry, experts: int, parts: int) -> bool:
    shape = entry.shape
    return len(shape) == 3 and 0 < shape[0] == experts <= MAX_EXPERTS and 0 not in shape and shape[1] % parts == 0


def _parts(entry: TensorEntry, prefix: str, parts: tuple[str, ...], suffix: str) -> Iterator[tuple[str, TensorEntry]]:
    experts, rows, columns = entry.shape
    size = (entry.end - entry.start) // (experts * len(parts))
    start = entry.start
    for expert in range(experts):
        for part in parts:
            name = f"{prefix}.{expert}.{part}.weight{suffix}"
            shape = (rows // len(parts), columns)
            yield name, replace(entry, name=name, shape=shape, start=start, end=start + size)
            start += size


def _scales_of_experts(
    entry: TensorEntry, prefix: str, parts: tuple[str, ...], suffix: str
) -> Iterator[tuple[str, TensorEntry]]:
    """One scale for each expert, which its parts share."""
    experts = entry.shape[0]
    size = (entry.end - entry.start) // experts
    for expert in range(experts):
        start = entry.start + expert * size
        for part in parts:
            name = f"{prefix}.{expert}.{part}.weight{suffix}"
            yield name, replace(entry, name=name, shape=(), start=start, end=start + size)


def in_order_of_stacks(slots: Sequence[Slot]) -> list[Slot]:
    """The slots with the experts' tensors in the order in which a stack has them."""
    ordered: list[Slot] = []
    for _, group in groupby(slots, key=lambda slot: (slot.layer, slot.is_expert)):
        layer = [*group]
        ordered += sorted(layer, key=lambda slot: slot.soli, reverse=True) if layer[0].is_expert else layer
    return ordered


def stacks(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Slots in the order of stacks, those of one stack together, others alone."""
    return [[*group] for _, group in groupby(slots, key=lambda s: s.soli if s.is_expert else s.name)]


def stack_name(slot: Slot) -> str:
    """Of the stack that an expert's tensor belongs to."""
    return f"model.layers.{slot.layer}.mlp.experts.{slot.soli.rpartition('.')[2]}"


def stack_spec(stack: Sequence[Slot], dtype: str) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape (E, rows, columns) of a stack."""
    experts = len({slot.expert for slot in stack})
    rows = sum(slot.shape[0] for slot in stack) // experts
    return stack_name(stack[0]), dtype, (experts, rows, stack[0].shape[1])


def offsets_in_stack(stack: Sequence[Slot], dtype: str, start: int) -> dict[str, int]:
    """Where each tensor of a stack begins, of a stack that begins at `start`."""
    offsets = {}
    for slot in stack:
        offsets[slot.name] = start
        start += prod(slot.shape) * ITEM_BYTES[dtype]
    return offsets
