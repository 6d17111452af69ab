"""How large a model is and what one token costs, from its configuration alone: parameters, bytes, cache, FLOPs.

Every number falls out of one list, `weights(config)`: groups of equal tensors, how many there are and how many of them
take part in computing one token. It is written from the paper's shapes (section 2.1), independent of the model's code,
and the tests require both to agree to the last parameter. No torch.

"Activated" counts embedding and head in full, as the paper's 37 B does, and leaves out the router's selection biases,
which rank experts but multiply nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Literal

from soli.config import ModelConfig

FP8_BLOCK = 128

# How files store a tensor: linear weights may be FP8; embedding, head, router, norms, biases and the MTP projection
# stay bf16; the router's selection bias is fp32 everywhere.
Storage = Literal["linear", "high", "fp32"]


@dataclass(frozen=True)
class Weights:
    """`count` tensors of one shape, of which `active` take part in computing one token."""

    component: str
    shape: tuple[int, ...]
    count: int
    active: int
    storage: Storage = "linear"

    @property
    def total(self) -> int:
        return self.count * prod(self.shape)

    @property
    def activated(self) -> int:
        return self.active * prod(self.shape)

    @property
    def bytes_bf16(self) -> int:
        return self.total * (4 if self.storage == "fp32" else 2)

    @property
    def bytes_fp8(self) -> int:
        """Where files are FP8: a byte per value, an fp32 scale per 128x128 block. Elsewhere as bf16."""
        if self.storage != "linear":
            return self.bytes_bf16
        return self.total + self.count * 4 * prod(ceil(side / FP8_BLOCK) for side in self.shape)


@dataclass(frozen=True)
class Component:
    """A row of the table: parameters in all, those that a token uses, and bytes in files."""

    name: str
    total: int
    activated: int
    bytes_bf16: int
    bytes_fp8: int


@dataclass(frozen=True)
class Flops:
    """Forward floating-point operations for one token, a multiply and an add counted as two.

    `matmul`: twice the activated parameters of linear layers, router and head. `attention_decode`: one new token over
    `context` cached latents, absorbed. `attention_prefill`: mean over a sequence of `context` tokens, expanded, causal.
    Sparse attention is to `index_topk` latents, and in both figures are the scores of all tokens where they are more.
    """

    context: int
    matmul: int
    attention_decode: int
    attention_prefill: int

    @property
    def decode(self) -> int:
        return self.matmul + self.attention_decode

    @property
    def prefill(self) -> int:
        return self.matmul + self.attention_prefill


@dataclass(frozen=True)
class Count(Component):
    """The parameters of a model, whose `components` add up to it; MTP modules are among them only with `mtp`.

    `mtp_own` parameters belong to the MTP modules alone; `mtp_files` also counts the copies of embedding and head that
    the released files repeat for each module; `mtp_activated` of its own take part when each looks one token further.
    """

    components: tuple[Component, ...]
    router_biases: int
    embedding: int
    mtp_own: int
    mtp_files: int
    mtp_activated: int


def count(config: ModelConfig, mtp: bool = False) -> Count:
    """Count a model by component; with `mtp` its MTP modules are a component too."""
    main, extra = weights(config), mtp_weights(config)
    names = dict.fromkeys(w.component for w in main)
    components = [_component(name, [w for w in main if w.component == name]) for name in names]
    if mtp and extra:
        components.append(_component("MTP modules", extra))
    counted = main + extra if mtp else main
    copies = config.num_nextn_predict_layers * 2 * config.vocab_size * config.hidden_size
    own = sum(w.total for w in extra)
    return Count(
        **vars(_component("total", counted)),
        components=tuple(components),
        router_biases=sum(w.total for w in counted if w.storage == "fp32"),
        embedding=config.vocab_size * config.hidden_size,
        mtp_own=own,
        mtp_files=own + copies,
        mtp_activated=sum(w.activated for w in extra),
    )


def cache_bytes(config: ModelConfig, mtp: bool = False) -> int:
    """Bytes that one token leaves in the bf16 cache: a latent and a rotated key per layer, shared by all heads, and the
    key of each indexer."""
    return 2 * (_latent_values(config, mtp) + _index_key_values(config, mtp))


def cache_read_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of the bf16 cache that a new token after `context` others reads: of sparse attention the selected latents
    and every indexer's key."""
    if config.index_topk is None or context <= config.index_topk:
        return 2 * context * _latent_values(config)
    return 2 * (config.index_topk * _latent_values(config) + context * _index_key_values(config))


