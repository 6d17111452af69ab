"""Held-out text: nats per token, bits per byte, accuracy of multi-token prediction, and sample translations.

Bits per byte = nats of all predicted tokens / ln 2 / UTF-8 bytes that those tokens encode. Special tokens count in the
numerator and encode no byte. Nothing here changes the model: no gradient, no load counted towards the bias.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Request
from soli.engine.text_model import TextModel
from soli.model.transformer import Transformer
from soli.parallel.ranks import ALONE, Ranks
from soli.train.losses import mtp_mask, token_nll


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out windows."""

    loss: float  # nats per token
    bits_per_byte: float
    mtp_accuracy: float | None  # how often the first MTP module's likeliest token is the text's; None without one


def bytes_per_token(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """UTF-8 bytes that each token id encodes (float64, V); 0 for special tokens."""
    lengths = [len(tokenizer.token_bytes(i)) if tokenizer.decode([i]) else 0 for i in range(vocab_size)]
    return torch.tensor(lengths, dtype=torch.float64)


@torch.no_grad()
def evaluate(
    model: Transformer, window_BW: Tensor, bytes_V: Tensor, micro: int, eos_id: int, ranks: Ranks = ALONE
) -> Evaluation:
    """Measure the model on held-out windows of T + 1 + MTP depth tokens, `micro` of them at a time on each rank."""
    parts = window_BW.split(micro)
    own = []
    for first in range(0, len(parts), ranks.world):
        # A rank for which no part is left computes the last one along with the others; its result is dropped below.
        part_BW = parts[min(first + ranks.rank, len(parts) - 1)]
        own.append(_measure(model, part_BW, bytes_V, eos_id))
    by_rank = ranks.gather(torch.tensor(own, dtype=torch.float64).view(-1, 4))
    sums = torch.stack(by_rank, dim=1).flatten(0, 1)[: len(parts)].tolist()
    nats, text_bytes, correct, targets = (sum(column) for column in zip(*sums, strict=True))
    loss = nats / (window_BW.shape[0] * (window_BW.shape[1] - 1 - len(model.mtp)))
    bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
    return Evaluation(loss, bits, correct / targets if targets else None)


def _measure(model: Transformer, part_BW: Tensor, bytes_V: Tensor, eos_id: int) -> tuple[float, float, float, float]:
    """Sums over some windows: nats, UTF-8 bytes, targets that the first MTP module's likeliest token is, targets."""
    depths = len(model.mtp)
    length = part_BW.shape[1] - 1 - depths
    ids_BW = part_BW.to(model.embed_tokens.weight.device)
    backbone = model.backbone(ids_BW[:, :length])
    nats = float(token_nll(backbone.hidden_BTD, model.lm_head.weight, ids_BW[:, 1 : 1 + length]).double().sum())
    text_bytes = float(bytes_V[part_BW[:, 1 : 1 + length]].sum())
    if not depths:
        return nats, text_bytes, 0.0, 0.0
    step = model.mtp_step(0, backbone.hidden_BTD, ids_BW[:, 1 : 1 + length])
    mask_BT = mtp_mask(ids_BW, 0, length, eos_id)
    hit_BT = model.head(step.hidden_BTD).argmax(-1) == ids_BW[:, 2 : 2 + length]
    return nats, text_bytes, float((hit_BT & mask_BT).sum()), float(mask_BT.sum())


def translate_samples(
    model: Transformer, tokenizer: Tokenizer, sentences: list[tuple[str, str]], limit: int, ranks: Ranks = ALONE
) -> list[tuple[str, str]]:
    """Greedy translations of (text, target language) pairs, beside their texts, of those that fit the model."""
    text_model = TextModel(model, tokenizer, frozenset({tokenizer.eos_id}), ())
    prompts = [(text, tuple(tokenizer.translation_prompt(text, to))) for text, to in sentences]
    fitting = [(text, prompt) for text, prompt in prompts if 0 < limit <= text_model.positions - len(prompt)]
    if not fitting:
        return []
    if ranks.world > 1:
        continued = [(text, _greedy(model, prompt, limit, tokenizer.eos_id, ranks)) for text, prompt in fitting]
        return [(text, tokenizer.decode(ids)) for text, ids in continued]
    longest = max(len(prompt) for _, prompt in fitting) + limit
    # The weights changed since the last samples, so the engine is a new one.
    engine = Engine(text_model, limits_for(text_model, len(fitting), longest))
    answers = answer_all(engine, (Request(prompt, limit, stop_ids=text_model.stop_ids) for _, prompt in fitting))
    return [(text, answer.text) for (text, _), answer in zip(fitting, answers, strict=True) if answer is not None]


@torch.no_grad()
def _greedy(model: Transformer, prompt: Sequence[int], limit: int, eos_id: int, ranks: Ranks) -> list[int]:
    """The likeliest continuation, token by token without a cache: all ranks compute each forward pass together, so all
    take the token of the first one."""
    ids = list(prompt)
    device = model.embed_tokens.weight.device
    while len(ids) < len(prompt) + limit:
        hidden_BTD = model.backbone(torch.tensor([ids], device=device)).hidden_BTD
        token = ranks.of_first(int(model.head(hidden_BTD[:, -1]).argmax()))
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]
