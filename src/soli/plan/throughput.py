"""The rate that this device sustains on a model's own matrix products, timed for about a second; a card's stated peak.

The products are those with most of a training step's FLOPs, with the rows of a micro-batch (a routed expert has its
share of the tokens) and sides of at most `MAX_SIDE`. They bound the speed of a step from above.
"""

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from statistics import median

import torch

from soli import machine
from soli.analysis.parameters import EMBEDDING, ROUTED, Weights, mtp_weights, weights
from soli.train.settings import TrainSettings
from soli.train.setup import choose_device, choose_precision

# Dense bf16 TFLOP/s with fp32 sums, as the makers' data sheets state them (NVIDIA: the sparse figure halved).
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H800 PCIe", 756.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
)
MAX_SIDE = {"cpu": 1024, "cuda": 8192}  # of a timed matrix: enough for the full rate
PRODUCTS = 4  # kinds of product that are timed
ROUNDS = 5  # timings of each
SECONDS = 0.03  # of one timing, at least


@dataclass(frozen=True)
class MeasuredDevice:
    """A device and the rate it reached on a recipe's matrix products."""

    name: str
    kind: str  # cpu, cuda
    threads: int | None  # of a CPU
    computes: str  # precision of activations in which the recipe trains here
    precision: str  # in which the products were timed; FP8 is emulated in fp32
    tflops: float  # measured
    peak_tflops: float | None  # stated by its maker for bf16, of the cards in PEAKS
    memory: int  # bytes

    @property
    def title(self) -> str:
        return self.name if self.threads is None else f"{self.name}, {self.threads} thread{'s' * (self.threads > 1)}"


def measure_device(settings: TrainSettings) -> MeasuredDevice:
    """The device that the recipe would train on here, measured. SoliError when `run.device` is not there."""
    device = choose_device(settings.run.device)
    compute = choose_precision(settings.run.precision, device)
    if settings.run.precision == "fp8":
        compute = torch.float32  # the emulation's products
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[compute]
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return MeasuredDevice(
        name=card.name if card else machine.processor().name,
        kind=device.type,
        threads=None if card else torch.get_num_threads(),
        computes="fp8" if settings.run.precision == "fp8" else precision,
        precision=precision,
        tflops=measure_products(settings, device, compute),
        peak_tflops=stated_peak(card.name) if card else None,
        memory=card.total_memory if card else machine.memory_bytes(),
    )


def stated_peak(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a card by its name, as CUDA gives it; None for one that is not listed."""
    words = name.replace("-", " ")
    return next((peak for part, peak in PEAKS if part in words), None)


def measure_products(settings: TrainSettings, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s over the recipe's heaviest products, each weighted by its share of the FLOPs."""
    seconds = work = 0.0
    for rows, columns, inner, share in heaviest_products(settings):
        m, n, k = (max(8, min(side, MAX_SIDE.get(device.type, 1024))) for side in (rows, columns, inner))
        seconds += share / _rate(m, n, k, device, dtype)
        work += share
    return work / seconds / 1e12


def heaviest_products(settings: TrainSettings) -> list[tuple[int, int, int, int]]:
    """(rows, columns, inner side, FLOPs per token) of the matrices with most of a step's FLOPs."""
    config, tokens = settings.model, settings.run.micro_sequences * settings.schedule.sequence_length

    def rows(group: Weights) -> int:
        routed = group.component == ROUTED and config.n_routed_experts
        return tokens * config.num_experts_per_tok // config.n_routed_experts if routed else tokens

    groups = [w for w in (*weights(config), *mtp_weights(config)) if len(w.shape) == 2 and w.component != EMBEDDING]
    heaviest = sorted(groups, key=lambda w: -w.activated)[:PRODUCTS]
    return [(rows(w), w.shape[0], w.shape[1], w.active * prod(w.shape)) for w in heaviest]


def _rate(rows: int, columns: int, inner: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one product, the median of `ROUNDS` timings."""
    x, weight = (torch.randn(side, inner, device=device, dtype=dtype) for side in (rows, columns))

    def product() -> object:
        return torch.nn.functional.linear(x, weight)

    seconds_of = _cuda_seconds if device.type == "cuda" else timeit.timeit
    seconds_of(product, number=2)
    repeats = max(1, round(SECONDS / max(seconds_of(product, number=1), 1e-6)))
    return 2 * rows * columns * inner * repeats / median(seconds_of(product, number=repeats) for _ in range(ROUNDS))


def _cuda_seconds(run: Callable[[], object], number: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(number):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
