"""A small mixture in every format that experts are read from disk in, and answers of it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from soli.checkpoint import load_model, save_model
from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Answer, Request
from soli.engine.runner import RunnerName
from soli.engine.text_model import text_model
from soli.experts.store import ExpertStore
from soli.model import Transformer
from tests.checkpoint import published
from tests.checkpoint.folders import edit_json, edit_tensors
from tests.checkpoint.test_variants import stack_experts
from tests.engine.tiny import tiny_model, tiny_tokenizer

SOLIS_FORMATS = (
    "bf16", "fp32", "fp8", "fp8 with scales of powers of two", "fp8 with bf16 scales", "int8", "int4",
    "int4 with bf16 scales",
)  # fmt: skip
FORMATS = (
    *SOLIS_FORMATS,
    # As other programs write them (tests/checkpoint/published.py):
    "pack-quantized", "pack-quantized, float16 scales", "fp8 per tensor", "stacked fp8 per tensor, of transformers",
    "float-quantized per channel, bf16 scales", "modelopt NVFP4", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
SHAPE = {
    "vocab_size": 330, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "intermediate_size": 64,
    "max_position_embeddings": 256, "q_lora_rank": 32, "v_head_dim": 32, "kv_lora_rank": 32,
}  # fmt: skip
K, E, LAYERS = 3, 16, 4  # layers with experts, the MTP module's included


@cache
def mixture_folder(format: str, shard_bytes: int = 2**30, kind: str = "v3") -> Path:
    """16 experts in each of three layers and an MTP module, of which a token chooses 3."""
    folder = Path(mkdtemp(prefix="soli-test-")) / "model"
    published_format = format.removeprefix("stacked ")
    if published_format in published.FORMATS:
        save_model(tiny_model(kind, **SHAPE), folder, "bf16", shard_bytes=shard_bytes)
        _quantize(folder, published_format, stacked=published_format != format)
        return folder
    name, _, scales = format.partition(" with ")
    ue8m0 = scales == "scales of powers of two"
    types = {"indexer_types": ("full", "shared", "shared", "full")} if "shared" in kind else {}
    save_model(tiny_model(kind, **SHAPE, **types), folder, name, ue8m0=ue8m0, shard_bytes=shard_bytes)
    if scales == "bf16 scales":
        edit_tensors(folder / "model.safetensors", _round_scales)
    return folder


def _quantize(folder: Path, format: str, stacked: bool) -> None:
    """Every linear weight as another program writes it; `stacked`: a layer's experts in stacks, with one scale for an
    expert's gate and up."""
    quantize, quantization = published.FORMATS[format]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if stacked:
            stack_experts(tensors)
            for name in [name for name in tensors if name.endswith("_proj")]:
                scale = tensors[name].float().abs().amax((1, 2), keepdim=True) / 448
                tensors |= {name: published.e4m3(tensors[name], scale), f"{name}_scale_inv": scale}
        published.quantize_tensors(tensors, quantize, published.is_linear)

    edit_tensors(folder / "model.safetensors", edit)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=quantization))


def _round_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if "_scale" in name and "head" not in name}


def resident_model(format: str, mtp: bool = True, kind: str = "v3") -> Transformer:
    """The same in memory, with weights as stored."""
    return load_model(mixture_folder(format, kind=kind), quantized=True, in_place=True, mtp=mtp)


def requests(lengths: Sequence[int], new_tokens: int = 12, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Request(tuple(torch.randint(10, 300, (length,), generator=generator).tolist()), new_tokens, logprobs=0)
        for length in lengths
    ]


def answers(
    model: Transformer, prompts: Sequence[Request], runner: RunnerName = "fused", speculate: bool = False
) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Tokens and their log-probabilities."""
    tokenizer: Tokenizer = tiny_tokenizer()
    together = text_model(model, tokenizer)
    engine = Engine(together, limits_for(together, len(prompts), 250, speculate=speculate), runner=runner)
    return [bits(answer) for answer in answer_all(engine, prompts) if answer is not None]


def bits(answer: Answer) -> tuple[tuple[int, ...], tuple[float, ...]]:
    assert answer.logprobs is not None
    return answer.ids, tuple(one.logprob for one in answer.logprobs)


def fail_next_read(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read of the disk fails, those after it do not."""
    file = type(store.reader._files[0])
    read, failures = file.read, iter([True])

    def fail_once(self: object, target: memoryview, start: int, needed: int) -> None:
        if next(failures, False):
            raise OSError(5, "Input/output error")
        read(self, target, start, needed)

    monkeypatch.setattr(file, "read", fail_once)
