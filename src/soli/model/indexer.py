"""DeepSeek sparse attention (DSA): an indexer selects the tokens that attention reads (DeepSeek-V3.2 report, eq. 1).

Shapes: B batch, T queries, S cache slots, D hidden, Q query latent, J index heads, I index width, R rotary width.

A query t scores every token s up to its own: sum over heads of w_tj relu(q_tj k_s), with one key for all heads. It then
attends to the `index_topk` tokens of the highest scores; while there are no more than so many, to all, and nothing is
scored. The selection has no gradient. In GLM-5.2 some layers have no indexer and use the selection of the last that
has. The key is cached beside the token's latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soli.config import ModelConfig
from soli.model.cache import Cache
from soli.model.layers import Device, LayerNorm, Linear
from soli.model.rope import rotate

KEY_EPS = 1e-6  # of the key's LayerNorm, whatever rms_norm_eps is
MAX_SCORES = 2**24  # of all heads that exist at one time


@dataclass
class Selection:
    """What the last indexer of a forward pass has selected: bool, true for a token that a query attends to; None where
    that is every token before it."""

    text_BTS: Tensor | None = None  # without a cache
    decode_BS: Tensor | None = None  # of the decode tokens, over all slots of their block tables
    chunks: tuple[Tensor | None, ...] = ()  # of each prefill chunk (T, S)

    def replace(self, other: "Selection") -> None:
        """Become `other`, for the layers that share it."""
        self.text_BTS, self.decode_BS, self.chunks = other.text_BTS, other.decode_BS, other.chunks


class Indexer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        assert config.index_topk and config.index_n_heads and config.index_head_dim and config.q_lora_rank
        self.layer = layer
        self.topk = config.index_topk
        self.J, self.I, self.R = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.interleaved = config.indexer_rope_interleave
        self.wq_b = Linear(config.q_lora_rank, self.J * self.I, device, dtype)
        self.wk = Linear(config.hidden_size, self.I, device, dtype)
        self.k_norm = LayerNorm(self.I, KEY_EPS, device, dtype)
        self.weights_proj = Linear(config.hidden_size, self.J, device, dtype)

    @torch.no_grad()
    def forward(
        self, x_BTD: Tensor, q_latent_BTQ: Tensor, cos_sin: tuple[Tensor, ...], cache: Cache | None
    ) -> Selection:
        """Select for every token of `x_BTD`, the attention's input; `q_latent_BTQ`: its normed query latents."""
        key_BTI = self._rotate(self.k_norm(self.wk(x_BTD))[:, :, None], cos_sin)[:, :, 0]
        if cache is None:
            T = x_BTD.shape[1]
            if self.topk >= T:
                return Selection()
            scores_BTS = self._causal_scores(*self._queries(x_BTD, q_latent_BTQ, cos_sin), key_BTI, 0)
            # Between equal scores torch.topk chooses, as in transformers.
            selected_BTS = torch.zeros_like(scores_BTS, dtype=torch.bool)
            selected_BTS.scatter_(-1, scores_BTS.topk(self.topk).indices, True)
            return Selection(selected_BTS & (scores_BTS > -torch.inf))
        key_PSI = cache.write(self.layer, key_BTI.flatten(0, 1), "index_key")
        return self._select_cached(x_BTD, q_latent_BTQ, cos_sin, key_PSI, cache)

    def _select_cached(
        self,
        x_BTD: Tensor,
        q_latent_BTQ: Tensor,
        cos_sin: tuple[Tensor, ...],
        key_PSI: Tensor,
        cache: Cache,
    ) -> Selection:
        slots = cache.table_BM.shape[1] * key_PSI.shape[1]
        if self.topk >= max(slots, *(len(chunk.slots_S) for chunk in cache.chunks), 0):
            return Selection(chunks=(None,) * len(cache.chunks))
        q, w = (each.flatten(0, 1) for each in self._queries(x_BTD, q_latent_BTQ, cos_sin))
        n, key_SI, decode_BS = cache.num_decode_tokens, key_PSI.flatten(0, 1), None
        if n and slots > self.topk:
            scores_BS = _scores(q[:n, None], w[:n, None], key_SI[decode_slots(cache, key_PSI.shape[1])])[:, 0]
            is_past_BS = torch.arange(slots, device=scores_BS.device) >= cache.lengths_B[:, None]
            decode_BS = select(scores_BS.masked_fill(is_past_BS, -torch.inf), self.topk)
        masks: list[Tensor | None] = []
        for chunk in cache.chunks:
            if len(chunk.slots_S) <= self.topk:
                masks.append(None)
                continue
            queries = q[None, chunk.start : chunk.stop], w[None, chunk.start : chunk.stop]
            scores_1TS = self._causal_scores(*queries, key_SI[chunk.slots_S][None], chunk.first)
            masks.append(select(scores_1TS[0], self.topk))
        return Selection(None, decode_BS, tuple(masks))

    def _queries(
        self, x_BTD: Tensor, q_latent_BTQ: Tensor, cos_sin: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, T, J, I) and float32 weights of the heads (B, T, J)."""
        q_BTJI = self._rotate(self.wq_b(q_latent_BTQ).unflatten(-1, (self.J, self.I)), cos_sin)
        return q_BTJI, self.weights_proj(x_BTD.float()) * self.J**-0.5

    def _rotate(self, x_BTJI: Tensor, cos_sin: tuple[Tensor, ...]) -> Tensor:
        """The first R values rotated, by a layout of the indexer's own; the rest as it is."""
        rope, rest = x_BTJI.split((self.R, self.I - self.R), dim=-1)
        return torch.cat((rotate(rope, cos_sin, self.interleaved), rest), dim=-1)

    def _causal_scores(self, q_BTJI: Tensor, w_BTJ: Tensor, key_BSI: Tensor, first: int) -> Tensor:
        """(B, T, S), -inf for slots after a query's own, the first of which is `first`."""
        T, S = q_BTJI.shape[1], key_BSI.shape[1]
        later_TS = torch.ones(T, S, dtype=torch.bool, device=key_BSI.device).triu(first + 1)
        return _scores(q_BTJI, w_BTJ, key_BSI).masked_fill(later_TS, -torch.inf)


