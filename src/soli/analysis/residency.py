"""Where a layer's experts were when its tokens needed them, for a model that reads experts from disk, and what waiting
for them cost.

Shapes: T tokens, M layers with a router, E experts, K selected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, Self, get_args

import torch
from torch import Tensor

Tier = Literal["disk", "reading", "memory"]  # "reading": ahead, but not yet in memory
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)  # as the first of soli.kernels.cpu.EXPERT_STATES
IN_MEMORY: Final = TIERS.index("memory")


@dataclass(frozen=True)
class Residency:
    """Of one layer's decision about T tokens. What a forward pass waited and read, all of its tokens share."""

    tiers_TK: Tensor  # uint8: of each selected expert, an index into TIERS
    waited_T: Tensor  # float32 milliseconds that the layer waited for experts in the token's forward pass
    bytes_T: Tensor  # int64, of the experts of that pass that were not in memory, each once
    pass_tokens_T: Tensor  # int64, tokens of that pass

    def of_tokens(self, start: int, stop: int) -> "Residency":
        """Of tokens start ... stop - 1, as a copy."""
        return Residency(*(tensor[start:stop].clone() for tensor in vars(self).values()))


def join_residency(parts: Sequence[Residency]) -> Residency:
    """One layer's over consecutive tokens."""
    if len(parts) == 1:
        return parts[0]
    return Residency(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class PassResidency:
    """Of all layers in one forward pass over `tokens` tokens, as it is recorded while they are computed."""

    tokens: int
    states_ME: Tensor  # uint8: of each expert that was chosen, its tier
    waited_M: Tensor  # int64 nanoseconds
    expert_bytes_ME: Tensor  # int64, that are read for each expert

    @classmethod
    def empty(cls, tokens: int, expert_bytes_ME: Tensor) -> Self:
        """Nothing has been chosen."""
        states_ME = torch.zeros(expert_bytes_ME.shape, dtype=torch.uint8)
        return cls(tokens, states_ME, torch.zeros(len(expert_bytes_ME), dtype=torch.int64), expert_bytes_ME)

    @property
    def waited_seconds(self) -> float:
        """Of all layers."""
        return 1e-9 * int(self.waited_M.sum())

    def of_layer(self, layer: int, expert_ids_TK: Tensor) -> Residency:
        """Layer number `layer` of those with a router, whose tokens chose `expert_ids_TK`."""
        states_E = self.states_ME[layer]
        chosen = expert_ids_TK.unique()
        absent = chosen[states_E[chosen] != IN_MEMORY]
        waited = 1e-6 * int(self.waited_M[layer])
        return Residency(
            tiers_TK=states_E[expert_ids_TK],
            waited_T=torch.full((self.tokens,), waited),
            bytes_T=self.expert_bytes_ME[layer, absent].sum().expand(self.tokens),
            pass_tokens_T=torch.full((self.tokens,), self.tokens),
        )


class ResidencyRecorder(Protocol):
    """Records from when it is made, before a layer's experts are computed, to `finish`."""

    def finish(self) -> Residency:
        """Of the layer's tokens."""
