"""Teacher-forced scores against arithmetic by hand, text by text."""

import copy
import math

import numpy as np
import pytest
import torch

from soli.errors import SoliError
from soli.eval.routing import report_routing
from soli.eval.scoring import document_parts, score_pairs, score_sequences, score_texts
from soli.eval.translation import translation_quality
from tests.engine.tiny import tiny_model, tiny_text_model

SEQUENCES = [[0, 5, 9, 30, 31, 7], [0, 5, 8], [0, 5, 40, 41, 42, 43, 44, 45, 46, 1]]


def by_hand(model, ids: list[int], context: int) -> tuple[np.ndarray, float, int, int]:
    with torch.no_grad():
        backbone = model.backbone(torch.tensor([ids]))
        logits_TV = model.head(backbone.hidden_BTD)[0]
        counts = np.zeros((2, 16), dtype=np.int64)
        for layer, routing in enumerate(backbone.routing):
            for token in range(context, len(ids)):
                counts[layer, routing.expert_ids_TK[token].numpy()] += 1
        bits = -sum(float(logits_TV[t - 1].log_softmax(-1)[ids[t]]) for t in range(context, len(ids))) / math.log(2)
        predictions = agreements = 0
        for t in range(context - 1, len(ids) - 2):  # MTP takes the hidden state at t and token t+1, predicts token t+2
            step = model.mtp_step(0, backbone.hidden_BTD[:, : t + 1], torch.tensor([ids[1 : t + 2]]))
            prediction = int(model.head(step.hidden_BTD)[0, -1].argmax())
            predictions += 1
            agreements += prediction == int(logits_TV[t + 1].argmax())
    return counts, bits, predictions, agreements


def test_counts_bits_and_mtp_agreement():
    model = copy.deepcopy(tiny_model())
    model.lm_head.weight.data[4:] = 0  # few tokens to choose from, so that the MTP module is sometimes right
    scores = sorted(score_sequences(model, SEQUENCES, context=2), key=lambda score: score.number)
    assert [score.tokens for score in scores] == [4, 1, 8]
    for ids, score in zip(SEQUENCES, scores, strict=True):
        counts, bits, predictions, agreements = by_hand(model, ids, 2)
        assert np.array_equal(score.counts_LE, counts)
        assert score.bits == pytest.approx(bits, rel=1e-5)
        assert (score.mtp_predictions, score.mtp_agreements) == (predictions, agreements)
    assert 0 < sum(score.mtp_agreements for score in scores) < sum(score.mtp_predictions for score in scores)


def test_unscored_reading_counts_the_same():
    model = tiny_model()
    scored, plain = (list(score_sequences(model, SEQUENCES, context=2, score=score)) for score in (True, False))
    assert all(np.array_equal(a.counts_LE, b.counts_LE) and b.bits == 0 for a, b in zip(scored, plain, strict=True))


def test_too_long_a_sequence_is_rejected():
    with pytest.raises(SoliError, match="65 tokens does not fit the model's 64 positions"):
        list(score_sequences(tiny_model(), [[5] * 65], context=1))


def test_bits_per_byte_of_a_text_read_in_parts():
    text_model = tiny_text_model()
    text = "猫坐在 hello " * 20
    parts = document_parts(text_model, text, end=True)
    assert len(parts) > 1 and all(part[:2] == [0, 5] and len(part) <= 96 for part in parts)
    assert [token for part in parts for token in part[2:]] == [*text_model.tokenizer.encode(text), 1]
    bits = sum(by_hand(text_model.model, part, 2)[1] for part in parts)
    scores = score_texts(text_model, [text, "the"])
    assert scores.bits_per_byte["zh"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert set(scores.bits_per_byte) == {"zh", "en", "all"}
    assert scores.tokens == sum(len(part) - 2 for part in parts) + len(text_model.tokenizer.encode("the")) + 1


def test_pairs_are_read_as_training_documents_both_ways():
    text_model = tiny_text_model()
    scores = score_pairs(text_model, [("web", "你好", "hello")])
    zh, en = len(text_model.tokenizer.encode("你好")), len(text_model.tokenizer.encode("hello"))
    assert scores.tokens == 2 * (zh + en + 2)
    assert [load.layer for load in scores.load] == ["layers.1", "layers.2"]
    assert 0 <= scores.mtp_acceptance <= 1


def test_a_perfect_translation_scores_a_hundred():
    for reference, to in ((["今天天气很好，我们出去。"], "zh"), (["The weather is fine today."], "en")):
        perfect, empty = (translation_quality(texts, reference, to) for texts in (reference, [""]))
        assert perfect.chrf == pytest.approx(100) and perfect.bleu == pytest.approx(100)
        assert empty.chrf == 0 and empty.bleu == 0


def test_the_report_counts_texts_and_tokens_by_language():
    text_model = tiny_text_model()
    texts = ["the cat"] * 12 + ["猫坐"] * 11 + ["123"]
    report = report_routing(text_model, texts, permutations=100)
    assert {language: count.texts for language, count in report.languages.items()} == {"zh": 11, "en": 12, "neither": 1}
    assert report.languages["zh"].tokens == 11 * len(text_model.tokenizer.encode("猫坐"))
    assert len(report.preferences) == 2 * 16 and sum(report.loads[0].share) == pytest.approx(1)
    assert any(preference.prefers == "zh" for preference in report.preferences), "each language has one text, repeated"
