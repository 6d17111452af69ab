"""The DeepSeek-V3 transformer: embedding, blocks, norm, head, and multi-token prediction (paper section 2).

Shapes: B batch, T tokens, D hidden, V vocabulary.

``forward`` gives logits. ``backbone`` gives the hidden state after the final norm together with every router's
decision, so that losses, traces and the engine all read one forward pass. MTP modules share embedding and head with the
main model and are numbered after its layers, as in the released files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soli.config import ModelConfig
from soli.model import one_call
from soli.model.attention import Cache, LatentAttention
from soli.model.layers import MLP, Device, Linear, RMSNorm
from soli.model.moe import MoE
from soli.model.rope import Rope, softmax_scale
from soli.model.router import Routing


@dataclass(frozen=True)
class Read:
    """One pass over a cache: logits (N, V) of the tokens that were asked for, float32; T tokens' normed hidden states,
    and what each router decided, in layer order."""

    logits_NV: Tensor
    hidden_TD: Tensor
    routing: Sequence[Routing]


@dataclass(frozen=True)
class BackboneOutput:
    """One pass: what the head reads, and what each router decided, in layer order."""

    hidden_BTD: Tensor  # after the final norm
    routing: Sequence[Routing]


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x), which is dense in the first layers and a mixture after."""

    def __init__(self, config: ModelConfig, layer: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn = LatentAttention(config, layer, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp: MoE | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, device, dtype)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, device, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        cache: Cache | None,
        masked_TE: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_sin, positions_BT, cache)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(normed_BTD, masked_TE)
            return x_BTD + y_BTD, routing
        return x_BTD + self.mlp(normed_BTD), None


