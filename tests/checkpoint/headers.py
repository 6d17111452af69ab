"""Folders of full-size models that hold headers alone: files of the right length, whose bytes nobody has written."""

import json
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path

from soli.checkpoint.name_map import Kind, Slot, slots
from soli.checkpoint.shard import ITEM_BYTES
from soli.config import ModelConfig

SHARD_BYTES = 2**40  # a sparse file takes no room


def write_headers(folder: Path, config: ModelConfig, dtype_of: Callable[[Slot], str]) -> None:
    """config.json, the index, and shards of every tensor in `dtype_of` it; an FP8 tensor has its fp32 scales."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shards: list[dict[str, object]] = [{}]
    weight_map, offset = {}, 0
    for slot in slots(config):
        for name, dtype, shape in _tensors(slot, dtype_of(slot)):
            size = ITEM_BYTES[dtype] * prod(shape)
            if offset + size > SHARD_BYTES:
                shards.append({})
                offset = 0
            shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            weight_map[name] = f"model-{len(shards):05}.safetensors"
            offset += size
    for number, header in enumerate(shards, 1):
        text = json.dumps(header).encode()
        file = folder / f"model-{number:05}.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        end = max(entry["data_offsets"][1] for entry in header.values())  # type: ignore[index]
        with file.open("r+b") as stream:
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _tensors(slot: Slot, dtype: str) -> list[tuple[str, str, list[int]]]:
    tensors = [(slot.name, dtype, list(slot.shape))]
    if dtype == "F8_E4M3":
        tensors.append((f"{slot.name}_scale_inv", "F32", [ceil(side / 128) for side in slot.shape]))
    return tensors


def published_fp8(slot: Slot) -> str:
    """DeepSeek-V3.2's files: norms of the indexer and router biases are fp32."""
    if slot.kind is Kind.LINEAR:
        return "F8_E4M3"
    return "F32" if slot.kind is Kind.ROUTER_BIAS or ".k_norm." in slot.name else "BF16"


def published_bf16(slot: Slot) -> str:
    return "F32" if slot.kind is Kind.ROUTER_BIAS else "BF16"
