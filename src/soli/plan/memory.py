"""Bytes of device memory that a run needs, from its settings alone: states, working copies, activations.

States are fp32 master weights, fp32 gradients and the optimizer's moments in the dtype of the settings. Activations are
what autograd saves between the forward and the backward pass of one micro-batch: each module's saved inputs, derived
from the model's code and compared with torch's saved tensors in the tests (within 15 %). Not counted: the temporaries
of single operations, except the two largest, and the allocator's fragmentation. No torch.

All sums are bytes per token unless a name says otherwise; D hidden, H heads, N nope, R rope, V value, C latent,
Q query latent, F expert width, E experts, K chosen.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil

from soli.analysis.parameters import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    HEAD,
    ROUTED,
    ROUTER,
    SHARED,
    Weights,
    mtp_weights,
    weights,
)
from soli.config import ModelConfig
from soli.train.settings import OptimizerSettings, TrainSettings

# As in soli.train.losses: tokens on a CPU, logits on a GPU, whose logits exist at one time.
LOGITS_CHUNK = 512
GPU_LOGITS = 2**27
FP8 = 1 + 4 / 128  # bytes of a value in E4M3 with its share of a tile's scale
SHORT = 512  # queries up to which a CPU computes attention scores in the activations' dtype: soli.model.attention


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the peak."""

    weights: int  # fp32 masters, router biases
    gradients: int  # fp32
    moments: int
    copies: int  # of weights in the compute precision, kept from forward to backward
    activations: int  # that autograd saves of one micro-batch
    transient: int  # logits of one chunk, or one block's recomputed activations: whichever is larger

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        return self.states + self.copies + self.activations + self.transient


