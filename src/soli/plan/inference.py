"""How fast a model runs whose routed experts are partly in memory and partly on disk: a model of time, without torch.

A forward pass of T tokens goes through the layers one after the other. With B bytes per second at which the kernels
read weights of a format for one token, and A FLOP per second of the products of further tokens with them,

    compute(bytes, FLOPs, T) = max(bytes / B + (1 - 1/T) FLOPs / A, FLOPs / A)

Weights that stay in memory and the latent cache are computed so. Of the E experts of a layer the T tokens choose

    n = E (1 - (1 - K / E)^T)        in expectation, with even routing; K for one token

different ones, each of `e` bytes, with T K / n tokens, of which m are not in memory. The reads of a layer's misses
overlap with the gate and up products (two thirds of an expert) of its cached experts; the last expert to arrive and the
down products (one third) come after them, and so does the next layer, whose choices are not known before. With c =
compute(one expert):

    read(m)  = latency + handling + m e / disk rate,  0 for m = 0
    layer(m) = max(read(m) + [m > 0] 2/3 c, 2/3 n c) + 1/3 n c

A prompt that chooses nearly all experts of each layer reads the next layer's meanwhile, so over all layers

    prompt = max(compute, read(misses)) + read(the first window of the first layer)

One token's misses are K independent draws of probability 1 - h; a chunk of tokens misses n (1 - s) experts. With s the
share of experts that are in memory, h = s where all experts are chosen equally often, which is the lower bound: the
cache cannot do worse than by chance. With a skew z experts are chosen as often as r^-z by rank r, and

    h = sum over ranks 1 ... s E of r^-z / sum over ranks 1 ... E of r^-z

holds where the cache has the most frequent ones. Where it is known which share of tokens chose each expert, from
earlier runs, h is that of the experts with the largest shares, less what makes them largest by chance. Beside these
each layer, and each step, takes a constant time that no byte explains; attention's own products are slower than those
with weights. What the store reads ahead is not in the model. The bound is the resource that is busy for the longest
part of the time: disk, memory or arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Final

import numpy as np
from numpy.typing import NDArray

from soli.analysis.parameters import EMBEDDING, HEAD, ROUTED, cache_bytes, cache_read_bytes, flops
from soli.errors import SoliError
from soli.experts.policy import MOST_PARTS, NEARLY_ALL
from soli.plan.sizes import ModelSizes

KERNEL_EFFICIENCY: Final = 0.75  # of memory bandwidth, at which Soli's kernels read weights: measured 72 to 83 %
FLOPS_PER_BYTE: Final = 15.0  # of a stated machine: FLOP per byte of its memory bandwidth, where none are stated
DISK_LATENCY: Final = 1e-4  # seconds, of a stated disk
# Seconds that no byte explains, of a step, of a layer, and in the store of a layer with misses; what a prompt reaches
# of the rate of its products alone; the rate of attention's own products, as a share of that of products with bf16
# weights. The third is fitted to recorded runs from disk (benchmarks/results/paging_*.json), the others to processor
# time on one core of an EPYC with AVX-512, of nano and of a model of 1.2 B in FP8 and int4.
STEP_SECONDS: Final = 250e-6
LAYER_SECONDS: Final = 80e-6
MISS_SECONDS: Final = 1.4e-3
PROMPT_EFFICIENCY: Final = 0.85
ATTENTION_IN_DECODING: Final = 0.6
ATTENTION_IN_PROMPTS: Final = 0.3
# By which 25, 50 and 75 % of 32 experts are 58, 77 and 90 % of what is chosen, of 64 experts 61, 79 and 91 %. Measured
# with the store's policy: of the bundled model's 60 to 72, 85 to 92 and 97 to 99 %, of 64 experts with random weights
# 62, 78 and 93 % (benchmarks/results: expert_policies.json, paging_int4.json).
TYPICAL_SKEW: Final = 0.8
MAX_RANKS: Final = 1_000_000  # experts of a layer whose frequencies are summed one by one
MAX_DRAWS: Final = 512  # experts of a token up to which misses are summed over their distribution


@dataclass(frozen=True)
class MachineRates:
    """Bytes and FLOP per second, and seconds. `weight_rates`: at which kernels read weights of a format for one token;
    `flop_rates`: of products with many tokens, by the weights' format."""

    memory_rate: float
    disk_rate: float
    weight_rates: Mapping[str, float]
    flop_rates: Mapping[str, float]
    disk_latency: float = DISK_LATENCY


