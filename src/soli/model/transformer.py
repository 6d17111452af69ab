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

from soli.config import ModelConfig
from soli.model.attention import LatentAttention
from soli.model.cache import Cache
from soli.model.indexer import Selection
from soli.model.layers import MLP, Device, Linear, RMSNorm
from soli.model.moe import MoE
from soli.model.rope import Rope, softmax_scale
from soli.model.router import Routing
from soli.model.size import check_size


@dataclass(frozen=True)
class BackboneOutput:
    """Hidden states after the final norm, which the head takes, and what each router decided, in layer order."""

    hidden_BTD: Tensor
    routing: Sequence[Routing]


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x), which is dense in the first layers and a mixture after."""

    def __init__(self, config: ModelConfig, layer: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn = LatentAttention(config, layer, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp: MoE | MLP
        self.post_mlp_layernorm: RMSNorm | None = None
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, device, dtype)
            if config.family.norms_mixture:
                self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, device, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        cos_sin: tuple[Tensor, ...],
        cache: Cache | None = None,
        masked_TE: Tensor | None = None,
        selection: Selection | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """`masked_TE`: bool, the experts that must not be selected. `selection`: that of sparse attention, which layers
        share."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_sin, cache, selection)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(normed_BTD, masked_TE)
            if self.post_mlp_layernorm is not None:
                y_BTD = self.post_mlp_layernorm(y_BTD)
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

    block: Block

    def forward(
        self,
        embedding_BTD: Tensor,
        hidden_BTD: Tensor,
        cos_sin: tuple[Tensor, ...],
        cache: Cache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        # A selection of its own, as the main layers are given one: compiled blocks are the same for both.
        x_BTD, routing = self.block(self.join(embedding_BTD, hidden_BTD), cos_sin, cache, None, Selection())
        return self.norm(x_BTD), routing

    def join(self, embedding_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """The block's input (B, T, D)."""
        # differs: equation 21 prints [hidden; embedding]; the released weights want [embedding; hidden].
        return self.eh_proj(torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1))


class Transformer(nn.Module):
    """A whole model of one ``ModelConfig``; parameters are unset until ``init_weights`` or a checkpoint fills them.

    ``compute_dtype`` is the dtype of activations; None means that of the parameters. Training sets it to bfloat16 over
    float32 masters.
    """

    def __init__(self, config: ModelConfig, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_size(config, torch.device(device or torch.get_default_device()), dtype or torch.get_default_dtype())
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
            self.init_parameter(name, parameter, generator)
        for _, moe in self.moe_layers():
            if moe.gate.e_score_correction_bias is not None:
                moe.gate.e_score_correction_bias.zero_()

    @torch.no_grad()
    def init_parameter(self, name: str, values: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill `values` as `init_weights` fills the parameter `name`, of which it may be a copy elsewhere."""
        if values.dim() >= 2:
            values.normal_(0.0, self.config.initializer_range, generator=generator)
        else:
            values.fill_(0.0 if name.endswith(".bias") else 1.0)

    def reposition(self, config: ModelConfig) -> None:
        """Take the context length and YaRN of `config`, which differs in these alone: rope and softmax scales."""
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

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) to rows of the embedding (..., D), in the dtype of activations."""
        return self.embed_tokens(ids).to(self.compute_dtype or self.embed_tokens.weight.dtype)

    def backbone(
        self,
        input_ids_BT: Tensor,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        masked_experts: Mapping[int, Tensor] | None = None,
    ) -> BackboneOutput:
        """Run the main layers. `positions_BT`: of each token in its text, 0..T-1 by default; a cache needs them.
        `masked_experts`: for layers by number, bool (B*T, E), the experts that must not be selected for a token."""
        x_BTD = self.embed(input_ids_BT)
        cos_sin = self.rope(_positions(input_ids_BT) if positions_BT is None else positions_BT)
        masks = masked_experts or {}
        selection = Selection()
        routing = []
        for layer, block in enumerate(self.layers):
            x_BTD, decision = block(x_BTD, cos_sin, cache, masks.get(layer), selection)
            if decision is not None:
                routing.append(decision)
        return BackboneOutput(self.norm(x_BTD), tuple(routing))

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
        cos_sin = self.rope(_positions(next_ids_BT) if positions_BT is None else positions_BT)
        output_BTD, decision = self.mtp[depth](self.embed(next_ids_BT), hidden_BTD, cos_sin, cache)
        return BackboneOutput(output_BTD, () if decision is None else (decision,))

    def moe_layers(self) -> Iterator[tuple[str, MoE]]:
        """Every mixture layer with its name, ``layers.3`` or ``mtp.0``, in the order of their routings."""
        blocks: list[tuple[str, nn.Module]] = [(f"layers.{i}", block) for i, block in enumerate(self.layers)]
        blocks += [(f"mtp.{k}", module.get_submodule("block")) for k, module in enumerate(self.mtp)]
        for name, block in blocks:
            mixture = find_mixture(block)
            if mixture is not None:
                yield name, mixture



def find_mixture(block: nn.Module) -> MoE | None:
    """The mixture layer of a block, which may be wrapped; None in a dense block."""
    return next((module for module in block.modules() if isinstance(module, MoE)), None)


def _positions(ids_BT: Tensor) -> Tensor:
    """0 ... T-1 in every row."""
    return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