def plan_memory(
    settings: TrainSettings, precision: str, kind: str, devices: int = 1, length: int | None = None
) -> MemoryEstimate:
    """Memory of a step in `precision` (fp32, bf16, fp8) on a device of `kind` (cpu, cuda).

    `length` is that of a sequence, by default the pretraining's; a micro-batch has the same number of tokens at any
    length, but at least one sequence. Several devices share the states evenly and gather one block's copies at a time,
    as FSDP2 does; each has a micro-batch of its own.
    """
    config, run, alone = settings.model, settings.run, settings.losses.mtp_alone
    all_weights = [*weights(config), *mtp_weights(config)]
    trained = mtp_weights(config) if alone else all_weights
    biases = sum(4 * w.total for w in all_weights if w.storage == "fp32")
    checkpointed = run.activation_checkpointing
    first = settings.schedule.sequence_length
    length = length or first
    sequences = max(1, run.micro_sequences * first // length)
    saved = _SavedActivations(config, precision, kind, length)
    inputs = saved.width * config.hidden_size * sum(_block_counts(config, alone).values())
    per_token = saved.outside_blocks() + (inputs if checkpointed else _saved_in_blocks(saved, alone))
    recomputed = sequences * length * largest_block(config, precision, kind, length) if checkpointed else 0
    gathered = checkpointed or devices > 1
    return MemoryEstimate(
        weights=ceil((4 * parameters(all_weights) + biases) / devices),
        gradients=ceil(4 * parameters(trained) / devices),
        moments=ceil(moment_bytes(trained, settings.optimizer) / devices),
        copies=_copies(config, precision, largest=gathered),
        activations=round(sequences * length * per_token) + (0 if alone else head_gradient_bytes(config)),
        transient=round(max(_logits(config, saved.width, kind), recomputed)),
    )


def parameters(groups: list[Weights]) -> int:
    """How many there are, router biases not among them."""
    return sum(w.total for w in groups if w.storage != "fp32")


def moment_bytes(trained: list[Weights], optimizer: OptimizerSettings) -> int:
    """AdamW has two moments; Muon one for the matrices inside blocks, two for embedding, head, routers, vectors."""
    size = {"fp32": 4, "bf16": 2}[optimizer.moments]

    def moments(group: Weights) -> int:
        is_inner_matrix = len(group.shape) == 2 and group.component not in (EMBEDDING, HEAD, ROUTER)
        return 1 if optimizer.name == "muon" and is_inner_matrix else 2

    return sum(size * moments(w) * w.total for w in trained if w.storage != "fp32")


@lru_cache(maxsize=64)
def saved_per_token(config: ModelConfig, precision: str, kind: str, length: int) -> float:
    """Bytes that autograd saves of each token of a sequence of `length`, nothing recomputed."""
    saved = _SavedActivations(config, precision, kind, length)
    return saved.outside_blocks() + _saved_in_blocks(saved)


@lru_cache(maxsize=64)
def largest_block(config: ModelConfig, precision: str, kind: str, length: int) -> float:
    """Bytes that autograd saves of each token in the block that saves most: what is recomputed at once."""
    saved = _SavedActivations(config, precision, kind, length)
    return max(saved.block(mixture) for mixture, number in _block_counts(config).items() if number)


def head_gradient_bytes(config: ModelConfig) -> int:
    """Each loss computes the head's gradient in its forward pass, in fp32."""
    return 4 * (1 + config.num_nextn_predict_layers) * config.vocab_size * config.hidden_size


def _block_counts(config: ModelConfig, mtp_alone: bool = False) -> dict[bool, int]:
    """Blocks with a mixture and without one, those of MTP modules included; or those alone."""
    modules = config.num_nextn_predict_layers
    if mtp_alone:
        return {bool(config.n_routed_experts): modules}
    mixtures = config.num_moe_layers + (modules if config.n_routed_experts else 0)
    return {True: mixtures, False: config.num_hidden_layers + modules - mixtures}


class _SavedActivations:
    """Bytes that autograd saves for each token, module by module."""

    def __init__(self, config: ModelConfig, precision: str, kind: str, length: int) -> None:
        self.config, self.kind, self.length = config, kind, length
        self.fp8 = precision == "fp8"
        self.width = 4 if precision == "fp32" else 2

    def block(self, mixture: bool) -> float:
        """A block: two norms, attention, feed-forward; the sums of the residual stream save nothing."""
        D = self.config.hidden_size
        return 2 * self._norm(D) + self._attention() + (self._mixture() if mixture else self._dense())

    def outside_blocks(self) -> float:
        """Everything outside blocks: ids, angles, last norm, the losses' gradients of their hidden states, MTP."""
        config, D, modules = self.config, self.config.hidden_size, self.config.num_nextn_predict_layers
        angles = 4 * config.qk_rope_head_dim
        each_loss = self._norm(D) + self.width * D
        return (1 + modules) * (8 + angles + each_loss) + modules * (2 * self._norm(D) + 2 * self.width * D)

    def _norm(self, width: int) -> float:
        """Its input in fp32, the statistics, and the normed value that the weight multiplies."""
        return 4 * width + 4 + self.width * width

    def _input(self, width: int, readers: int) -> float:
        """What linear layers save of an input that `readers` of them share; in FP8 each quantizes its own."""
        return (readers * FP8 if self.fp8 else self.width) * width

    def _attention(self) -> float:
        config, H = self.config, self.config.num_attention_heads
        X, V, Q, C = config.qk_head_dim, config.v_head_dim, config.q_lora_rank, config.kv_lora_rank
        queries = 0.0 if Q is None else self._norm(Q) + self._input(Q, 1)
        latents = self._norm(C) + self._input(C, 1)
        core = self.width * H * (2 * X + config.qk_nope_head_dim + V) + 4 * H  # fused: q, k, k and v as projected
        if self.fp8:
            core += self.width * H * V  # its output, of which the projection saves only the FP8 values
        if self.kind == "cpu" and (self.length <= SHORT or X != V):  # full scores, of a long sequence in fp32
            size = self.width if self.length <= SHORT else 4
            core = size * H * (2 * X + V + self.length)
        return self._input(config.hidden_size, 2) + queries + latents + core + self._input(H * V, 1)

    def _gated(self, width: int) -> float:
        """Gate, up, silu(gate), and their product on its way into down."""
        return 3 * self.width * width + self._input(width, 1)

    def _dense(self) -> float:
        return self._input(self.config.hidden_size, 2) + self._gated(self.config.intermediate_size)

    def _mixture(self) -> float:
        """Router scores and gates in fp32; K rows gathered for routed experts; shared experts on the token itself."""
        config, D, F = self.config, self.config.hidden_size, self.config.moe_intermediate_size
        K, E, shared = config.num_experts_per_tok, config.n_routed_experts or 0, config.n_shared_experts
        router = 4 * E + 16 * K + (0 if self.width == 4 and shared else 4 * D)
        row = self._input(D, 1) + self._gated(F) + self.width * (F + 1) + 24  # times its gate weight; three indices
        own = self._input(D, 2) + self._gated(F * shared) if shared else 0.0
        return router + K * row + own


def _saved_in_blocks(saved: _SavedActivations, mtp_alone: bool = False) -> float:
    counts = _block_counts(saved.config, mtp_alone)
    return sum(number * saved.block(mixture) for mixture, number in counts.items() if number)


def _logits(config: ModelConfig, width: int, kind: str) -> int:
    """A chunk's logits, twice in fp32; the head in the compute dtype and one chunk's share of its gradient."""
    head = config.vocab_size * config.hidden_size * (4 if width == 4 else 2 * width)
    chunk = LOGITS_CHUNK if kind == "cpu" else max(LOGITS_CHUNK, GPU_LOGITS // config.vocab_size)
    return 8 * chunk * config.vocab_size + head


def _copies(config: ModelConfig, precision: str, largest: bool) -> int:
    """Weights rounded to the compute precision: those of all layers, or of the largest block alone."""
    if precision == "fp32":
        return 0

    def size(group: Weights) -> int:
        return (1 if precision == "fp8" and group.storage == "linear" else 2) * group.total

    main = [w for w in weights(config) if w.component not in (EMBEDDING, HEAD, ROUTER)]
    if not largest:
        return sum(size(w) for w in (*main, *mtp_weights(config)) if w.component != ROUTER)
    L, mixtures = config.num_hidden_layers, config.num_moe_layers
    attention = sum(size(w) for w in main if w.component == ATTENTION) // L
    dense = sum(size(w) for w in main if w.component == DENSE) // max(1, L - mixtures)
    mixture = sum(size(w) for w in main if w.component in (ROUTED, SHARED)) // max(1, mixtures)
    return attention + max(dense, mixture)


def describe_fit(settings: TrainSettings, precision: str, kind: str, devices: int, available: int) -> str:
    """Whether a step fits in `available` bytes on each device, in words; where it does not, which options would."""
    memory = plan_memory(settings, precision, kind, devices)
    if memory.total <= available:
        return "it fits"
    devices_for_states = -(-memory.states * devices // available)
    if devices_for_states > devices:
        return f"it does not fit: weights, gradients and moments alone fill {devices_for_states:,} such devices"
    micro = settings.run.micro_sequences
    halved = [micro >> times for times in range(micro.bit_length())]
    for checkpointing, sequences in product((settings.run.activation_checkpointing, True), halved):
        run = replace(settings.run, micro_sequences=sequences, activation_checkpointing=checkpointing)
        if plan_memory(replace(settings, run=run), precision, kind, devices).total <= available:
            options = ("micro_sequences", "activation_checkpointing")
            changed = [name for name in options if getattr(run, name) != getattr(settings.run, name)]
            arguments = " ".join(f"--set run.{name}={str(getattr(run, name)).lower()}" for name in changed)
            return f"it does not fit; it would with {arguments}"
    return "it does not fit, not even one sequence at a time with activation checkpointing; use more devices"
