"""The compiled kernels as functions of plain integers: loading, the choice of instruction set, and error codes.

SOLI_CPU_ISA forces portable, avx2, avx512 or amx; without it the best that the processor has runs.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from soli.errors import SoliError
from soli.kernels.cpu.build import BuildError, build

ISAS: Final = ("portable", "avx2", "avx512", "amx")  # as soli::kernels() numbers them
FORMATS: Final = {"fp32": 0, "bf16": 1, "fp8": 2, "int8": 3, "int4": 4}  # as enum Format
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}  # as enum Dtype

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


@dataclass(frozen=True)
class Library:
    """Each takes what the file of its name in csrc/ says (`latent_decode`: latents.cpp) and returns its error code."""

    path: Path
    best_isa: str
    linear: Any
    experts: Any
    latent_decode: Any
    run_pass: Any  # csrc/pass.cpp, by the address of a layers.Call


def open_library(path: Path) -> Library:
    """Load a compiled library into this process."""
    handle = ctypes.CDLL(str(path))
    handle.soli_linear.argtypes = [*[_INT] * 5, *[_POINTER] * 2, *[_INT] * 2, *[_POINTER] * 2, _INT]
    handle.soli_experts.argtypes = [*[_INT] * 8, _POINTER, *[_INT] * 3, *[_POINTER] * 4, _INT]
    handle.soli_latent_decode.argtypes = [
        *[_INT] * 6, *[_POINTER] * 2, *[_INT] * 2, _POINTER, _INT, _POINTER, ctypes.c_double, _POINTER, _INT
    ]  # fmt: skip
    handle.soli_pass.argtypes = [_POINTER]
    entries = handle.soli_linear, handle.soli_experts, handle.soli_latent_decode, handle.soli_pass
    return Library(path, ISAS[handle.soli_best_isa()], *entries)


@cache
def opened() -> Library | str:
    """The kernels of this machine, built if they are not yet; or why there are none."""
    try:
        return open_library(build())
    except (BuildError, OSError) as error:
        return str(error)


@cache
def library() -> Library | None:
    """The kernels of this machine; None, after one line on standard error, where they cannot be had."""
    found = opened()
    if isinstance(found, Library):
        return found
    print(
        "soli: computing with torch's own products, slower in decoding and slowest with quantized weights, because the "
        f"C++ kernels are missing: {found}",
        file=sys.stderr,
    )
    return None


def available_isas(best: str) -> tuple[str, ...]:
    """What may be forced where `best` is the best."""
    return ISAS[: ISAS.index(best) + 1]


def chosen_isa(best: str) -> int:
    """The number of the instruction set to run, SOLI_CPU_ISA's or the best. SoliError for one that is not there."""
    return _number(os.environ.get("SOLI_CPU_ISA") or best, best)


@cache
def _number(wanted: str, best: str) -> int:
    if wanted not in available_isas(best):
        raise SoliError(
            f"SOLI_CPU_ISA is {wanted!r}, but this machine has {', '.join(available_isas(best))}: choose one"
        )
    return ISAS.index(wanted)


def check_code(code: int, experts: int = 0) -> None:
    """Turn a kernel's error code into an exception."""
    if code == 1:
        raise IndexError(f"an expert id is not in 0 ... {experts - 1}")
    if code == 3:
        raise IndexError("a row of the page table, or a chunk, does not lead to as many slots as its length says")
    if code == 5:
        raise IndexError("a token id is not in the vocabulary")
    if code:
        raise MemoryError("no memory for the scratch of a CPU kernel")
