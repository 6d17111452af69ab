"""As much of Triton as Soli's kernels use, in plain torch on a CPU: a program at a time, every access checked.

It does not prove that a kernel compiles; it checks every index that the kernel computes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

_program = [0, 0, 0]


class Pointer:
    """A tensor's memory, and offsets into it."""

    def __init__(self, memory: Tensor, offsets: Tensor) -> None:
        self.memory, self.offsets = memory, offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.offsets + more)


class Kernel:
    """kernel[grid](...) runs every program of the grid, one after the other."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, num_warps: int = 4, num_stages: int = 3) -> None:
            pointers = [pointer(value) if isinstance(value, Tensor) else value for value in arguments]
            for program in itertools.product(*map(range, grid)):
                _program[:] = [*program, 0, 0][:3]
                self.function(*pointers)

        return launch


def pointer(tensor: Tensor) -> Pointer:
    assert tensor.is_contiguous()
    return Pointer(tensor.view(-1), torch.tensor(0))


def load(where: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
    inside = torch.ones_like(where.offsets, dtype=torch.bool) if mask is None else mask.expand_as(where.offsets)
    assert ((where.offsets >= 0) & (where.offsets < where.memory.numel()))[inside].all(), "read outside"
    values = where.memory[where.offsets.where(inside, 0)]
    return values if mask is None else values.float().where(inside, other).to(values.dtype)


def store(where: Pointer, value: Tensor) -> None:
    assert ((where.offsets >= 0) & (where.offsets < where.memory.numel())).all(), "write outside"
    assert value.dtype == where.memory.dtype and value.shape == where.offsets.shape
    assert where.offsets.unique().numel() == where.offsets.numel(), "two values for one address"
    where.memory[where.offsets] = value


def install(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Make `import triton` import this module until the test ends."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.__spec__ = ModuleSpec("triton", None)
    triton.jit, triton.language = Kernel, language
    triton.cdiv = language.cdiv = lambda a, b: -(-a // b)
    language.constexpr = int
    language.int64, language.float32 = torch.int64, torch.float32
    language.program_id = lambda axis: torch.tensor(_program[axis])
    language.arange, language.zeros, language.abs, language.trans = torch.arange, torch.zeros, torch.abs, torch.t
    language.where, language.div_rn = torch.where, torch.div
    language.load, language.store = load, store
    language.max = lambda x, axis: x.amax(dim=axis)
    language.maximum = lambda x, least: x.clamp_min(least)
    language.dot = lambda a, b: a.float() @ b.float()
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    monkeypatch.delitem(sys.modules, "soli.kernels.fp8.triton_kernels", raising=False)