class MTPModule(nn.Module):
    """Predicts one token further (equations 21-23) from a hidden state and the embedding of the token after it."""

    def __init__(self, config: ModelConfig, layer: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(D, eps, device, dtype)
        self.hnorm = RMSNorm(D, eps, device, dtype)
        self.eh_proj = Linear(2 * D, D, device, dtype)
        self.block = Block(config, layer, device, dtype)
        self.norm = RMSNorm(D, eps, device, dtype)  # shared_head.norm in the files

    def forward(
        self, embedding_BTD: Tensor, hidden_BTD: Tensor, cos_sin: tuple[Tensor, Tensor], at: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Routing | None]:
        x_BTD, routing = self.block(self.join(embedding_BTD, hidden_BTD), cos_sin, at, cache)
        return self.norm(x_BTD), routing

    def join(self, embedding_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """What the block reads."""
        # differs: equation 21 prints [hidden; embedding]; the released weights want [embedding; hidden].
        return self.eh_proj(torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1))


class Transformer(nn.Module):
    """A whole model of one ``ModelConfig``; parameters are unset until ``init_weights`` or a checkpoint fills them.

    ``compute_dtype`` is the dtype of activations; None means that of the parameters. Training sets it to bfloat16 over
    float32 masters.
    """

    def __init__(self, config: ModelConfig, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        L, D, V = config.num_hidden_layers, config.hidden_size, config.vocab_size
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.rope = Rope(config)
        self.embed_tokens = nn.Embedding(V, D, _weight=torch.empty(V, D, device=device, dtype=dtype))
        self.layers = nn.ModuleList(Block(config, i, device, dtype) for i in range(L))
        self.norm = RMSNorm(D, config.rms_norm_eps, device, dtype)
        self.lm_head = Linear(D, V, device, dtype)
        self.mtp = nn.ModuleList(
            MTPModule(config, L + k, device, dtype) for k in range(config.num_nextn_predict_layers)
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Matrices normal(0, initializer_range), norms one, biases zero (section 4.2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        for _, moe in self.moe_layers():
            if moe.gate.e_score_correction_bias is not None:
                moe.gate.e_score_correction_bias.zero_()

    def reposition(self, config: ModelConfig) -> None:
        """Turn to the context and YaRN of `config`, which differs in these alone: rope and softmax scales."""
        self.config, self.rope = config, Rope(config)
        for module in self.modules():
            if isinstance(module, LatentAttention):
                module.scale = softmax_scale(config)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Token ids (B, T) to next-token logits (B, T, V)."""
        return self.head(self.backbone(input_ids_BT).hidden_BTD)

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """Normed hidden states (..., D) to logits (..., V), in the dtype of the hidden state."""
        return self.lm_head(hidden_BTD)

    def backbone(
        self,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        masked_experts: Mapping[int, Tensor] | None = None,
    ) -> BackboneOutput:
        """Run the main layers. With a cache, positions say where in its text each token stands; without, they are
        0..T-1. `masked_experts`: for layers by number, bool (B*T, E), which experts must not play for which tokens."""
        at_BT, x_BTD = _places(input_ids_BT, positions_BT), self._embed(input_ids_BT)
        plan = self._plan(x_BTD, at_BT, cache, masked_experts)
        if plan is not None:
            return BackboneOutput(*plan.run(x_BTD))
        cos_sin, routing = self.rope(at_BT), []
        for layer, block in enumerate(self.layers):
            x_BTD, decision = block(x_BTD, cos_sin, at_BT, cache, masked_experts.get(layer) if masked_experts else None)
            if decision is not None:
                routing.append(decision)
        return BackboneOutput(self.norm(x_BTD), tuple(routing))

    def read(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        cache: Cache,
        ends: Sequence[int],
        masked_experts: Mapping[int, Tensor] | None = None,
    ) -> Read:
        """``backbone`` over the new tokens of some texts, one text after the other, and the logits after the tokens
        `ends`: rounded to the dtype of the hidden states, as ``head`` gives them."""
        weight = self.embed_tokens.weight.detach()
        if self.compute_dtype in (None, weight.dtype):
            plan = self._plan(weight, positions_T, cache, masked_experts)
            found = plan.read(ids_T, ends) if plan is not None else None
            if found is not None:
                return Read(*found)
        backbone = self.backbone(ids_T[None], positions_T[None], cache, masked_experts)
        hidden_TD = backbone.hidden_BTD[0]
        logits_NV = self.head(hidden_TD[torch.tensor(ends, dtype=torch.int64, device=hidden_TD.device)])
        return Read(logits_NV.float(), hidden_TD, backbone.routing)

    def mtp_step(
        self,
        depth: int,
        hidden_BTD: Tensor,
        next_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> BackboneOutput:
        """Run MTP module ``depth`` (0 first): from the normed hidden state at i and token i+1+depth to a hidden state
        whose head predicts token i+2+depth. Deeper modules take the normed output of the one before."""
        at_BT, x_BTD, module = _places(next_ids_BT, positions_BT), self._embed(next_ids_BT), self.mtp[depth]
        assert isinstance(module, MTPModule)
        plan = one_call.plan((module.block,), module.norm, self.rope, x_BTD, at_BT, cache)
        if plan is not None:
            return BackboneOutput(*plan.run(module.join(x_BTD, hidden_BTD)))
        hidden, decision = module(x_BTD, hidden_BTD, self.rope(at_BT), at_BT, cache)
        return BackboneOutput(hidden, () if decision is None else (decision,))

    def moe_layers(self) -> Iterator[tuple[str, MoE]]:
        """Every mixture layer with its name, ``layers.3`` or ``mtp.0``, in the order of their routings."""
        blocks: list[tuple[str, nn.Module]] = [(f"layers.{i}", block) for i, block in enumerate(self.layers)]
        blocks += [(f"mtp.{k}", module.get_submodule("block")) for k, module in enumerate(self.mtp)]
        for name, block in blocks:
            if isinstance(block.mlp, MoE):
                yield name, block.mlp

    def _plan(
        self, like: Tensor, positions: Tensor, cache: Cache | None, masked_experts: Mapping[int, Tensor] | None
    ) -> one_call.Plan | None:
        ends = self.embed_tokens, self.lm_head
        return one_call.plan(self.layers, self.norm, self.rope, like, positions, cache, masked_experts, ends)

    def _embed(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.embed_tokens.weight).to(self.compute_dtype or self.embed_tokens.weight.dtype)


def _places(ids_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
    """The positions of tokens: 0 ... T-1 where nothing else is said."""
    if positions_BT is not None:
        return positions_BT
    return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
