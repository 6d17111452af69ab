"""The models that the speed tables are measured on: V3 shapes with random weights, made the same way every time.

    python benchmarks/models.py LAB tiny bf16 int8 int4 gguf-bf16 gguf-q8_0 gguf-q4_0
    python benchmarks/models.py LAB all

    tiny    12 M parameters, 6 layers, 16 experts of which 4 are activated
    small   1.19 B, 172 M of them activated: 12 layers, 64 experts, 6 activated
    large   16 B, 3 B activated (the shape of Moonlight-16B-A3B, a smaller vocabulary): int4 and gguf-q4_0 alone
    nano    the bundled model

LAB/models/SHAPE is the bf16 folder that Soli, transformers and vLLM open, SHAPE-int8 and so on are Soli's quantized
ones, SHAPE-q8_0.gguf what llama.cpp opens (needs `pip install gguf`). tiny, small and nano hold the same weights in
every format. large is random quantized values, streamed tensor by tensor, so memory need not hold it. `all` takes
30 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record  # puts this tree's soli first on the path
import torch

from soli.checkpoint.convert import convert_checkpoint
from soli.checkpoint.name_map import Kind, Slot, slots
from soli.checkpoint.pack import write_pack
from soli.checkpoint.writer import Encoded, Target, write
from soli.config import ModelConfig
from soli.formats.quantized import INT8, Fp8Codec, QuantizedWeight

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256, num_hidden_layers=6, intermediate_size=768, moe_intermediate_size=128, n_routed_experts=16,
        num_experts_per_tok=4, n_shared_experts=1, num_attention_heads=4, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, kv_lora_rank=64, q_lora_rank=96, n_group=4, topk_group=2, vocab_size=4096,
    ),
    "small": dict(
        hidden_size=1024, num_hidden_layers=12, intermediate_size=4096, moe_intermediate_size=512, n_routed_experts=64,
        num_experts_per_tok=6, n_shared_experts=1, num_attention_heads=8, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, kv_lora_rank=256, q_lora_rank=384, n_group=1, topk_group=1, vocab_size=16384,
    ),
    "large": dict(
        hidden_size=2048, num_hidden_layers=27, intermediate_size=11264, moe_intermediate_size=1408,
        n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, num_attention_heads=16, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, q_lora_rank=None, n_group=1, topk_group=1,
        vocab_size=32768,
    ),
    "v3-layers": dict(  # two of DeepSeek-V3's layers, of experts alone
        hidden_size=7168, num_hidden_layers=2, first_k_dense_replace=0, intermediate_size=18432,
        moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1,
        num_attention_heads=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512,
        q_lora_rank=1536, n_group=8, topk_group=4, vocab_size=4096,
    ),
}  # fmt: skip
FOLDERS = ("bf16", "fp8", "int8", "int4")
GGUFS = ("gguf-bf16", "gguf-q8_0", "gguf-q4_0")
ALL = {"tiny": FOLDERS + GGUFS, "small": FOLDERS + GGUFS, "nano": FOLDERS + GGUFS, "large": ("int4", "gguf-q4_0")}
STD = 0.02
OUTPUTS = ("down_proj.weight", "o_proj.weight")
VALUES_STD = {"int4": 4.61, "int8": 73.3}  # of uniform codes, so that random quantized values make weights of STD


def config(shape: str) -> ModelConfig:
    """The configuration of one of SHAPES."""
    return ModelConfig.from_dict({"model_type": "deepseek_v3", "first_k_dense_replace": 1, **SHAPES[shape]})


def model_path(lab: Path, shape: str, kind: str) -> Path:
    """Where a model lies: the folder SHAPE or SHAPE-int8, or the file SHAPE-q8_0.gguf."""
    if kind in GGUFS:
        return lab / "models" / f"{shape}-{kind.removeprefix('gguf-')}.gguf"
    return lab / "models" / (shape if kind == "bf16" else f"{shape}-{kind}")


def make(lab: Path, shape: str, kind: str) -> Path:
    """Make one model unless it is there, and before it the bf16 folder that it is made from."""
    path = model_path(lab, shape, kind)
    if path.exists():
        return path
    record.progress(f"writing {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    streamed = shape == "large"
    source = None if streamed else "nano" if kind == "bf16" else make(lab, shape, "bf16")
    if kind in GGUFS:
        import gguf_file

        gguf_file.write_gguf(path, config(shape) if streamed else None, source, kind.removeprefix("gguf-"))
    elif streamed or (kind == "bf16" and shape != "nano"):
        write_random(path, config(shape), Target(kind))
    else:
        convert_checkpoint(source or "nano", path, Target(kind))
    return path


def write_random(folder: Path, config: ModelConfig, target: Target, pack: bool = False) -> None:
    """A folder of random weights and a tokenizer, or a pack of them. Memory: one tensor."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as holder:
        tokenizer_file = Path(holder) / "tokenizer.json"
        tokenizer_file.write_text(json.dumps(tokenizer(config.vocab_size)), encoding="utf-8")
        names = Path(holder) / "tokenizer_config.json"
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
        names.write_text(json.dumps(tokenizer_config), encoding="utf-8")
        extra = {path.name: path for path in (tokenizer_file, names)}
        if pack:
            write_pack(
                folder,
                config,
                slots(config),
                target,
                lambda slot: drawn_tensors(slot, target, generator),
                repr(target),
                extra,
                lambda written, total: None,
            )
        else:
            write(folder, config, slots(config), target, lambda slot: draw(slot, target, generator), extra)


