"""The compiled kernels as functions of plain integers: loading, the instruction set, and error codes.

An instruction set is portable, avx2, avx512 or amx: the one asked for, or the best that the processor has.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from soli.errors import SoliError
from soli.kernels.cpu import structs
from soli.kernels.cpu.build import BuildError, build, openmp_runtimes
from soli.kernels.cpu.library_cache import open_verified

ISAS: Final = ("portable", "avx2", "avx512", "amx")  # as soli::kernels() numbers them
FORMATS: Final = {"fp32": 0, "bf16": 1, "fp8": 2, "int8": 3, "int4": 4, "int4_bf16": 5, "fp8_row": 6, "fp4": 7}
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}  # as enum Dtype

PACKAGED: Final = Path(__file__).parent / "compiled" / "soli_cpu.so"

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


# As enum ErrorCode of csrc/kernels.h, in its order: what a function of the library returns, and what is raised for it.
ERRORS: Final[dict[str, tuple[type[Exception], str]]] = {
    "NO_ERROR": (SoliError, ""),
    "BAD_EXPERT_ID": (IndexError, "an expert id is not in 0 ... {last_expert}"),
    "NO_MEMORY": (MemoryError, "no memory for the scratch of a CPU kernel"),
    "BAD_SLOT": (IndexError, "a row of the block table, or a chunk, does not lead to as many slots as its length says"),
    "TOO_MANY_TOKENS": (ValueError, "more tokens than one fused forward takes"),
    "BAD_TOKEN_ID": (IndexError, "a token id is not in the vocabulary"),
    "READ_FAILED": (SoliError, "an expert's weights could not be read"),
    "CANNOT_CONTINUE": (RuntimeError, "another forward ran on this thread since the one that is to continue"),
}


@dataclass(frozen=True)
class Library:
    """The functions that csrc/ exports; each returns an index into ERRORS."""

    path: Path
    best_isa: str
    linear: Any
    experts: Any
    latent_decode: Any
    forward: Any  # takes the address of a structs.CForwardArgs
    order_int4: Any


def open_library(path: Path, descriptor: int | None = None) -> Library:
    """Load a compiled library into this process, from its open file descriptor if there is one. SoliError where its
    structs are not those of structs.py.

    The descriptor stays open: the loader knows the library by it, and another library under its number would be taken
    for this one.
    """
    handle = ctypes.CDLL(str(path) if descriptor is None else f"/proc/self/fd/{descriptor}")
    structs.check(handle)
    handle.soli_linear.argtypes = [*[_INT] * 5, *[_POINTER] * 2, *[_INT] * 2, *[_POINTER] * 2, _INT]
    handle.soli_experts.argtypes = [*[_INT] * 8, _POINTER, *[_INT] * 3, *[_POINTER] * 4, *[_INT] * 3, _POINTER]
    handle.soli_latent_decode.argtypes = [
        *[_INT] * 6, *[_POINTER] * 2, *[_INT] * 2, _POINTER, _INT, _POINTER, ctypes.c_double, _POINTER, _INT
    ]  # fmt: skip
    handle.soli_forward.argtypes = [_POINTER]
    handle.soli_order_int4.argtypes = [_POINTER, _POINTER, _INT]
    names = ("linear", "experts", "latent_decode", "forward", "order_int4")
    functions = [getattr(handle, f"soli_{name}") for name in names]
    return Library(path, ISAS[handle.soli_best_isa()], *functions)


def packaged_library() -> Library | None:
    """The kernels that came compiled with the package (`make wheel`); None where there are none, or where this process
    has no OpenMP runtime for them."""
    runtime = next(iter(openmp_runtimes()), None)
    if not PACKAGED.is_file() or runtime is None or os.environ.get("SOLI_CPU_FLAGS"):
        return None
    try:
        ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)  # torch's own, whose name differs from one torch to another
        return open_library(PACKAGED)
    except (OSError, AttributeError, SoliError):
        return None


@cache
def library_or_reason() -> Library | str:
    """The kernels of this machine, built if they are not yet; or why there are none."""
    packaged = packaged_library()
    if packaged is not None:
        return packaged
    try:
        library = build()
        try:
            return open_library(library, open_verified(library))
        except (OSError, AttributeError, SoliError):  # AttributeError: a function is missing
            library = build(rebuild=True)
            return open_library(library, open_verified(library))
    except (BuildError, OSError, AttributeError) as error:
        return str(error)


@cache
def library() -> Library | None:
    """The kernels of this machine; None, after one line on standard error, where there are none."""
    kernels = library_or_reason()
    if isinstance(kernels, Library):
        return kernels
    print(
        "soli: computing with torch's own products, slower in decoding and slowest with quantized weights, because the "
        f"C++ kernels are missing: {kernels}",
        file=sys.stderr,
    )
    return None


def available_isas(best: str) -> tuple[str, ...]:
    """The instruction sets that can be forced where `best` is the best."""
    return ISAS[: ISAS.index(best) + 1]


def isa_number(isa: str | None, best: str) -> int:
    """The number in ISAS of an instruction set, the best without a name. SoliError for one that is not available."""
    isa = isa or best
    if isa not in available_isas(best):
        raise SoliError(f"SOLI_CPU_ISA is {isa!r}, but this machine has {', '.join(available_isas(best))}: choose one")
    return ISAS.index(isa)


def check_error(code: int, experts: int = 0) -> None:
    """Raise the exception of an error code; `experts` is how many there are."""
    if code:
        error, message = [*ERRORS.values()][code]
        raise error(message.format(last_expert=experts - 1))
