"""The rates of this machine that a plan needs, measured in seconds and remembered in the cache folder.

The kernels are timed as they are used: a layer's experts in each format, with one token (how fast weights are read) and
with many (how fast the products of further tokens are computed). What is remembered belongs to a processor, its memory,
the kernels and the number of threads; `renew` measures again. Disks: soli/experts/disk.py.
"""

import logging
import timeit
from dataclasses import dataclass
from datetime import date
from statistics import median
from typing import Final

import torch

from soli import __version__, machine
from soli.experts.memory_rate import memory_bandwidth
from soli.formats.quantized import CODECS, QuantizedWeight
from soli.kernels import QuantizedExperts, default_backend
from soli.kernels.cpu import native
from soli.measured import remembered
from soli.plan.inference import MachineRates

log = logging.getLogger(__name__)

FORMATS: Final = ("bf16", "fp8", "int8", "int4")
WIDTHS: Final = (2048, 1408)  # of the timed experts: D, F
BLOCK_BYTES: Final = 200_000_000  # of all experts: larger than the caches of most processors
MANY_TOKENS: Final = 48  # of each expert, as in a prompt of 512 tokens with 6 of 64 experts
ROUNDS: Final = 15  # of which the median of the faster half counts: other processes can only slow one down


@dataclass(frozen=True)
class Compute:
    """Of a processor; rates per second, by format of the weights."""

    memory_rate: float
    weight_rates: dict[str, float]
    flop_rates: dict[str, float]
    date: str

    def rates(self, disk_rate: float) -> MachineRates:
        """With a disk that reads so many bytes per second. FP4 is read as fast as int4, and multiplied as FP8 is."""
        weight_rates = self.weight_rates | {"fp4": self.weight_rates["int4"]}
        flop_rates = self.flop_rates | {"fp4": self.flop_rates["fp8"]}
        return MachineRates(self.memory_rate, disk_rate, weight_rates, flop_rates)


def measured_compute(renew: bool = False) -> Compute:
    """Of this processor with torch's number of threads."""
    return remembered("compute", _identity(), Compute, _measure_compute, renew)


def _identity() -> str:
    processor = machine.processor()
    library = native.library_or_reason()
    kernels = "torch" if isinstance(library, str) else f"kernels {library.path.parent.name}"
    memory = f"{machine.memory_bytes() / 2**30:.0f} GiB"
    threads = f"{torch.get_num_threads()} threads"
    return f"{processor.name}, {processor.cores} cores, {threads}, {memory}, {kernels}, soli {__version__}"


def _measure_compute() -> Compute:
    weight_rates: dict[str, float] = {}
    flop_rates: dict[str, float] = {}
    for format in FORMATS:
        experts = _random_experts(format)
        size = sum(weight.nbytes for part in (experts.gates, experts.ups, experts.downs) for weight in part)
        one, many = _experts_seconds(experts, 1), _experts_seconds(experts, MANY_TOKENS)
        weight_rates[format] = size / one
        D, F = WIDTHS
        operations = 6 * D * F * len(experts.downs)
        flop_rates[format] = operations * (MANY_TOKENS - 1) / max(many - one, many / 2)  # timings may be disturbed
    weight_rates["fp32"] = weight_rates["bf16"]
    flop_rates["fp32"] = flop_rates["bf16"] / 2
    return Compute(1e9 * memory_bandwidth(), weight_rates, flop_rates, str(date.today()))


def _random_experts(format: str) -> QuantizedExperts:
    D, F = WIDTHS
    gate, up, down = (_random_weight(format, shape) for shape in ((F, D), (F, D), (D, F)))
    count = max(2, BLOCK_BYTES // (gate.nbytes + up.nbytes + down.nbytes))
    gates, ups, downs = (tuple(_copy(weight) for _ in range(count)) for weight in (gate, up, down))
    return QuantizedExperts(gates, ups, downs)


def _random_weight(format: str, shape: tuple[int, int]) -> QuantizedWeight:
    codec = CODECS[format]
    generator = torch.Generator().manual_seed(0)
    group = max(group for group in codec.groups if group == 0 or shape[1] % group == 0)
    return codec.quantize(torch.randn(shape, generator=generator) / 64, group)


def _copy(weight: QuantizedWeight) -> QuantizedWeight:
    scale = None if weight.scale is None else weight.scale.clone()
    return QuantizedWeight(weight.format, weight.values.clone(), scale, weight.shape, weight.group)


def _experts_seconds(experts: QuantizedExperts, tokens: int) -> float:
    """Of a call in which every token chose every expert."""
    E = len(experts.downs)
    ids_TK = torch.arange(E).repeat(tokens, 1)
    weights_TK = torch.full((tokens, E), 1 / E)
    x_TD = torch.ones(tokens, WIDTHS[0], dtype=torch.bfloat16)
    backend = default_backend()

    def call() -> object:
        with torch.inference_mode():
            return backend.quantized_experts(x_TD, ids_TK, weights_TK, experts)

    call()
    seconds = sorted(timeit.timeit(call, number=1) for _ in range(ROUNDS))
    return median(seconds[: ROUNDS // 2 + 1])
