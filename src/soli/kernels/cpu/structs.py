"""The structs that the C++ library takes, as ctypes; `check` compares them with the library's own.

Each class `CName` has the same fields, in the same order, as `struct Name` of csrc/kernels.h and csrc/forward_args.h.
Weights are addresses: nothing here owns memory.

Shapes: T tokens, D hidden, H heads, N non-rotary and R rotary and V value width, X = C latent + R, E experts, K chosen,
G groups, J heads of an indexer.
"""

import ctypes
from collections.abc import Mapping
from ctypes import Structure, c_char_p, c_double, c_int64, c_uint64, c_void_p
from typing import Final

from soli.errors import SoliError


class CMatrix(Structure):
    _fields_ = (("weight", c_void_p), ("scale", c_void_p))


class CLayout(Structure):
    _fields_ = (("format", c_int64), ("O", c_int64), ("I", c_int64), ("group", c_int64))


class CVector(Structure):
    _fields_ = (("data", c_void_p), ("dtype", c_int64))


class CNorm(Structure):
    _fields_ = (("weight", CVector), ("eps", c_double))


class CWeight(Structure):
    _fields_ = (("matrix", CMatrix), ("layout", CLayout))


class CAttention(Structure):
    _fields_ = (
        *((name, CNorm) for name in ("norm", "q_norm", "kv_norm")),
        *((name, CWeight) for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *((name, CVector) for name in ("q_a_bias", "kv_a_bias", "o_bias")),
        *((name, c_int64) for name in ("H", "N", "R", "V", "interleaved")),
        ("scale", c_double),
        ("topk", c_int64),
        *((name, CWeight) for name in ("index_q", "index_k", "index_weights")),
        *(("index_norm", CNorm), ("index_norm_bias", CVector)),
        *((name, c_int64) for name in ("J", "index_interleaved")),
    )


class CRouter(Structure):
    _fields_ = (
        ("weight", CWeight),
        ("bias", CVector),
        *((name, c_int64) for name in ("K", "G", "topk_group", "experts_per_group_score", "softmax", "normalise")),
        ("scaling", c_double),
    )


class CFeedForward(Structure):
    _fields_ = (
        *((name, CNorm) for name in ("norm", "output_norm")),
        *((name, CWeight) for name in ("gate", "up", "down")),
        ("router", CRouter),
        *(("expert_in", CLayout), ("expert_out", CLayout)),
        *((name, c_void_p) for name in ("experts", "states")),
    )


class CLayer(Structure):
    _fields_ = (("attention", CAttention), ("feed_forward", CFeedForward))


class CPrefillChunk(Structure):
    _fields_ = (*((name, c_int64) for name in ("start", "stop", "first_position")), ("slots", c_void_p))


class CRoutings(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("ids", "weights", "scores", "biased", "groups", "states", "waited"))


class CPaging(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layer", "begin", "end", "pass", "threads")),
        ("predicted", c_void_p),
        ("predicted_tokens", c_int64),
    )


class CForwardArgs(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("isa", "dtype", "threads", "T", "D", "layer_count")),
        *((name, c_void_p) for name in ("layers", "kv_blocks", "index_keys")),
        *((name, c_int64) for name in ("block_count", "block_size", "blocks_per_sequence")),
        *((name, c_int64) for name in ("num_decode_tokens", "chunk_count")),
        *((name, c_void_p) for name in ("block_table", "lengths", "chunks", "positions", "frequencies")),
        *(("cos_sin_scale", c_double), ("query_scaling", c_double), ("query_scaling_length", c_int64)),
        ("x", CVector),
        ("token_ids", c_void_p),
        ("norm", CNorm),
        ("y", c_void_p),
        ("head", CWeight),
        ("logit_indices", c_void_p),
        *((name, c_int64) for name in ("logit_count", "vocab_size")),
        *((name, c_void_p) for name in ("logits", "masked_experts")),
        ("routings", CRoutings),
        ("paging", c_void_p),
    )


class CStructLayout(Structure):
    """What the library says of one of its structs; see csrc/struct_layouts.cpp."""

    _fields_ = (("name", c_char_p), ("size", c_int64), ("field_hash", c_uint64))


STRUCTS: Final[Mapping[str, type[Structure]]] = {
    struct.__name__.removeprefix("C"): struct
    for struct in (
        *(CMatrix, CLayout, CVector, CNorm, CWeight, CAttention, CRouter, CFeedForward, CLayer, CPrefillChunk),
        *(CRoutings, CPaging, CForwardArgs),
    )
}


def field_hash(struct: type[Structure]) -> int:
    """64-bit FNV-1a over name, offset and size of each field, as csrc/struct_layouts.cpp computes it."""
    value = 0xCBF29CE484222325
    for name, *_ in struct._fields_:
        field = getattr(struct, name)
        numbers = (number.to_bytes(8, "little") for number in (field.offset, field.size))
        for byte in (*name.encode(), *b"".join(numbers)):
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def check(library: ctypes.CDLL, structs: Mapping[str, type[Structure]] = STRUCTS) -> None:
    """SoliError for a struct that the library and `structs` lay out differently, or that only one of them has."""
    count = c_int64()
    library.soli_struct_layouts.restype = ctypes.POINTER(CStructLayout)
    exported = library.soli_struct_layouts(ctypes.byref(count))[: count.value]
    layouts = {layout.name.decode(): layout for layout in exported}
    for name in {**layouts, **structs}:
        if name not in structs or name not in layouts:
            missing = "csrc/struct_layouts.cpp" if name in structs else "kernels/cpu/structs.py"
            raise SoliError(f"the C++ kernels cannot be used: struct {name} is missing in {missing}")
        struct, layout = structs[name], layouts[name]
        if (ctypes.sizeof(struct), field_hash(struct)) != (layout.size, layout.field_hash):
            raise SoliError(
                f"the C++ kernels cannot be used: struct {name} of csrc/ and class C{name} of kernels/cpu/structs.py "
                f"differ in their fields ({layout.size} and {ctypes.sizeof(struct)} bytes)"
            )
