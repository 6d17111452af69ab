"""Held-out text: nats per token, bits per byte, accuracy of multi-token prediction, and sample translations.

Bits per byte = nats of all predicted tokens / ln 2 / UTF-8 bytes that those tokens encode. Special tokens count in the
numerator and encode no byte. Nothing here changes the model: no gradient, no load counted towards the bias.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from soli.data.tokenizer import Tokenizer
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Request
from soli.engine.text_model import TextModel
from soli.model.transformer import Transformer
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
def evaluate(model: Transformer, window_BW: Tensor, bytes_V: Tensor, micro: int, eos_id: int) -> Evaluation:
    """Measure the model on held-out windows of T + 1 + MTP depth tokens, `micro` of them at a time."""
    device = model.embed_tokens.weight.device
    depths = len(model.mtp)
    length = window_BW.shape[1] - 1 - depths
    nats = 0.0
    text_bytes = 0.0
    correct = 0
    targets = 0
    for part_BW in window_BW.split(micro):
        ids_BW = part_BW.to(device)
        backbone = model.backbone(ids_BW[:, :length])
        nats += float(token_nll(backbone.hidden_BTD, model.lm_head.weight, ids_BW[:, 1 : 1 + length]).double().sum())
        text_bytes += float(bytes_V[part_BW[:, 1 : 1 + length]].sum())
        if depths:
            step = model.mtp_step(0, backbone.hidden_BTD, ids_BW[:, 1 : 1 + length])
            mask_BT = mtp_mask(ids_BW, 0, length, eos_id)
            hit_BT = model.head(step.hidden_BTD).argmax(-1) == ids_BW[:, 2 : 2 + length]
            correct += int((hit_BT & mask_BT).sum())
            targets += int(mask_BT.sum())
    loss = nats / (window_BW.shape[0] * length)
    bits = nats / math.log(2) / text_bytes if text_bytes else math.nan
    return Evaluation(loss, bits, correct / targets if targets else None)


def translate_samples(
    model: Transformer, tokenizer: Tokenizer, sentences: list[tuple[str, str]], limit: int
) -> list[tuple[str, str]]:
    """Greedy translations of (text, target language) pairs, beside their texts, of those that fit the model."""
    text_model = TextModel(model, tokenizer, frozenset({tokenizer.eos_id}), ())
    prompts = [(text, tuple(tokenizer.translation_prompt(text, to))) for text, to in sentences]
    fitting = [(text, prompt) for text, prompt in prompts if 0 < limit <= text_model.positions - len(prompt)]
    if not fitting:
        return []
    longest = max(len(prompt) for _, prompt in fitting) + limit
    # The weights changed since the last samples, so the engine is a new one.
    engine = Engine(text_model, limits_for(text_model, len(fitting), longest))
    answers = answer_all(engine, (Request(prompt, limit, stop_ids=text_model.stop_ids) for _, prompt in fitting))
    return [(text, answer.text) for (text, _), answer in zip(fitting, answers, strict=True) if answer is not None]
