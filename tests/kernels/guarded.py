"""Run by test_cpu_build.py with an instruction set: every kernel, on tensors between guard pages."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from soli.engine.runner import FusedRunner
from soli.formats.quantized import QuantizedWeight
from soli.kernels import cpu
from soli.kernels.backend import QuantizedExperts
from soli.kernels.cpu.native import ISAS
from soli.model import Transformer
from soli.model.layers import Linear
from soli.model.moe import RoutedExperts
from tests.engine.quantized import quantized_model
from tests.engine.shuffled_cache import ShuffledCache
from tests.kernels.weights import DTYPES, FORMATS, expert_table, groups, inputs, random_weight

ISA = ISAS.index(sys.argv[1])
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy that ends (or begins) at a guard page, which ends the process when it is read."""
    pages = -(-tensor.nbytes // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    start = PAGE + (pages * PAGE - tensor.nbytes if at_end else 0)
    copy = torch.frombuffer(area, dtype=torch.uint8, count=tensor.nbytes, offset=start).view(tensor.dtype)
    copy.copy_(tensor.flatten())
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(base + page * PAGE), PAGE, 0) == 0, os.strerror(ctypes.get_errno())
    return copy.view(tensor.shape)


def main() -> None:
    os.environ["SOLI_CPU_ISA"] = sys.argv[1]
    generator = torch.Generator().manual_seed(0)
    for format in FORMATS:
        for width in (1, 31, 33, 96, 127, 160, 200, 224):
            for group in groups(format):
                for rows in (1, 3, 8, 13):
                    weight = random_weight(format, (rows, inputs(format, width, group)), group, generator)
                    check(weight, generator)
        for at_end in (True, False):
            check_experts(format, at_end, generator)
            for kind in ("v3", "glm with shared indexers"):
                check_layers(format, kind, at_end)
    for width in (1, 24, 31, 80, 145):
        check_latents(width, generator)
    print("no read outside a tensor")


def guarded_weight(weight: QuantizedWeight, at_end: bool) -> QuantizedWeight:
    scale = None if weight.scale is None else guarded(weight.scale, at_end)
    return QuantizedWeight(weight.format, guarded(weight.values, at_end), scale, weight.shape, weight.group)


def check(weight: QuantizedWeight, generator: torch.Generator) -> None:
    for at_end in (True, False):
        copy = guarded_weight(weight, at_end)
        for dtype in DTYPES:
            for tokens in (1, 2, 9):
                x_TI = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
                assert torch.equal(cpu.linear(ISA, x_TI, copy), cpu.linear(ISA, x_TI, weight))


def check_experts(format: str, at_end: bool, generator: torch.Generator) -> None:
    """Three experts of width 128 over tokens of width 96, of which the last is not chosen."""
    gate_up, down = (random_weight(format, shape, 32, generator) for shape in ((3, 256, 96), (3, 96, 128)))
    table = expert_table(guarded_weight(gate_up, at_end), guarded_weight(down, at_end))
    for dtype in DTYPES:
        for tokens in (1, 40):
            x_TD = torch.randn(tokens, 96, generator=generator).to(dtype)
            ids_TK = torch.arange(2 * tokens).view(tokens, 2) % 2
            inputs = x_TD, ids_TK, torch.rand(tokens, 2, generator=generator)
            expected = cpu.experts(ISA, *inputs, expert_table(gate_up, down))
            assert torch.equal(cpu.experts(ISA, *inputs, table), expected)


def check_latents(width: int, generator: torch.Generator) -> None:
    """Two KV blocks of five slots, in either order; of the second one three slots are read."""
    for dtype in DTYPES:
        blocks_PSX = torch.randn(2, 5, width, generator=generator).to(dtype)
        q_BHX = torch.randn(2, 3, width, generator=generator).to(dtype)
        table_BM = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
        lengths_B = torch.tensor([8, 8], dtype=torch.int32)
        latent = -(-width * 2 // 3)
        expected = cpu.latent_decode(ISA, q_BHX, blocks_PSX, table_BM, lengths_B, latent=latent, scale=0.5)
        for at_end in (True, False):
            inputs = (guarded(tensor, at_end) for tensor in (q_BHX, blocks_PSX, table_BM, lengths_B))
            assert torch.equal(cpu.latent_decode(ISA, *inputs, latent=latent, scale=0.5), expected)


@torch.inference_mode()
def check_layers(format: str, kind: str, at_end: bool) -> None:
    """Forward passes of decode tokens and of a prompt, from ids to logits: all weights and the cache's KV blocks."""
    ids_BT = torch.arange(3)[None]
    for dtype in DTYPES if format != "fp32" else DTYPES[:1]:
        model = quantized_model(format, dtype, kind=kind)
        outputs: list[list[Tensor]] = []
        for with_guards in (False, True):
            cache = ShuffledCache(model, 1, 16, 4)
            if with_guards:
                guard_weights(model, at_end)
                cache._layers = {layer: guarded(blocks_PSX, at_end) for layer, blocks_PSX in cache._layers.items()}
            runner = FusedRunner(model, drafts=True)
            outputs.append([cache.read(runner, ids_BT, [0], at)[-1].hidden_BTD for at in (0, 3)])
            step = cache.step([0], [6], [10])
            output = runner.forward(torch.arange(87, 97), step.positions_T, step, [0, 9])
            outputs[-1] += [output.hidden_TD, output.logits_NV]
        assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def guard_weights(model: Transformer, at_end: bool) -> None:
    embedding = model.embed_tokens
    embedding.weight = torch.nn.Parameter(guarded(embedding.weight, at_end), False)
    for module in model.modules():
        if isinstance(module, Linear) and module.quantized is not None:
            module.set_quantized(guarded_weight(module.quantized, at_end))
        elif isinstance(module, RoutedExperts) and module.quantized is not None:
            parts = (module.quantized.gates, module.quantized.ups, module.quantized.downs)
            copies = (tuple(guarded_weight(weight, at_end) for weight in part) for part in parts)
            module.set_quantized(QuantizedExperts(*copies))


if __name__ == "__main__":
    main()
