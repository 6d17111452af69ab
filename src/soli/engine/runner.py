"""What computes a step: one fused C++ call where the model allows it, else the model itself, module by module.

Both runners give the same interface and, but for rounding, the same numbers. A model that someone has hooked, patched,
subclassed or sharded is computed by the eager runner, because C++ would pass the change by. `ModelRunner` chooses when
the engine is created, logs the choice, and compares the model with its recorded state before new requests run.

Shapes: T new tokens of a step, N of them with logits, D hidden, V vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from soli.engine.layer_table import FusedLayers, LayerTableBuilder, Unsupported, attention_metadata
from soli.engine.model_state import Change, ModelState, modification
from soli.errors import SoliError
from soli.kernels.cpu import fused
from soli.model.cache import Cache
from soli.model.router import Routing, Routings
from soli.model.transformer import BackboneOutput, MTPModule, Transformer

log = logging.getLogger("soli.engine")

RunnerName = Literal["auto", "eager", "fused"]
RUNNERS: Final[tuple[RunnerName, ...]] = ("auto", "eager", "fused")


@dataclass(frozen=True)
class ForwardOutput:
    """One forward pass over new tokens: float32 logits (N, V), rounded to the dtype of the hidden states; normed hidden
    states (T, D); what each router decided, in layer order."""

    logits_NV: Tensor
    hidden_TD: Tensor
    routing: Sequence[Routing]


class Runner(Protocol):
    """Computes new tokens of some texts, one text after the other, under `torch.inference_mode`."""

    name: RunnerName

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        cache: Cache,
        logit_indices: Sequence[int],
        masked_experts: Mapping[int, Tensor] | None = None,
    ) -> ForwardOutput:
        """`cache` describes this step's tokens. `logit_indices`: the tokens whose next-token logits are wanted.
        `masked_experts`: for layers by number, bool (T, E), the experts that must not be selected."""

    def draft(self, hidden_TD: Tensor, next_ids_T: Tensor, positions_T: Tensor, cache: Cache) -> BackboneOutput:
        """The first MTP module: normed hidden states (1, T, D) whose head predicts the tokens after `next_ids_T`."""


class EagerRunner:
    """Calls the modules one after another, with whatever hooks and changes they have."""

    name: RunnerName = "eager"

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        cache: Cache,
        logit_indices: Sequence[int],
        masked_experts: Mapping[int, Tensor] | None = None,
    ) -> ForwardOutput:
        output = self._model.backbone(ids_T[None], positions_T[None], cache, masked_experts)
        hidden_TD = output.hidden_BTD[0]
        return ForwardOutput(_logits(self._model, hidden_TD, logit_indices), hidden_TD, output.routing)

    def draft(self, hidden_TD: Tensor, next_ids_T: Tensor, positions_T: Tensor, cache: Cache) -> BackboneOutput:
        return self._model.mtp_step(0, hidden_TD[None], next_ids_T[None], positions_T[None], cache)


class FusedRunner:
    """All layers in one C++ call, with embedding and head where C++ is the faster one for them.

    Unsupported, with module and reason, for a model that C++ cannot compute. `drafts`: the first MTP module as well.
    """

    name: RunnerName = "fused"

    def __init__(self, model: Transformer, drafts: bool = False) -> None:
        builder = LayerTableBuilder(model)
        self._model, self._dtype, self._cpu = model, builder.dtype, builder.cpu_backend
        self._layers = FusedLayers(builder, [*model.layers], model.norm)
        self._embedding_and_head = builder.embedding_and_head()
        self._builder = builder  # its references keep the tables' memory alive
        self._mtp: tuple[MTPModule, FusedLayers] | None = None
        if drafts:
            module = model.mtp[0]
            assert isinstance(module, MTPModule)
            self._mtp = module, FusedLayers(builder, [module.block], module.norm)

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        cache: Cache,
        logit_indices: Sequence[int],
        masked_experts: Mapping[int, Tensor] | None = None,
    ) -> ForwardOutput:
        ends, layers = self._embedding_and_head, self._layers
        if (
            ends is not None
            and len(ids_T) <= layers.max_tokens
            and self._cpu.is_faster(self._dtype, len(logit_indices), ends.quantized)
        ):
            metadata, kv_blocks = attention_metadata(positions_T, cache), layers.kv_blocks(cache)
            masks, index_keys = layers.masks(masked_experts), layers.index_keys(cache)
            logits_NV, hidden_TD, routing_tensors = fused.forward_ids(
                layers.table, ends, ids_T, logit_indices, metadata, kv_blocks, masks, index_keys
            )
            return ForwardOutput(logits_NV, hidden_TD, Routings(*routing_tensors))
        # The layers in C++, embedding and head in torch.
        hidden_TD, routing = layers.forward(self._model.embed(ids_T), positions_T, cache, masked_experts)
        return ForwardOutput(_logits(self._model, hidden_TD, logit_indices), hidden_TD, routing)

    def draft(self, hidden_TD: Tensor, next_ids_T: Tensor, positions_T: Tensor, cache: Cache) -> BackboneOutput:
        assert self._mtp is not None
        module, layers = self._mtp
        x_TD = module.join(self._model.embed(next_ids_T), hidden_TD)
        output_TD, routing = layers.forward(x_TD, positions_T, cache)
        return BackboneOutput(output_TD[None], routing)


class ModelRunner:
    """The runner of `model`, chosen now and again whenever the model is not what it was.

    `preference`: "auto" takes the fused runner if it can be had; "fused" makes it a SoliError if not. `drafts`: whether
    the first MTP module will be run. A model whose parts several `ranks` hold runs eagerly, and may not change.
    """

    def __init__(
        self, model: Transformer, preference: RunnerName = "auto", drafts: bool = False, ranks: int = 1
    ) -> None:
        if preference not in RUNNERS:
            raise SoliError(f"runner is {preference!r}: choose auto, eager or fused")
        self._model, self._preference, self._drafts, self._ranks = model, preference, drafts, ranks
        self._place = _place(model)
        self.active, self._state = self._choose()

    def update(self) -> bool:
        """Compare the model with its recorded state and follow a change; whether latents computed before are stale.

        SoliError, now and at every later call, when a change leaves no runner.
        """
        change = self._state.change()
        if change is not Change.NONE and self._ranks > 1:
            raise SoliError(f"the model was changed on one of the {self._ranks} ranks that share it: load it again")
        if change is Change.STRUCTURE:
            place = _place(self._model)
            if place != self._place:
                raise SoliError(f"the model was on {self._place} and is on {place}: make a new engine for it")
            self.active, self._state = self._choose()
        elif change is Change.VALUES:
            self._state.accept_values()
        return change is not Change.NONE

    def _choose(self) -> tuple[Runner, ModelState]:
        state, modified = ModelState(self._model), modification(self._model)
        if self._ranks > 1:
            modified = f"{self._ranks} ranks share it"
        reason = "runner is 'eager'" if self._preference == "eager" else modified
        if reason is None:
            try:
                fused_runner = FusedRunner(self._model, self._drafts)
                log.info("the fused runner computes this model, in C++: its modules are unmodified")
                return fused_runner, state
            except Unsupported as error:
                reason = str(error)
        if self._preference == "fused":
            raise SoliError(f"the fused runner cannot be had: {reason}; choose runner='auto' or 'eager'")
        level = logging.WARNING if modified and self._preference == "auto" and self._ranks == 1 else logging.INFO
        log.log(level, "the eager runner computes this model, module by module: %s", reason)
        return EagerRunner(self._model), state


def _place(model: Transformer) -> str:
    """Device and dtype of hidden states, which the latents have too."""
    weight = model.embed_tokens.weight
    return f"{weight.device} in {model.compute_dtype or weight.dtype}"


def _logits(model: Transformer, hidden_TD: Tensor, logit_indices: Sequence[int]) -> Tensor:
    indices = torch.tensor(logit_indices, dtype=torch.int64, device=hidden_TD.device)
    return model.head(hidden_TD[indices]).float()
