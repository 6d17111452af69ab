"""Seconds of computation in a training step, from its FLOPs and bytes by kind, and the share that a pipeline waits.

Each kind has a rate that kernels of its own reach:

- products of linear layers in FP8: 0.60 of the peak. DeepGEMM at its release, on an H800, for V3's shapes at 4,096 rows
  and more, weighted by their FLOPs: 1,187 of 1,979 TFLOP/s
- in bf16: 0.75. A large product reaches 0.80 on an H100 (benchmarks/results/gpu_v3_layers.json), narrow ones less
- attention: 0.45 of the bf16 peak. FlashAttention-3 (arXiv 2407.08608), causal, 4,096 tokens, forward and backward
- all else moves bytes, at 0.90 of the memory bandwidth (a copy, in the same JSON)

A whole step reaches WHOLE_STEP of these rates together: launches, quantization, uneven routing, the optimizer, a chip
that lowers its clock. It is calibrated on one figure, the paper's 180 K H800-hours for a trillion tokens (section 1).
NVIDIA's Automodel, in bf16 on 256 and 1,024 H100, is then planned within 15 % (tests/plan/test_step_time.py). Hiding
communication behind computation costs the paper's run 20 of 132 multiprocessors (3.2.1). No torch.
"""

from dataclasses import dataclass

from soli.analysis.parameters import flops
from soli.config import ModelConfig
from soli.plan.devices import DeviceKind

FP8_PRODUCTS, PRODUCTS, ATTENTION, COPY = 0.60, 0.75, 0.45, 0.90  # of the peaks
WHOLE_STEP = 0.64
HIDING = 112 / 132  # multiprocessors left to compute where others communicate
MOVES = 5  # of a byte that autograd saves: written and read, read backward, its gradient written and read


@dataclass(frozen=True)
class TokenWork:
    """One token's forward pass: FLOPs by kind, and bytes saved for the backward pass."""

    linear: int  # FLOPs of linear layers in blocks
    head: int  # FLOPs of the head, once for each prediction; bf16 also where blocks compute in FP8
    attention: int
    saved: float  # bytes

    @classmethod
    def of(cls, config: ModelConfig, length: int, saved: float) -> "TokenWork":
        """In a sequence of `length`, with the MTP modules."""
        forward = flops(config, length, mtp=True)
        head = 2 * (1 + config.num_nextn_predict_layers) * config.vocab_size * config.hidden_size
        return cls(forward.matmul - head, head, forward.attention_prefill, saved)


def seconds_of_token(work: TokenWork, device: DeviceKind, precision: str, repeated: float) -> float:
    """Seconds of a token's forward and backward pass where each kernel reaches its own rate and nothing else happens;
    `repeated` is the share of the forward pass that the backward pass computes again."""
    rate = 1e12 * device.tflops
    linear = work.linear / (1e12 * _product_tflops(device, precision)) + work.attention / (ATTENTION * rate)
    moved = (MOVES + 2 * repeated) * work.saved / (COPY * device.bandwidth)
    return (3 + repeated) * linear + 3 * work.head / (PRODUCTS * rate) + moved


def up_projections(config: ModelConfig, length: int) -> float:
    """The share of a forward pass that MLA's up-projections are: what the paper's run repeats, with norms (3.2.3)."""
    forward = flops(config, length, mtp=True)
    heads, layers = config.num_attention_heads, config.num_hidden_layers + config.num_nextn_predict_layers
    queries = (config.q_lora_rank or 0) * config.qk_head_dim
    keys = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    return 2 * layers * heads * (queries + keys) / (forward.matmul + forward.attention_prefill)


def waiting(schedule: str, ranks: int, micro_batches: int) -> float:
    """For how long a rank of a pipeline waits for others in a step, in units of its own work, its stages equal, a
    backward pass twice as long as a forward one. With two stages on a rank waiting is half as long; where weight
    gradients fill gaps, a third (DualPipe: arXiv 2412.19437, table 2)."""
    return (ranks - 1) / ({"1F1B": 1, "Interleaved1F1B": 2}.get(schedule, 3) * micro_batches)


def bubble_of(schedule: str, ranks: int, micro_batches: int) -> float:
    """The share of a step in which a rank of a pipeline waits for others."""
    waits = waiting(schedule, ranks, micro_batches)
    return waits / (1 + waits)


def micro_batches_in_flight(schedule: str, ranks: int, micro_batches: int, rank: int = 0) -> float:
    """Micro-batches whose activations a rank holds at once, in forward passes of all of its layers."""
    most = {"1F1B": ranks - rank, "Interleaved1F1B": 1.5 * ranks}.get(schedule, ranks + 1)
    return 1 if ranks == 1 else min(most, micro_batches)


def _product_tflops(device: DeviceKind, precision: str) -> float:
    if precision == "fp8" and device.fp8_tflops:
        return FP8_PRODUCTS * device.fp8_tflops
    return PRODUCTS * (device.tflops if precision == "bf16" else device.fp32_tflops)  # FP8 is emulated in fp32
