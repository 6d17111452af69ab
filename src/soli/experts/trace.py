"""Which experts each token chose, as a file: what `soli experts record` writes and `soli experts replay` reads.

A safetensors file with `expert_ids` (T, L, K), uint16, of tokens in the order in which they were read, and int64
scalars `experts`, `expert_bytes`. The JSON of `soli generate --experts --json` is read as well.

Shapes: T tokens, L layers with experts, E experts of a layer, K chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from soli.analysis.trace import TokenTrace, read_trace
from soli.atomic_file import replace_file
from soli.errors import SoliError
from soli.input_files import read_bytes

TRACE_BYTES: Final = 2**30
MAX_EXPERTS: Final = 2**16


@dataclass(frozen=True)
class ExpertTrace:
    """`expert_ids_TLK` of tokens, `experts` in each layer, `expert_bytes` of each as stored, 0 where that is not
    known. SoliError for ids that are out of range or twice in a layer."""

    expert_ids_TLK: NDArray[np.int64]
    experts: int
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        ids = self.expert_ids_TLK
        if ids.ndim != 3 or not ids.size:
            raise SoliError(f"a trace has experts of tokens, layers and ranks, not of shape {ids.shape}")
        if not 0 < self.experts <= MAX_EXPERTS or self.expert_bytes < 0:
            raise SoliError(f"a trace cannot be of {self.experts:,} experts of {self.expert_bytes:,} bytes")
        if ids.min() < 0 or ids.max() >= self.experts:
            raise SoliError(f"a trace chooses experts {ids.min():,} ... {ids.max():,} of {self.experts:,}")
        if (np.diff(np.sort(ids, axis=2), axis=2) == 0).any():
            raise SoliError("a trace has a token that chooses an expert of a layer twice")

    @property
    def demand(self) -> int:
        """Experts of one token."""
        return self.expert_ids_TLK.shape[1] * self.expert_ids_TLK.shape[2]

    @property
    def all_experts(self) -> int:
        """Of all layers."""
        return self.expert_ids_TLK.shape[1] * self.experts

    def save(self, path: Path) -> None:
        """Write the file; SoliError where that fails."""
        tensors = {
            "expert_ids": self.expert_ids_TLK.astype(np.uint16),
            "experts": np.array(self.experts),
            "expert_bytes": np.array(self.expert_bytes),
        }
        replace_file(path, save(tensors))


def read_expert_trace(path: Path) -> ExpertTrace:
    """Either form of a trace. SoliError naming the file for what is none; in JSON the number of experts is that of
    the largest that is named."""
    data = read_bytes(path, TRACE_BYTES)
    try:
        if data.lstrip()[:1] in (b"{", b"["):
            return from_tokens(read_trace(path))
        tensors = load(data)
        names = {"expert_ids", "experts", "expert_bytes"}
        if tensors.keys() != names or any(array.dtype.kind not in "iu" for array in tensors.values()):
            raise SoliError(f"it must have the integers {', '.join(sorted(names))}")
        sizes = [tensors[name] for name in ("experts", "expert_bytes")]
        if any(size.shape != () for size in sizes):
            raise SoliError("experts and expert_bytes must be single numbers")
        return ExpertTrace(tensors["expert_ids"].astype(np.int64), int(sizes[0]), int(sizes[1]))
    except SoliError as error:
        message = str(error).removeprefix(f"{path}: ")
        raise SoliError(f"{path}: {message}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise SoliError(f"{path}: is no trace of soli experts record, nor JSON of --experts --json ({error})") from None


def from_tokens(tokens: Sequence[TokenTrace]) -> ExpertTrace:
    """The trace of tokens that `soli.analysis.trace` describes."""
    rows = [[[expert.expert for expert in layer.selected] for layer in token.layers] for token in tokens]
    sizes = {len(layer) for row in rows for layer in row}
    if len(sizes) != 1 or len({len(row) for row in rows}) != 1:
        raise SoliError("its tokens have different numbers of layers or of experts, or none")
    ids = np.array(rows, np.int64)
    named = (other.expert for token in tokens for layer in token.layers for other in layer.runner_ups)
    return ExpertTrace(ids, 1 + max(int(ids.max()), *named, 0))
