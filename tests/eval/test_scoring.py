"""Forced reading against arithmetic by hand, text by text."""

import copy
import math

import numpy as np
import pytest
import torch

from soli.errors import SoliError
from soli.eval.quality import document_parts, quality, read_pairs, read_texts
from soli.eval.routing_report import report_routing
from soli.eval.scoring import read_sequences
from tests.engine.tiny import tiny_model, tiny_text_model

SEQUENCES = [[0, 5, 9, 30, 31, 7], [0, 5, 8], [0, 5, 40, 41, 42, 43, 44, 45, 46, 1]]


def by_hand(model, ids: list[int], skip: int) -> tuple[np.ndarray, float, int, int]:
    with torch.no_grad():
        backbone = model.backbone(torch.tensor([ids]))
        logits_TV = model.head(backbone.hidden_BTD)[0]
        counts = np.zeros((2, 16), dtype=np.int64)
        for layer, routing in enumerate(backbone.routing):
            for token in range(skip, len(ids)):
                counts[layer, routing.expert_ids_TK[token].numpy()] += 1
        bits = -sum(float(logits_TV[t - 1].log_softmax(-1)[ids[t]]) for t in range(skip, len(ids))) / math.log(2)
        tried = agreed = 0
        for t in range(skip - 1, len(ids) - 2):  # MTP sees the hidden state at t and token t+1; guesses token t+2
            step = model.mtp_step(0, backbone.hidden_BTD[:, : t + 1], torch.tensor([ids[1 : t + 2]]))
            guess = int(model.head(step.hidden_BTD)[0, -1].argmax())
            tried, agreed = tried + 1, agreed + (guess == int(logits_TV[t + 1].argmax()))
    return counts, bits, tried, agreed


def test_counts_bits_and_mtp_agreement():
    model = copy.deepcopy(tiny_model())
    model.lm_head.weight.data[4:] = 0  # few tokens to choose from, so that the MTP module is sometimes right
    readings = sorted(read_sequences(model, SEQUENCES, skip=2), key=lambda reading: reading.number)
    assert [reading.tokens for reading in readings] == [4, 1, 8]
    for ids, reading in zip(SEQUENCES, readings, strict=True):
        counts, bits, tried, agreed = by_hand(model, ids, 2)
        assert np.array_equal(reading.counts_LE, counts)
        assert reading.bits == pytest.approx(bits, rel=1e-5)
        assert (reading.mtp_tried, reading.mtp_agreed) == (tried, agreed)
    assert 0 < sum(reading.mtp_agreed for reading in readings) < sum(reading.mtp_tried for reading in readings)


def test_unscored_reading_counts_the_same():
    model = tiny_model()
    scored, plain = (list(read_sequences(model, SEQUENCES, skip=2, score=score)) for score in (True, False))
    assert all(np.array_equal(a.counts_LE, b.counts_LE) and b.bits == 0 for a, b in zip(scored, plain, strict=True))


def test_too_long_a_sequence_is_refused():
    with pytest.raises(SoliError, match="65 tokens does not fit the model's 64 positions"):
        list(read_sequences(tiny_model(), [[5] * 65], skip=1))


def test_bits_per_byte_of_a_text_read_in_parts():
    ours = tiny_text_model()
    text = "猫坐在 hello " * 20
    parts = document_parts(ours, text, end=True)
    assert len(parts) > 1 and all(part[:2] == [0, 5] and len(part) <= 96 for part in parts)
    assert [token for part in parts for token in part[2:]] == [*ours.tokenizer.encode(text), 1]
    bits = sum(by_hand(ours.model, part, 2)[1] for part in parts)
    found = read_texts(ours, [text, "the"])
    assert found.bits_per_byte["zh"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert set(found.bits_per_byte) == {"zh", "en", "all"}
    assert found.tokens == sum(len(part) - 2 for part in parts) + len(ours.tokenizer.encode("the")) + 1


def test_pairs_are_read_as_training_documents_both_ways():
    ours = tiny_text_model()
    found = read_pairs(ours, [("web", "你好", "hello")])
    zh, en = len(ours.tokenizer.encode("你好")), len(ours.tokenizer.encode("hello"))
    assert found.tokens == 2 * (zh + en + 2)
    assert [load.layer for load in found.load] == ["layers.1", "layers.2"]
    assert 0 <= found.mtp_acceptance <= 1


def test_a_perfect_translation_scores_a_hundred():
    for given, to in ((["今天天气很好，我们出去。"], "zh"), (["The weather is fine today."], "en")):
        perfect, empty = quality(given, given, to), quality([""], given, to)
        assert perfect.chrf == pytest.approx(100) and perfect.bleu == pytest.approx(100)
        assert empty.chrf == 0 and empty.bleu == 0


def test_the_report_counts_texts_and_tokens_by_language():
    ours = tiny_text_model()
    texts = ["the cat"] * 12 + ["猫坐"] * 11 + ["123"]
    report = report_routing(ours, texts, permutations=100)
    assert {name: one.texts for name, one in report.languages.items()} == {"zh": 11, "en": 12, "neither": 1}
    assert report.languages["zh"].tokens == 11 * len(ours.tokenizer.encode("猫坐"))
    assert len(report.preferences) == 2 * 16 and sum(report.loads[0].share) == pytest.approx(1)
    assert any(one.prefers == "zh" for one in report.preferences), "each language has one text, said again and again"
