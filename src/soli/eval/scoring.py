"""Teacher-forced scoring: bits per byte, MTP acceptance and expert load over given texts; nothing is generated.

One forward pass per batch gives all three: selections per expert and text; bits, -log2 p of each true next token; and
how often the MTP module, given the true token t+1, predicts the token t+2 that the main model itself would generate.
The share of the latter is the acceptance rate of greedy speculation at depth 1 along the given text (section 5.4.3).
Bits per byte scores every token of a text and its end, given the text's beginning-of-document tokens, over its UTF-8
bytes.

Shapes: B texts, T tokens, L MoE layers, E experts, V vocab.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from soli.data.text import language_of
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.model.router import Routing
from soli.model.transformer import BackboneOutput, Transformer

TOKENS_PER_BATCH = 2048

Pair = tuple[str, str, str]  # source, zh, en
OnProgress = Callable[[int], None]  # called with how many more texts are scored


@dataclass(frozen=True)
class SequenceScore:
    """The score of one sequence; `number` is its place among those given."""

    number: int
    tokens: int  # scored tokens: all but the leading context
    counts_LE: NDArray[np.int64]  # how often each expert of the main model's MoE layers was selected
    bits: float  # -log2 of the probability of the scored tokens; 0 without `score`
    mtp_predictions: int
    mtp_agreements: int


@dataclass(frozen=True)
class LayerLoad:
    """How the selections of one layer are spread. `share`: of the layer's selections, per expert, 1 in sum.
    `max_violation`: (largest load - mean load) / mean load, as in the paper's ablations (section 4.5.3).
    `dead_experts`: those never selected."""

    layer: str
    share: tuple[float, ...]
    max_violation: float
    dead_experts: tuple[int, ...]


@dataclass(frozen=True)
class TextScores:
    """The scores of several texts. `mtp_acceptance` None: the model has no MTP module."""

    tokens: int
    mtp_acceptance: float | None
    load: list[LayerLoad]
    bits_per_byte: dict[str, float] = field(default_factory=dict)  # by language, and "all"


@torch.inference_mode()
def score_sequences(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    *,
    context: int,
    score: bool = True,
    on_progress: OnProgress = lambda _: None,
) -> Iterator[SequenceScore]:
    """Runs the model once over each sequence, short ones first; yields their scores in that order.

    The first `context` (at least 1) tokens of each are neither counted nor scored. `score` False leaves out the head,
    and with it bits and MTP. Rejects a sequence longer than the model's positions.
    """
    longest, positions = max(map(len, sequences), default=0), model.config.max_position_embeddings
    if longest > positions:
        raise SoliError(f"a text of {longest} tokens does not fit the model's {positions} positions: read it in parts")
    device = model.embed_tokens.weight.device
    for batch in _batches(sequences):
        ids_BT, lengths_B = right_padded([sequences[number] for number in batch], device)
        position_T = torch.arange(ids_BT.shape[1], device=device)
        counted_BT = (position_T >= context) & (position_T < lengths_B[:, None])
        backbone = model.backbone(ids_BT)
        counts_BLE = count_selections(backbone.routing, counted_BT).cpu().numpy()
        zeros_B = [0] * len(batch)
        scores = _scores(model, backbone, ids_BT, counted_BT) if score else (zeros_B, zeros_B, zeros_B)
        for row in zip(batch, counted_BT.sum(dim=1).tolist(), counts_BLE, *scores, strict=True):
            on_progress(1)
            yield SequenceScore(*row)


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B,T), zeros after each row's end, and the lengths (B). Causality hides the zeros from the tokens."""
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return pad_sequence(rows, batch_first=True).to(device), torch.tensor([len(row) for row in rows], device=device)


