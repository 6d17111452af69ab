"""What training measures: load, held-out loss, bits per byte, MTP accuracy, and the sample sentences."""

import math

import pytest
import torch
from torch.nn import functional as F

from soli.data.tokenizer import Tokenizer
from soli.train import model_options
from soli.train.balance import measure_load, reduce_counts
from soli.train.evaluate import bytes_per_token, evaluate, translate_samples
from soli.train.model_options import precision_note
from soli.train.setup import choose_device, choose_precision, read_sentences
from tests.train.toy import EOS, tiny_model, windows, write_data


def test_load_of_two_layers_by_hand():
    even, skewed = measure_load(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]))
    assert (even.max_violation, even.entropy, even.dead_experts) == pytest.approx((0, 1, 0))
    assert (skewed.max_violation, skewed.entropy, skewed.dead_experts) == pytest.approx((3, 0, 3))
    assert measure_load(torch.zeros(0, 0)) == []


def test_counts_of_one_process_stay_as_they_are():
    counts = torch.tensor([[1, 2]])
    assert torch.equal(reduce_counts(counts.clone()), counts)


@pytest.mark.parametrize("micro", [1, 4])
def test_evaluation_by_hand(micro):
    model, window = tiny_model(), windows(4, 18)
    lengths = torch.randint(0, 4, (288,), dtype=torch.float64)
    result = evaluate(model, window, lengths, micro, EOS)
    nats = F.cross_entropy(model(window[:, :16]).detach().flatten(0, 1), window[:, 1:17].flatten(), reduction="sum")
    assert result.loss == pytest.approx(float(nats) / 64, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(
        float(nats) / math.log(2) / float(lengths[window[:, 1:17]].sum()), rel=1e-5
    )
    assert 0 <= result.mtp_accuracy <= 1


def test_bytes_per_token_add_up_to_the_text(tmp_path):
    tokenizer = Tokenizer.from_folder(write_data(tmp_path))
    lengths, text = bytes_per_token(tokenizer, tokenizer.vocab_size), "012 naïve 你好"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[[tokenizer.bos_id, tokenizer.eos_id]].sum() == 0


def test_sentences_alternate_in_direction(tmp_path):
    file = tmp_path / "heldout.tsv"
    file.write_text("".join(f"s\tzh{n}\ten{n}\n" for n in range(10)), encoding="utf-8")
    assert read_sentences(file, 2) == [("en2", "zh"), ("zh7", "en")]
    assert read_sentences(file, 0) == [] == read_sentences(tmp_path / "none.tsv", 3)


def test_samples_too_long_for_the_model_are_left_out(tmp_path):
    tokenizer, model = Tokenizer.from_folder(write_data(tmp_path)), tiny_model()
    samples = translate_samples(model, tokenizer, [("ab", "zh"), ("x" * 200, "zh")], limit=4)
    assert [text for text, _ in samples] == ["ab"]


def test_device_and_precision_are_chosen():
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32
    assert choose_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert choose_device("cpu").type == "cpu"


def test_a_precision_that_is_slow_here_is_told(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(model_options, "has_bfloat16_products", lambda: False)
    assert "--set run.precision=auto" in precision_note("bf16", cpu)
    assert precision_note("fp32", cpu) is precision_note("auto", cpu) is None
    monkeypatch.setattr(model_options, "has_bfloat16_products", lambda: True)
    assert precision_note("bf16", cpu) is None
    assert precision_note("fp8", cpu).startswith("FP8 is emulated")
