"""Multi-head latent attention (paper section 2.1.1, equations 1-11).

Shapes: B batch, T queries, S cache slots, D hidden, H heads, C latent, N nope width, R rotary width, V value width.

What is cached per token is one latent of C values and one rotated key of R values, shared by all heads. Two forms give
the same output: *expanded* computes keys (N+R values) and values (V) for every head, best with many queries; *absorbed*
folds the up-projections into query and output and attends to the latents themselves, best when one query attends to a
long cache.
"""

from collections.abc import Iterator
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soli import kernels
from soli.config import ModelConfig
from soli.kernels.torch_backend import needs_float32
from soli.model.cache import Cache, PrefillChunk
from soli.model.indexer import Indexer, Selection, decode_slots, gather
from soli.model.layers import Device, Linear, RMSNorm, is_plain
from soli.model.rope import rotate, softmax_scale

# Up to so many queries a CPU computes the whole matrix of scores about twice as fast as torch's fused kernel.
MAX_EXPLICIT_QUERIES = 512
MAX_FUSED_HEAD = 256  # values per head that a GPU's fused kernels take
LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps is, as in the released code


def attend(q_BHTX: Tensor, k_BHSX: Tensor, v_BHSV: Tensor, mask_B1TS: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, (B, H, T, V). Where `mask` is true a query attends; without it, causal with T = S. Softmax in
    float32.

    Keys are wider than values (192 against 128 in V3): torch picks a fused backend that takes it.
    """
    T, width = q_BHTX.shape[2:]
    if needs_float32(q_BHTX):
        return attend(q_BHTX.float(), k_BHSX.float(), v_BHSV.float(), mask_B1TS, scale).to(q_BHTX.dtype)
    if (q_BHTX.is_cuda and width <= MAX_FUSED_HEAD) or T > MAX_EXPLICIT_QUERIES:
        return F.scaled_dot_product_attention(
            q_BHTX, k_BHSX, v_BHSV, attn_mask=mask_B1TS, is_causal=mask_B1TS is None, scale=scale
        )
    if mask_B1TS is None:
        mask_B1TS = torch.ones(T, T, dtype=torch.bool, device=q_BHTX.device).tril()
    bias_B1TS = torch.zeros_like(mask_B1TS, dtype=q_BHTX.dtype).masked_fill_(~mask_B1TS, float("-inf"))
    scores_BHTS = (q_BHTX * scale) @ k_BHSX.transpose(2, 3) + bias_B1TS
    # torch's softmax is float32 inside: bfloat16 gets the bits of casting there and back, for a third of the time.
    return scores_BHTS.softmax(dim=-1) @ v_BHSV


class LatentAttention(nn.Module):
    """``layer`` is the cache's index: 0..L-1 for the main layers, L+k for MTP module k."""

    def __init__(self, config: ModelConfig, layer: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer = layer
        self.backend: kernels.Backend = kernels.default_backend()
        self.H, self.C = config.num_attention_heads, config.kv_lora_rank
        self.N, self.R, self.V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = softmax_scale(config)
        self.interleaved = config.rope_interleave
        D, bias, at = config.hidden_size, config.attention_bias, (device, dtype)

        def norm(width: int) -> RMSNorm:
            return RMSNorm(width, LATENT_EPS, device, dtype)

        self.q_lora = config.q_lora_rank is not None
        if config.q_lora_rank is not None:
            self.q_a_proj = Linear(D, config.q_lora_rank, *at, bias=bias)
            self.q_a_layernorm = norm(config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, self.H * (self.N + self.R), *at)
        else:
            self.q_proj = Linear(D, self.H * (self.N + self.R), *at)
        self.kv_a_proj_with_mqa = Linear(D, self.C + self.R, *at, bias=bias)
        self.kv_a_layernorm = norm(self.C)
        self.kv_b_proj = Linear(self.C, self.H * (self.N + self.V), *at)
        self.o_proj = Linear(self.H * self.V, D, *at, bias=bias)
        self.topk = config.index_topk
        self.indexer = Indexer(config, layer, device, dtype) if config.has_indexer(layer) else None

    def forward(
        self,
        x_BTD: Tensor,
        cos_sin: tuple[Tensor, ...],
        cache: Cache | None = None,
        selection: Selection | None = None,
    ) -> Tensor:
        """Attend causally: over the T tokens given, or with a cache over every earlier token of each text. In sparse
        attention to what `selection` has of them, which a layer with an indexer replaces."""
        q_latent_BTQ = self.q_a_layernorm(self.q_a_proj(x_BTD)) if self.q_lora else None
        q_nope_BTHN, q_rope_BTHR = self._queries(x_BTD if q_latent_BTQ is None else q_latent_BTQ, cos_sin)
        latent_BTC, rope_BTR = self._latents(x_BTD, cos_sin)
        selection = selection or Selection()
        if self.indexer is not None:
            selection.replace(self.indexer(x_BTD, q_latent_BTQ, cos_sin, cache))
        if cache is None:
            heads_BTHV = self._expanded(q_nope_BTHN, q_rope_BTHR, latent_BTC, rope_BTR, selection.text_BTS)
        else:
            kv_PSX = cache.write(self.layer, torch.cat((latent_BTC, rope_BTR), dim=-1).flatten(0, 1))
            queries = q_nope_BTHN.flatten(0, 1), q_rope_BTHR.flatten(0, 1)
            heads_BTHV = self._cached(*queries, kv_PSX, cache, selection).unflatten(0, x_BTD.shape[:2])
        return self.o_proj(heads_BTHV.flatten(2))

    def _cached(
        self, q_nope_THN: Tensor, q_rope_THR: Tensor, kv_PSX: Tensor, cache: Cache, selection: Selection
    ) -> Tensor:
        """Absorbed attention of decode tokens, expanded attention of chunks: (T, H, V)."""
        parts, n = [], cache.num_decode_tokens
        chunks = [*zip_longest(cache.chunks, selection.chunks)]
        if n and is_plain(self.kv_b_proj):
            parts.append(self._absorbed(q_nope_THN[:n], q_rope_THR[:n], kv_PSX, cache, selection.decode_BS))
        elif n:  # the absorbed form has the weight alone, which is not all that this module computes
            chunks = [*_decode_chunks(cache, kv_PSX.shape[1], selection.decode_BS), *chunks]
        for chunk, mask_TS in chunks:
            tokens = slice(chunk.start, chunk.stop)
            latent_1SC, rope_1SR = kv_PSX.flatten(0, 1)[chunk.slots_S][None].split((self.C, self.R), dim=-1)
            if mask_TS is None and chunk.first > 0:
                mask_TS = _causal_mask(chunk)
            mask_1TS = None if mask_TS is None else mask_TS[None]
            q_nope_1THN, q_rope_1THR = q_nope_THN[None, tokens], q_rope_THR[None, tokens]
            parts.append(self._expanded(q_nope_1THN, q_rope_1THR, latent_1SC, rope_1SR, mask_1TS)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _queries(self, x_BTQ: Tensor, cos_sin: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """From the query latent where there is one, else from the layer's input."""
        q = self.q_b_proj(x_BTQ) if self.q_lora else self.q_proj(x_BTQ)
        q_nope_BTHN, q_rope_BTHR = q.unflatten(-1, (self.H, -1)).split((self.N, self.R), dim=-1)
        q_rope_BTHR = rotate(q_rope_BTHR, cos_sin, self.interleaved)
        for scale_BT11 in cos_sin[2:]:  # llama_4_scaling
            q_nope_BTHN, q_rope_BTHR = (part * scale_BT11.to(part.dtype) for part in (q_nope_BTHN, q_rope_BTHR))
        return q_nope_BTHN, q_rope_BTHR

    def _latents(self, x_BTD: Tensor, cos_sin: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        latent_BTC, rope_BTR = self.kv_a_proj_with_mqa(x_BTD).split((self.C, self.R), dim=-1)
        rope_BTR = rotate(rope_BTR[:, :, None], cos_sin, self.interleaved)[:, :, 0]
        return self.kv_a_layernorm(latent_BTC), rope_BTR

    def _expanded(
        self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, latent_BSC: Tensor, rope_BSR: Tensor, mask_BTS: Tensor | None
    ) -> Tensor:
        kv_BSHX = self.kv_b_proj(latent_BSC).unflatten(-1, (self.H, -1))
        k_nope_BSHN, v_BSHV = kv_BSHX.split((self.N, self.V), dim=-1)
        rope_BSHR = rope_BSR[:, :, None].expand(-1, -1, self.H, -1)
        q = torch.cat((q_nope_BTHN, q_rope_BTHR), dim=-1).transpose(1, 2)
        k = torch.cat((k_nope_BSHN, rope_BSHR), dim=-1).transpose(1, 2)
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return attend(q, k, v_BSHV.transpose(1, 2), mask, self.scale).transpose(1, 2)

    def _absorbed(
        self, q_nope_THN: Tensor, q_rope_THR: Tensor, kv_PSX: Tensor, cache: Cache, selected_BS: Tensor | None
    ) -> Tensor:
        up_HXC = self.kv_b_proj.dense(q_nope_THN.dtype).unflatten(0, (self.H, -1))
        up_k_HNC, up_v_HVC = up_HXC.split((self.N, self.V), dim=1)
        q_THC = torch.einsum("thn,hnc->thc", q_nope_THN, up_k_HNC)
        q_THX = torch.cat((q_THC, q_rope_THR), dim=-1)
        kv_blocks = kv_PSX, cache.table_BM, cache.lengths_B
        if selected_BS is not None and self.topk is not None:
            kv_blocks = gather(kv_PSX, decode_slots(cache, kv_PSX.shape[1]), selected_BS, self.topk)
        mixed_THC = self.backend.latent_decode(q_THX, *kv_blocks, latent=self.C, scale=self.scale)
        return torch.einsum("thc,hvc->thv", mixed_THC, up_v_HVC)


def _decode_chunks(
    cache: Cache, block_size: int, selected_BS: Tensor | None
) -> Iterator[tuple[PrefillChunk, Tensor | None]]:
    """Each decode token as a chunk of its own, with its mask."""
    slots_BS = decode_slots(cache, block_size)
    for token, length in enumerate(cache.lengths_B.tolist()):
        mask_1S = None if selected_BS is None else selected_BS[token, None, :length]
        yield PrefillChunk(token, token + 1, length - 1, slots_BS[token, :length]), mask_1S


def _causal_mask(chunk: PrefillChunk) -> Tensor:
    """Which slots each of the chunk's queries attends to: (T, S)."""
    slots_S = torch.arange(len(chunk.slots_S), device=chunk.slots_S.device)
    return slots_S <= slots_S[chunk.first :, None]
