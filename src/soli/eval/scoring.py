"""Reading texts with the model without writing any: which experts play, how surprised it is, how often MTP agrees.

One forward pass per batch gives all three: choices per expert and text; bits, -log2 p of each true next token; and
how often the MTP module, having seen token t+1, guesses the token that the main model itself would say next. The
share of the latter is the acceptance rate of greedy speculation at depth 1 along the given text (section 5.4.3).

Shapes: B texts, T tokens, L MoE layers, E experts, V vocab.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soli.errors import SoliError
from soli.model.router import Routing
from soli.model.transformer import BackboneOutput, Transformer

TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Reading:
    """What reading one sequence showed. `number` is its place among the sequences given."""

    number: int
    tokens: int  # how many were counted: all but the leading ones that were to be skipped
    counts_LE: NDArray[np.int64]  # choices of each expert of the main model's MoE layers
    bits: float  # -log2 of the probability of the counted tokens; 0 when not scored
    mtp_tried: int
    mtp_agreed: int


@torch.inference_mode()
def read_sequences(
    model: Transformer, sequences: Sequence[Sequence[int]], *, skip: int, score: bool = True
) -> Iterator[Reading]:
    """Reads each sequence once, short ones first; yields a Reading for each, in that order.

    The first `skip` (at least 1) tokens of each are context: read, but neither counted nor scored. `score` False leaves
    out the head, and with it bits and MTP. Refuses a sequence longer than the model's positions.
    """
    longest, positions = max(map(len, sequences), default=0), model.config.max_position_embeddings
    if longest > positions:
        raise SoliError(f"a text of {longest} tokens does not fit the model's {positions} positions: read it in parts")
    device = model.embed_tokens.weight.device
    for batch in _batches(sequences):
        ids_BT, lengths_B = right_padded([sequences[number] for number in batch], device)
        at_T = torch.arange(ids_BT.shape[1], device=device)
        counted_BT = (at_T >= skip) & (at_T < lengths_B[:, None])
        backbone = model.backbone(ids_BT)
        counts_BLE = choices(backbone.routing, counted_BT).cpu().numpy()
        bits_B, tried_B, agreed_B = _scores(model, backbone, ids_BT, counted_BT) if score else ([0] * len(batch),) * 3
        rows = zip(batch, counted_BT.sum(dim=1).tolist(), counts_BLE, bits_B, tried_B, agreed_B, strict=True)
        yield from (Reading(*row) for row in rows)


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B,T), zeros after each row's end, and the lengths (B). Causality hides the zeros from the tokens."""
    lengths = [len(sequence) for sequence in sequences]
    ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return ids_BT.to(device), torch.tensor(lengths, device=device)


def choices(layers: Sequence[Routing], counted_BT: Tensor) -> Tensor:
    """How often each expert was chosen for the counted tokens of each text: int64 (B,L,E)."""
    rows, width = counted_BT.shape
    row_T = torch.arange(rows, device=counted_BT.device).repeat_interleave(width)[counted_BT.flatten()]
    counts = []
    for routing in layers:
        experts = routing.num_experts
        places_TK = row_T[:, None] * experts + routing.expert_ids_TK[counted_BT.flatten()]
        counts.append(torch.bincount(places_TK.flatten(), minlength=rows * experts).view(rows, experts))
    return torch.stack(counts, dim=1) if counts else torch.zeros(rows, 0, 0, dtype=torch.int64)


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Sequence numbers, shortest first, in batches of at most TOKENS_AT_ONCE padded tokens (or one sequence)."""
    batch: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda number: len(sequences[number])):
        if batch and (len(batch) + 1) * len(sequences[number]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _scores(
    model: Transformer, backbone: BackboneOutput, ids_BT: Tensor, counted_BT: Tensor
) -> tuple[list[float], list[int], list[int]]:
    """Bits, MTP guesses made, and guesses that agree with the main model, per text."""
    logits_BTV = model.head(backbone.hidden_BTD).float()
    nats_BT = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
    ).view(ids_BT.shape[0], -1)
    bits_B = (nats_BT.double() * counted_BT[:, 1:]).sum(dim=1) / np.log(2)
    tried_BT = torch.zeros_like(counted_BT[:, 1:])
    agreed_BT = tried_BT
    if len(model.mtp):
        guess_BT = model.head(model.mtp_step(0, backbone.hidden_BTD[:, :-1], ids_BT[:, 1:]).hidden_BTD).argmax(dim=-1)
        # At the last token there is no guess worth having: nothing follows it.
        tried_BT = counted_BT[:, 1:] & torch.nn.functional.pad(counted_BT[:, 2:], (0, 1))
        agreed_BT = tried_BT & (guess_BT == logits_BTV[:, 1:].argmax(dim=-1))
    return bits_B.tolist(), tried_BT.sum(dim=1).tolist(), agreed_BT.sum(dim=1).tolist()