def drawn_tensors(slot: Slot, target: Target, generator: torch.Generator) -> list[torch.Tensor]:
    """The same as the tensors of the files, values, and scales where there are any, for a model that is read from disk:
    embeddings are larger and what layers add to them is smaller, so that tokens are routed differently in every layer.
    """
    value = _draw_codes(slot, target, generator) or draw(slot, target, generator)
    factor = 50.0 if slot.soli == "embed_tokens.weight" else 0.1 if slot.name.endswith(OUTPUTS) else 1.0
    if isinstance(value, torch.Tensor):
        return [value * factor]
    assert value.scale is not None
    return [value.values, value.scale * factor]


def _draw_codes(slot: Slot, target: Target, generator: torch.Generator) -> QuantizedWeight | None:
    """A weight stored in FP8 without the time it takes to quantize one: random signs and mantissas between 0.5 and 2,
    whose root mean square is 1.2. None for other weights."""
    quantization = target.codec(slot)
    if quantization is None or not isinstance(quantization[0], Fp8Codec):
        return None
    codes = torch.empty(slot.shape, dtype=torch.uint8).random_(0, 256, generator=generator)
    values = codes.bitwise_and_(0b1000_1111).bitwise_or_(0b0011_0000).view(torch.float8_e4m3fn)
    codec, group = quantization
    scale_PQ = torch.full(codec.scale_shape(slot.shape, group), STD / 1.2)
    return QuantizedWeight(codec.name, values, scale_PQ, tuple(slot.shape), group)


def draw(slot: Slot, target: Target, generator: torch.Generator) -> Encoded:
    """A tensor's random values as `target` stores them: norms one, codes uniform, all else normal."""
    if len(slot.shape) == 1 and slot.kind is not Kind.ROUTER_BIAS:
        return torch.ones(slot.shape, dtype=target.dtype(slot))
    quantization = target.codec(slot)
    if quantization is None or isinstance(quantization[0], Fp8Codec):
        return target.encode(slot, torch.empty(slot.shape).normal_(0.0, STD, generator=generator))
    codec, group = quantization
    values = torch.empty(codec.values_shape(slot.shape), dtype=codec.values_dtype)
    values.random_(*((-127, 128) if codec is INT8 else (0, 256)), generator=generator)
    scale_OG = torch.full(codec.scale_shape(slot.shape, group), STD / VALUES_STD[codec.name], dtype=torch.float16)
    return QuantizedWeight(codec.name, values, scale_OG, tuple(slot.shape), group)


def tokenizer(vocab_size: int) -> Mapping[str, Any]:
    """`tokenizer.json` with a byte-level BPE of exactly `vocab_size` entries: bytes, and as many pairs as fit.

    Nothing is learnt: no text that these models write means anything, but every token must stand for some bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<bos>", "<eos>", *letters]
    merges = [(first, second) for first in letters for second in letters][: vocab_size - len(vocabulary)]
    vocabulary += [first + second for first, second in merges]
    assert len(vocabulary) == vocab_size, vocab_size
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in vocabulary[:2]])
    return json.loads(bpe.to_str())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path, help="folder for all of it")
    parser.add_argument("shape", choices=[*ALL, "all"])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(FOLDERS + GGUFS)}; none: all of them")
    arguments = parser.parse_args()
    shapes = ALL if arguments.shape == "all" else {arguments.shape: ALL[arguments.shape]}
    for shape, kinds in shapes.items():
        for kind in arguments.kinds or kinds:
            if kind not in kinds:
                sys.exit(f"{shape} is not made as {kind}: choose from {', '.join(kinds)}")
            print(make(arguments.lab, shape, kind))


if __name__ == "__main__":
    main()
