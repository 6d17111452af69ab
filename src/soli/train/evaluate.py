"""Held-out text: nats per token, bits per byte, accuracy of multi-token prediction, and sample translations.

Bits per byte = nats of all predicted tokens / ln 2 / UTF-8 bytes that those tokens encode. Special tokens count in the
numerator and encode no byte. Nothing here changes the model: no gradient, no load counted towards the bias.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Request
from soli.engine.text_model import TextModel
from soli.model.router import Routing
from soli.model.transformer import Transformer
from soli.parallel.ranks import ALONE, Ranks
from soli.train.losses import mtp_mask, token_nll

if TYPE_CHECKING:
    from soli.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out windows."""

    loss: float  # nats per token
    bits_per_byte: float
    mtp_accuracy: float | None  # how often the first MTP module's likeliest token is the text's; None without one
    mtp_accepted: float | None = None  # how often it is the model's own, so that greedy decoding accepts the draft


def bytes_per_token(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """UTF-8 bytes that each token id encodes (float64, V); 0 for special tokens."""
    lengths = [len(tokenizer.token_bytes(i)) if tokenizer.decode([i]) else 0 for i in range(vocab_size)]
    return torch.tensor(lengths, dtype=torch.float64)


@torch.no_grad()
def evaluate(
    model: Transformer,
    window_BW: Tensor,
    bytes_V: Tensor,
    micro: int,
    eos_id: int,
    ranks: Ranks = ALONE,
    shares: Ranks | None = None,
    pipeline: "Pipeline | None" = None,
) -> Evaluation:
    """Measure the model on held-out windows of T + 1 + MTP depth tokens, `micro` of them at a time on each rank; in a
    pipeline on the ranks of each share together."""
    parts = window_BW.split(micro)
    shares = shares or ranks
    measure = HeldoutMeasure(model, bytes_V, eos_id)
    own = []
    for first in range(0, len(parts), shares.world):
        # A rank for which no part is left computes the last one along with the others; its result is dropped below.
        part_BW = parts[min(first + shares.rank, len(parts) - 1)].to(model.embed_tokens.weight.device)
        own.append(measure.of_windows(part_BW) if pipeline is None else measure.of_stages(pipeline, part_BW))
    by_rank = ranks.gather(torch.tensor(own, dtype=torch.float64).view(-1, 6))
    if pipeline is not None:  # zeros but from the last stage
        by_rank = list(torch.stack(by_rank).unflatten(0, (-1, shares.world)).sum(0))
    sums = torch.stack(by_rank, dim=1).flatten(0, 1)[: len(parts)].tolist()
    nats, text_bytes, correct, targets, accepted, drafts = (sum(column) for column in zip(*sums, strict=True))
    loss = nats / (window_BW.shape[0] * measure.length(window_BW))
    bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
    if not targets:
        return Evaluation(loss, bits, None, None)
    return Evaluation(loss, bits, correct / targets, accepted / drafts if drafts else None)


Sums = tuple[float, float, float, float, float, float]


class HeldoutMeasure:
    """Sums over some windows: nats, UTF-8 bytes, targets that the first MTP module's likeliest token is, targets,
    drafts that are the model's likeliest token too, drafts. Also the task of a pipeline's stages, of which the last one
    measures."""

    def __init__(self, model: Transformer, bytes_V: Tensor, eos_id: int) -> None:
        self.model, self.bytes_V, self.eos_id = model, bytes_V, eos_id
        self.depths = model.config.num_nextn_predict_layers

    def length(self, window_BW: Tensor) -> int:
        """Tokens of a window's input."""
        return window_BW.shape[1] - 1 - self.depths

    def of_windows(self, ids_BW: Tensor) -> Sums:
        """The sums over windows, of a model that this process has as a whole."""
        return self._measure(self.model.backbone(ids_BW[:, : self.length(ids_BW)]).hidden_BTD, ids_BW)

    def of_stages(self, pipeline: "Pipeline", ids_BW: Tensor) -> Sums:
        """As `of_windows` on the rank of the last stage; zeros on the others, which take part."""
        sums: Sums | None = pipeline.forward(ids_BW, self.length(ids_BW), self)
        return sums or (0.0,) * 6

    def carry(self, routing: Mapping[str, Routing], carried: Tensor | None, sequences: int) -> None:
        """Nothing: no balance loss is measured."""

    def finish(
        self, hidden_BTD: Tensor, routing: Mapping[str, Routing], carried: Tensor | None, window_BW: Tensor
    ) -> Sums:
        """What the last stage measures."""
        return self._measure(hidden_BTD, window_BW)

    def _measure(self, hidden_BTD: Tensor, ids_BW: Tensor) -> Sums:
        model, length = self.model, self.length(ids_BW)
        nats = float(token_nll(hidden_BTD, model.lm_head.weight, ids_BW[:, 1 : 1 + length]).double().sum())
        text_bytes = float(self.bytes_V[ids_BW[:, 1 : 1 + length].cpu()].sum())
        if not self.depths:
            return nats, text_bytes, 0.0, 0.0, 0.0, 0.0
        step = model.mtp_step(0, hidden_BTD, ids_BW[:, 1 : 1 + length])
        mask_BT = mtp_mask(ids_BW, 0, length, self.eos_id)
        draft_BT = model.head(step.hidden_BTD).argmax(-1)
        hit_BT = draft_BT == ids_BW[:, 2 : 2 + length]
        accepted_BT = draft_BT[:, :-1] == model.head(hidden_BTD[:, 1:]).argmax(-1)  # the model's token after the last
        compared_BT = mask_BT[:, :-1]
        hits, accepted = float((hit_BT & mask_BT).sum()), float((accepted_BT & compared_BT).sum())
        return nats, text_bytes, hits, float(mask_BT.sum()), accepted, float(compared_BT.sum())


class NextToken:
    """The likeliest next token after one text, as the task of a pipeline's stages."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def carry(self, routing: Mapping[str, Routing], carried: Tensor | None, sequences: int) -> None:
        """Nothing."""

    def finish(
        self, hidden_BTD: Tensor, routing: Mapping[str, Routing], carried: Tensor | None, window_BW: Tensor
    ) -> int:
        """The last stage's token."""
        return int(self.model.head(hidden_BTD[:, -1]).argmax())


def translate_samples(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: list[tuple[str, str]],
    limit: int,
    ranks: Ranks = ALONE,
    pipeline: "Pipeline | None" = None,
) -> list[tuple[str, str]]:
    """Greedy translations of (text, target language) pairs, beside their texts, of those that fit the model."""
    text_model = TextModel(model, tokenizer, frozenset({tokenizer.eos_id}), ())
    prompts = [(text, tuple(tokenizer.translation_prompt(text, to))) for text, to in sentences]
    fitting = [(text, prompt) for text, prompt in prompts if 0 < limit <= text_model.positions - len(prompt)]
    if not fitting:
        return []
    if ranks.world > 1:
        eos_id = tokenizer.eos_id
        continued = [(text, _greedy(model, prompt, limit, eos_id, ranks, pipeline)) for text, prompt in fitting]
        return [(text, tokenizer.decode(ids)) for text, ids in continued]
    longest = max(len(prompt) for _, prompt in fitting) + limit
    # The weights changed since the last samples, so the engine is a new one.
    engine = Engine(text_model, limits_for(text_model, len(fitting), longest))
    answers = answer_all(engine, (Request(prompt, limit, stop_ids=text_model.stop_ids) for _, prompt in fitting))
    return [(text, answer.text) for (text, _), answer in zip(fitting, answers, strict=True) if answer is not None]


@torch.no_grad()
def _greedy(
    model: Transformer,
    prompt: Sequence[int],
    limit: int,
    eos_id: int,
    ranks: Ranks,
    pipeline: "Pipeline | None",
) -> list[int]:
    """The likeliest continuation, token by token without a cache: all ranks compute each forward pass together, so all
    take the token of the first one that has it."""
    ids = list(prompt)
    device = model.embed_tokens.weight.device
    while len(ids) < len(prompt) + limit:
        ids_1T = torch.tensor([ids], device=device)
        if pipeline is None:
            hidden_BTD = model.backbone(ids_1T).hidden_BTD
            token = ranks.of_first(int(model.head(hidden_BTD[:, -1]).argmax()))
        else:
            own: int | None = pipeline.forward(ids_1T, len(ids), NextToken(model))
            token = next(token for token in ranks.all_objects(own) if token is not None)
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]