def _latent_values(config: ModelConfig, mtp: bool = False) -> int:
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return layers * (config.kv_lora_rank + config.qk_rope_head_dim)


def _index_key_values(config: ModelConfig, mtp: bool = False) -> int:
    return config.num_indexers(config.num_nextn_predict_layers if mtp else 0) * (config.index_head_dim or 0)


def expert_read_bytes(config: ModelConfig) -> int:
    """FP8 bytes of routed experts that one token reads, scales not counted: what paging from disk must move."""
    return sum(w.activated for w in weights(config) if w.component == ROUTED)


def flops(config: ModelConfig, context: int, mtp: bool = False) -> Flops:
    """Forward FLOPs per token with `context` tokens in view; with `mtp` every module and its pass of the head too."""
    modules = config.num_nextn_predict_layers if mtp else 0
    used = [w for w in weights(config) if w.component not in (EMBEDDING, HEAD)]
    used += mtp_weights(config) if mtp else []
    linear = sum(w.activated for w in used if len(w.shape) == 2)
    head = (1 + modules) * config.vocab_size * config.hidden_size
    layers, heads = config.num_hidden_layers + modules, config.num_attention_heads
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    selected = context if config.index_topk is None else min(context, config.index_topk)
    seen_on_average = (selected * (selected + 1) // 2 + (context - selected) * selected) // context
    scored_on_average = (context * (context + 1) - selected * (selected + 1)) // (2 * context)
    score = 2 * config.num_indexers(modules) * (config.index_n_heads or 0) * (config.index_head_dim or 0)
    return Flops(
        context=context,
        matmul=2 * (linear + head),
        attention_decode=2 * layers * heads * selected * (latent + rope + latent)
        + (score * context if selected < context else 0),
        attention_prefill=2 * layers * heads * seen_on_average * (config.qk_head_dim + config.v_head_dim)
        + score * scored_on_average,
    )


@lru_cache(maxsize=16)
def training_flops(config: ModelConfig, length: int, mtp: bool = True) -> int:
    """FLOPs that training costs per token of a sequence of `length`: one forward pass, and twice that backward, with
    every MTP module or none."""
    return 3 * flops(config, length, mtp).prefill


EMBEDDING, ATTENTION, DENSE, ROUTER = "embedding", "attention", "dense MLP", "router"
ROUTED, SHARED, NORMS, HEAD = "routed experts", "shared experts", "norms", "head"


def weights(config: ModelConfig) -> list[Weights]:
    """The main model's tensors, MTP modules not among them."""
    vocabulary = (config.vocab_size, config.hidden_size)
    mixtures = config.num_moe_layers
    groups = [
        Weights(EMBEDDING, vocabulary, 1, 1, "high"),
        *_attention(config, config.num_hidden_layers),
        *_indexer(config, config.num_indexers()),
        *_mlp(DENSE, config.hidden_size, config.intermediate_size, config.num_hidden_layers - mixtures),
        *_mixture(config, mixtures),
        *_norms(config, config.num_hidden_layers),
        Weights(NORMS, (config.hidden_size,), 1, 1, "high"),
        *([] if config.tie_word_embeddings else [Weights(HEAD, vocabulary, 1, 1, "high")]),
    ]
    return [w for w in groups if w.count]


def mtp_weights(config: ModelConfig) -> list[Weights]:
    """What MTP modules have of their own (equations 21-23): two norms, their joint projection, a block, a norm."""
    modules, width = config.num_nextn_predict_layers, config.hidden_size
    dense = _mlp(DENSE, width, config.intermediate_size, modules)
    groups = [
        Weights(NORMS, (width,), 3 * modules, 3 * modules, "high"),
        Weights("joint projection", (width, 2 * width), modules, modules, "high"),
        *_attention(config, modules),
        *_indexer(config, config.num_indexers(modules) - config.num_indexers()),
        *_norms(config, modules),
        *(_mixture(config, modules) if config.n_routed_experts else dense),
    ]
    return [w for w in groups if w.count]


def _component(name: str, group: Sequence[Weights]) -> Component:
    return Component(
        name,
        total=sum(w.total for w in group),
        activated=sum(w.activated for w in group),
        bytes_bf16=sum(w.bytes_bf16 for w in group),
        bytes_fp8=sum(w.bytes_fp8 for w in group),
    )


def _attention(config: ModelConfig, layers: int) -> list[Weights]:
    """Equations 1-11: queries (through a latent or not), one latent and one rotated key for all heads, output."""
    width, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries, low_rank = heads * config.qk_head_dim, config.q_lora_rank
    shapes = [
        *([(queries, width)] if low_rank is None else [(low_rank, width), (queries, low_rank)]),
        (latent + config.qk_rope_head_dim, width),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        (width, heads * config.v_head_dim),
    ]
    groups = [Weights(ATTENTION, shape, layers, layers) for shape in shapes]
    if config.attention_bias:
        sizes = [latent + config.qk_rope_head_dim, width] + ([] if low_rank is None else [low_rank])
        groups += [Weights(ATTENTION, (size,), layers, layers, "high") for size in sizes]
    return groups


def _indexer(config: ModelConfig, layers: int) -> list[Weights]:
    """Sparse attention's: queries from the query latent, one key with its LayerNorm, the heads' weights."""
    width, heads, key = config.hidden_size, config.index_n_heads or 0, config.index_head_dim or 0
    return [
        Weights(ATTENTION, (heads * key, config.q_lora_rank or 0), layers, layers),
        Weights(ATTENTION, (key, width), layers, layers),
        Weights(ATTENTION, (heads, width), layers, layers, "high"),
        Weights(NORMS, (key,), 2 * layers, 2 * layers, "high"),
    ]


def _norms(config: ModelConfig, layers: int) -> list[Weights]:
    sizes = [config.hidden_size, config.hidden_size, config.kv_lora_rank]
    sizes += [] if config.q_lora_rank is None else [config.q_lora_rank]
    return [Weights(NORMS, (size,), layers, layers, "high") for size in sizes]


def _mlp(component: str, width: int, inner: int, count: int, active: int | None = None) -> list[Weights]:
    """Gate, up and down of `count` gated MLPs."""
    active = count if active is None else active
    return [
        Weights(component, (inner, width), 2 * count, 2 * active),
        Weights(component, (width, inner), count, active),
    ]


def _mixture(config: ModelConfig, layers: int) -> list[Weights]:
    """Equations 12-16: of the routed experts a token uses `num_experts_per_tok`, of router and shared experts all."""
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    has_bias = config.topk_method == "noaux_tc"
    return [
        Weights(ROUTER, (experts, width), layers, layers, "high"),
        *([Weights(ROUTER, (experts,), layers, 0, "fp32")] if has_bias else []),
        *_mlp(ROUTED, width, inner, layers * experts, layers * config.num_experts_per_tok),
        *(_mlp(SHARED, width, inner * config.n_shared_experts, layers) if config.n_shared_experts else []),
        *([Weights(NORMS, (width,), layers, layers, "high")] if config.family.norms_mixture else []),
    ]