def count_selections(layers: Sequence[Routing], counted_BT: Tensor) -> Tensor:
    """How often each expert was selected for the counted tokens of each text: int64 (B,L,E)."""
    rows, width = counted_BT.shape
    row_T = torch.arange(rows, device=counted_BT.device).repeat_interleave(width)[counted_BT.flatten()]
    counts = []
    for routing in layers:
        experts = routing.num_experts
        index_TK = row_T[:, None] * experts + routing.expert_ids_TK[counted_BT.flatten()]
        counts.append(torch.bincount(index_TK.flatten(), minlength=rows * experts).view(rows, experts))
    return torch.stack(counts, dim=1) if counts else torch.zeros(rows, 0, 0, dtype=torch.int64)


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Sequence numbers, shortest first, in batches of at most TOKENS_PER_BATCH padded tokens (or one sequence)."""
    batch: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda number: len(sequences[number])):
        if batch and (len(batch) + 1) * len(sequences[number]) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _scores(
    model: Transformer, backbone: BackboneOutput, ids_BT: Tensor, counted_BT: Tensor
) -> tuple[list[float], list[int], list[int]]:
    """Bits, MTP predictions, and predictions that agree with the main model, per text."""
    logits_BTV = model.head(backbone.hidden_BTD).float()
    nats_BT = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
    ).view(ids_BT.shape[0], -1)
    bits_B = (nats_BT.double() * counted_BT[:, 1:]).sum(dim=1) / np.log(2)
    predicted_BT = torch.zeros_like(counted_BT[:, 1:])
    agrees_BT = predicted_BT
    if len(model.mtp):
        step = model.mtp_step(0, backbone.hidden_BTD[:, :-1], ids_BT[:, 1:])
        prediction_BT = model.head(step.hidden_BTD).argmax(dim=-1)
        # Nothing follows the last token, so that there is no prediction to compare.
        predicted_BT = counted_BT[:, 1:] & torch.nn.functional.pad(counted_BT[:, 2:], (0, 1))
        agrees_BT = predicted_BT & (prediction_BT == logits_BTV[:, 1:].argmax(dim=-1))
    return bits_B.tolist(), predicted_BT.sum(dim=1).tolist(), agrees_BT.sum(dim=1).tolist()


def score_pairs(text_model: TextModel, pairs: Sequence[Pair], on_progress: OnProgress = lambda _: None) -> TextScores:
    """Scores every pair as the two documents that it is in training: load and MTP acceptance in distribution."""
    tokenizer = text_model.tokenizer
    documents = []
    for _, zh, en in pairs:
        for text, translation, to in ((en, zh, "zh"), (zh, en, "en")):
            ids = [*tokenizer.translation_prompt(text, to), *tokenizer.encode(translation), *end_ids(text_model)]
            documents.append(ids[: text_model.positions])
    scores = score_sequences(text_model.model, documents, context=2, on_progress=on_progress)
    return _sum_scores(text_model, list(scores))


def score_texts(text_model: TextModel, texts: Sequence[str], on_progress: OnProgress = lambda _: None) -> TextScores:
    """Scores plain texts: bits per byte as well. A text longer than the model's positions is read in parts."""
    parts = [(number, part) for number, text in enumerate(texts) for part in document_parts(text_model, text, end=True)]
    sequences = [part for _, part in parts]
    context = len(text_model.text_prefix) or 1
    scores = list(score_sequences(text_model.model, sequences, context=context, on_progress=on_progress))
    bits = np.zeros(len(texts))
    for score in scores:
        bits[parts[score.number][0]] += score.bits
    return _sum_scores(text_model, scores, _bits_per_byte(texts, bits.tolist()))


def document_parts(text_model: TextModel, text: str, end: bool) -> list[list[int]]:
    """A text as a training document: prefix, text, and with `end` its end; several of them when it is too long."""
    body = [*text_model.tokenizer.encode(text), *(end_ids(text_model) if end else [])]
    prefix = list(text_model.text_prefix)
    length = text_model.positions - len(prefix)
    return [[*prefix, *body[start : start + length]] for start in range(0, len(body), length)]


def end_ids(text_model: TextModel) -> list[int]:
    """The token that ends a document; none if the model has no such token."""
    return sorted(text_model.stop_ids)[:1]


def layer_loads(names: Sequence[str], counts_LE: NDArray[np.int64]) -> list[LayerLoad]:
    """Load per layer from selections per expert; a layer without any selection counts as even."""
    loads = []
    for name, counts_E in zip(names, counts_LE, strict=True):
        total = int(counts_E.sum())
        share_E = counts_E / total if total else np.full(len(counts_E), 1 / len(counts_E))
        dead_experts = tuple(int(expert) for expert in np.flatnonzero(counts_E == 0))
        loads.append(LayerLoad(name, tuple(share_E.tolist()), float(share_E.max() * len(share_E) - 1), dead_experts))
    return loads


def _bits_per_byte(texts: Sequence[str], bits: Sequence[float]) -> dict[str, float]:
    rates = {}
    languages = [language_of(text) for text in texts]
    for name in ("en", "zh", "all"):
        rows = [row for row, language in enumerate(languages) if name in (language, "all")]
        size = sum(len(texts[row].encode()) for row in rows)
        if size:
            rates[name] = sum(bits[row] for row in rows) / size
    return rates


def _sum_scores(
    text_model: TextModel, scores: Sequence[SequenceScore], bits_per_byte: dict[str, float] | None = None
) -> TextScores:
    predictions = sum(score.mtp_predictions for score in scores)
    agreements = sum(score.mtp_agreements for score in scores)
    names = [name for name, _ in text_model.model.moe_layers() if name.startswith("layers.")]
    return TextScores(
        tokens=sum(score.tokens for score in scores),
        mtp_acceptance=agreements / predictions if predictions else None,
        load=layer_loads(names, np.sum([score.counts_LE for score in scores], axis=0)) if names else [],
        bits_per_byte=bits_per_byte or {},
    )