def _scores(q_BTJI: Tensor, w_BTJ: Tensor, key_BSI: Tensor) -> Tensor:
    """Sum over heads of w relu(q k / sqrt(I)), float32 (B, T, S); some queries at a time, for memory."""
    B, T, J, I = q_BTJI.shape  # noqa: E741
    key_B1IS = key_BSI.float().transpose(1, 2)[:, None]
    queries = max(1, MAX_SCORES // (B * J * key_BSI.shape[1]))
    parts = [
        (w[:, :, None] @ ((q.float() @ key_B1IS) * I**-0.5).relu())[:, :, 0]
        for q, w in zip(q_BTJI.split(queries, 1), w_BTJ.split(queries, 1), strict=True)
    ]
    return parts[0] if queries >= T else torch.cat(parts, 1)


def select(scores_XS: Tensor, topk: int) -> Tensor:
    """Bool (..., S): the `topk` highest scores above -inf, of equal ones the first; what else is scored in the same
    call changes nothing."""
    scores_XS = scores_XS.masked_fill(scores_XS.isnan(), 0.0)  # a NaN has no place in an order
    least_X1 = scores_XS.topk(topk).values[..., -1:]
    above_XS, equal_XS = scores_XS > least_X1, scores_XS == least_X1
    free_X1 = topk - above_XS.sum(-1, keepdim=True)
    return (above_XS | (equal_XS & (equal_XS.cumsum(-1) <= free_X1))) & (scores_XS > -torch.inf)


def decode_slots(cache: Cache, block_size: int) -> Tensor:
    """(B, S): the slots of each decode token's block table, one block after another, in the flattened KV blocks."""
    return (cache.table_BM.long()[..., None] * block_size + torch.arange(block_size).to(cache.table_BM)).flatten(1)


def gather(kv_PSX: Tensor, slots_BS: Tensor, selected_BS: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The selected slots of each decode token, in order, as KV blocks of its own: blocks (B, K, X), a block table
    (B, 1) and lengths (B)."""
    # Selected ones first; a stable sort keeps the order of positions.
    first_BK = (~selected_BS).byte().argsort(dim=1, stable=True)[:, : min(topk, slots_BS.shape[1])]
    kv_BKX = kv_PSX.flatten(0, 1)[slots_BS.gather(1, first_BK)]
    table_B1 = torch.arange(len(kv_BKX), dtype=torch.int32, device=kv_PSX.device)[:, None]
    return kv_BKX, table_B1, selected_BS.sum(1, dtype=torch.int32)
