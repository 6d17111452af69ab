"""Write a V3-architecture model as the GGUF file that llama.cpp opens: bf16, q8_0 or q4_0, MTP modules left out.

Names, shapes and keys are those of `soli convert --to gguf`; here matrices may also be quantized, the weights may be
random, and the vocabulary need not split text as llama.cpp does. A matrix whose rows are no multiple of 32 becomes
float16. Needs `pip install gguf`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from soli.checkpoint.gguf.metadata import ARCHITECTURE, add_shape
from soli.checkpoint.gguf.tensors import GgufTensor, plan
from soli.checkpoint.load import open_checkpoint
from soli.checkpoint.name_map import slots
from soli.checkpoint.reader import Checkpoint
from soli.config import ModelConfig, replace

Type = gguf.GGMLQuantizationType
TYPES = {"bf16": (Type.BF16, 32), "q8_0": (Type.Q8_0, 7), "q4_0": (Type.Q4_0, 2)}  # tensors', and the file's number
BLOCK, SCALE = {Type.Q4_0: 16, Type.Q8_0: 32}, {Type.Q4_0: 0.02 / 4.61, Type.Q8_0: 0.02 / 73.9}


def write_gguf(file: Path, config: ModelConfig | None, source: str | Path | None, quant: str) -> None:
    """Write `file` from the folder `source`, or, without one, from `config` with random blocks of codes."""
    checkpoint = None if source is None else open_checkpoint(source, mtp=False)
    config = checkpoint.config if checkpoint is not None else config
    assert config is not None
    config = replace(config, {"num_nextn_predict_layers": 0})
    kind, number = TYPES[quant]
    writer = gguf.GGUFWriter(str(file), ARCHITECTURE, use_temp_file=False)
    writer.add_name("soli-benchmark")
    writer.add_file_type(number)
    add_shape(writer, config)
    _write_tokens(writer, checkpoint.folder if checkpoint is not None else None, config)
    tensors = list(plan(config, slots(config)))
    for tensor in tensors:
        _add_info(writer, tensor, _type(tensor, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for tensor in tensors:
        own = _type(tensor, kind)
        writer.write_tensor_data(_random(tensor, own, rng) if checkpoint is None else _encoded(tensor, own, checkpoint))
    writer.close()


def _type(tensor: GgufTensor, kind: Any) -> Any:
    if tensor.is_high:
        return Type.F32
    return Type.F16 if kind in BLOCK and tensor.shape[-1] % 32 else kind


def _add_info(writer: Any, tensor: GgufTensor, kind: Any) -> None:
    raw = kind not in (Type.F32, Type.F16)
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if raw else tensor.shape
    dtype = np.dtype(np.uint8 if raw else np.float32 if kind == Type.F32 else np.float16)
    size = int(np.prod(shape)) * dtype.itemsize
    writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=kind if raw else None)


def _encoded(tensor: GgufTensor, kind: Any, checkpoint: Checkpoint) -> np.ndarray:
    parts = [tensor.select(checkpoint.values(slot, torch.float32)).numpy() for slot in tensor.parts]
    values = np.ascontiguousarray(np.stack(parts) if len(parts) > 1 else parts[0]).reshape(tensor.shape)
    if kind == Type.F32:
        return values
    return values.astype(np.float16) if kind == Type.F16 else gguf.quants.quantize(values, kind)


def _random(tensor: GgufTensor, kind: Any, rng: np.random.Generator) -> np.ndarray:
    """Norms one, quantised blocks of random codes under one scale, all else normal; weights of deviation 0.02."""
    if kind not in BLOCK:
        values = np.ones(tensor.shape, np.float32)
        if "norm" not in tensor.name:
            values = 0.02 * rng.standard_normal(tensor.shape, dtype=np.float32)
        return gguf.quants.quantize(values, kind)
    blocks = np.empty((int(np.prod(tensor.shape)) // 32, 2 + BLOCK[kind]), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(SCALE[kind]).tobytes(), np.uint8)
    blocks[:, 2:] = np.frombuffer(rng.bytes(blocks[:, 2:].size), np.uint8).reshape(len(blocks), -1)
    return blocks.reshape(*tensor.shape[:-1], -1)


def _write_tokens(writer: Any, folder: Path | None, config: ModelConfig) -> None:
    import models

    if folder is None:
        tokenizer = models.tokenizer(config.vocab_size)
    else:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