def stated_machine(memory_rate: float, disk_rate: float, flop_rate: float | None) -> MachineRates:
    """A machine that is not here: kernels reach KERNEL_EFFICIENCY of its memory bandwidth."""
    formats = ("fp32", "bf16", "fp8", "int8", "int4", "fp4")
    rate = FLOPS_PER_BYTE * memory_rate if flop_rate is None else flop_rate
    return MachineRates(
        memory_rate, disk_rate, dict.fromkeys(formats, KERNEL_EFFICIENCY * memory_rate), dict.fromkeys(formats, rate)
    )


def mean_rates(first: MachineRates, second: MachineRates) -> MachineRates:
    """Of the same machine, measured twice: before and after a run."""

    def mean(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
        return {name: (one[name] + other[name]) / 2 for name in one}

    return MachineRates(
        (first.memory_rate + second.memory_rate) / 2,
        (first.disk_rate + second.disk_rate) / 2,
        mean(first.weight_rates, second.weight_rates),
        mean(first.flop_rates, second.flop_rates),
        (first.disk_latency + second.disk_latency) / 2,
    )


@dataclass(frozen=True)
class Prediction:
    """`tokens` in `seconds`; for how many of them disk, memory and arithmetic are busy; bytes read from disk, and the
    share of chosen experts that is in memory."""

    tokens: int
    seconds: float
    disk_seconds: float
    memory_seconds: float
    arithmetic_seconds: float
    disk_bytes: float
    hit_rate: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        """disk, memory or arithmetic."""
        busy = {"disk": self.disk_seconds, "memory": self.memory_seconds, "arithmetic": self.arithmetic_seconds}
        return max(busy, key=lambda resource: busy[resource])


def predict_decode(
    sizes: ModelSizes, machine: MachineRates, share: float, context: int, hit_rate: float
) -> Prediction:
    """One new token after `context` others; `share` of all experts is in memory, where `hit_rate` of a token's are."""
    step = _Step(sizes, machine)
    step.add_resident(1)
    attention = flops(sizes.config, context).attention_decode / ATTENTION_IN_DECODING
    step.add_compute("bf16", cache_read_bytes(sizes.config, context), attention)
    step.add_experts(1, share, hit_rate)
    return step.prediction(1, hit_rate)


def predict_prompt(
    sizes: ModelSizes, machine: MachineRates, share: float, tokens: int, tokens_per_call: int
) -> Prediction:
    """A prompt, in calls of up to `tokens_per_call` tokens, each of which reads the experts that its tokens choose."""
    step = _Step(sizes, machine)
    for start in range(0, tokens, tokens_per_call):
        count = min(tokens_per_call, tokens - start)
        step.add_resident(count)
        seen = flops(sizes.config, 2 * start + count)  # its prefill is that of the mean over so many tokens
        attention = count * seen.attention_prefill / ATTENTION_IN_PROMPTS
        step.add_compute("bf16", (start + count) * cache_bytes(sizes.config), attention, count)
        step.add_experts(count, share, share)
    return step.prediction(tokens, share)


def expected_hit_rate(share: float, experts: int, skew: float = 0.0) -> float:
    """The share of a token's experts in memory, where `share` of a layer's experts are: those chosen most often."""
    if skew == 0 or share >= 1:
        return min(1.0, share)
    if experts > MAX_RANKS:
        raise SoliError(f"a model with {experts:,} experts in a layer can be planned with a skew of 0 alone")
    frequencies = [rank**-skew for rank in range(1, experts + 1)]
    cached = share * experts
    whole = int(cached)
    return (sum(frequencies[:whole]) + (cached - whole) * frequencies[whole]) / sum(frequencies)


def remembered_hit_rate(shares_LE: NDArray[np.float64], tokens: int, slots: int) -> float:
    """The share of chosen experts that are in memory, where those are that the largest `shares_LE` of `tokens` tokens
    chose. Of few tokens the shares differ by chance, and the largest are too large: each layer's are moved towards
    their mean, by the part of their variance that drawing so many tokens explains (the James-Stein estimate)."""
    mean_L1 = shares_LE.mean(axis=1, keepdims=True)
    chance_L1 = (shares_LE * (1 - shares_LE)).mean(axis=1, keepdims=True) / max(1, tokens)
    variance_L1 = np.maximum(shares_LE.var(axis=1, keepdims=True), np.finfo(float).tiny)
    estimates_LE = mean_L1 + np.maximum(0, 1 - chance_L1 / variance_L1) * (shares_LE - mean_L1)
    estimates = np.sort(estimates_LE, axis=None)[::-1]
    return float(estimates[:slots].sum() / estimates.sum())


class _Step:
    """Sums of a forward pass."""

    def __init__(self, sizes: ModelSizes, machine: MachineRates) -> None:
        self._sizes, self._machine = sizes, machine
        self._seconds_before = 0.0  # of earlier calls
        self._seconds = self._disk = self._memory = self._arithmetic = self._disk_bytes = 0.0

    def prediction(self, tokens: int, hit_rate: float) -> Prediction:
        return Prediction(
            tokens, self._seconds, self._disk, self._memory, self._arithmetic, self._disk_bytes, hit_rate
        )

    def add_compute(self, format: str, size: float, operations: float, rows: float = 1) -> None:
        """Weights that are read once, and operations of `rows` tokens with them."""
        self._seconds += self._compute(format, size, operations, rows)

    def add_resident(self, tokens: int) -> None:
        """Begin a call, which overlaps with none before: all parts but routed experts, for so many tokens of which the
        last has logits."""
        self._seconds_before = self._seconds
        for part in self._sizes.parts:
            if part.name == ROUTED:
                continue
            rows = 1 if part.name in (EMBEDDING, HEAD) else tokens
            operations = rows / _efficiency(rows) * part.flops_per_token
            self.add_compute(part.format, part.bytes_per_token, operations, rows)
        self._seconds += STEP_SECONDS + LAYER_SECONDS * self._sizes.config.num_hidden_layers

    def add_experts(self, tokens: int, share: float, hit_rate: float) -> None:
        """The routed experts of all layers, after all else of the call has been added."""
        sizes, machine, layers = self._sizes, self._machine, self._sizes.layers
        E, K = sizes.config.n_routed_experts, sizes.config.num_experts_per_tok
        routed = next(part for part in sizes.parts if part.name == ROUTED)
        chosen = K if tokens == 1 else E * (1 - (1 - K / E) ** tokens)
        operations = routed.flops_per_token * tokens / _efficiency(tokens)
        compute = self._compute(routed.format, layers * chosen * sizes.expert_bytes, operations, tokens * K / chosen)
        if chosen > NEARLY_ALL * E:
            self._add_prompt_reads(compute, chosen * (1 - share))
            return
        compute /= layers
        for misses, probability in _misses(tokens, chosen, share, hit_rate):
            read = self._read(layers * probability, misses)
            before = MISS_SECONDS + machine.disk_latency if misses else 0.0
            last = 2 / 3 * compute / chosen if misses else 0.0
            seconds = max(before + read + last, 2 / 3 * compute) + compute / 3
            self._seconds += layers * probability * seconds

    def _add_prompt_reads(self, compute: float, misses: float) -> None:
        """Experts that are computed in so many seconds, `misses` of each layer read meanwhile."""
        layers = self._sizes.layers
        computed = self._seconds - self._seconds_before + compute
        read = layers * self._read(layers, misses)
        stops = layers * (MISS_SECONDS + self._machine.disk_latency) if misses else 0.0
        first = read / layers / MOST_PARTS
        self._seconds = self._seconds_before + max(computed, read) + first + stops

    def _compute(self, format: str, size: float, operations: float, rows: float) -> float:
        """Seconds."""
        memory = size / self._machine.weight_rates[format]
        arithmetic = operations / self._machine.flop_rates[format]
        self._memory += memory
        self._arithmetic += arithmetic
        return max(memory + (1 - 1 / rows) * arithmetic, arithmetic)

    def _read(self, layers: float, experts: float) -> float:
        """Seconds that one of so many layers reads so many experts."""
        size = experts * self._sizes.expert_bytes
        self._disk += layers * size / self._machine.disk_rate
        self._disk_bytes += layers * size
        return size / self._machine.disk_rate


def _efficiency(tokens: float) -> float:
    return PROMPT_EFFICIENCY if tokens > 1 else 1.0


def _misses(tokens: int, chosen: float, share: float, hit_rate: float) -> list[tuple[float, float]]:
    """(experts of a layer that are not in memory, probability)."""
    if tokens > 1:
        return [(chosen * (1 - share), 1.0)]
    draws = int(chosen)
    if hit_rate >= 1 or hit_rate <= 0 or draws > MAX_DRAWS:
        return [(draws * (1 - hit_rate), 1.0)]
    return [
        (float(misses), comb(draws, misses) * (1 - hit_rate) ** misses * hit_rate ** (draws - misses))
        for misses in range(draws + 1)
    ]
