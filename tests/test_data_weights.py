"""The comparison of mixtures: weights name sources, runs are of equal length, bits count the translation alone."""

import math
import sys
from pathlib import Path

import pytest
import torch

from soli.config import ModelConfig
from soli.data.documents import Pair, encode_documents, pair_documents
from soli.data.tokenizer import Tokenizer
from soli.model.transformer import Transformer
from soli.recipes.nano_corpus.sources import SOURCES
from soli.recipes.nano_corpus.sources.extra import PUBLIC

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import data_weights  # noqa: E402


def test_mixtures_and_domains_name_sources() -> None:
    names = {source.label for source in SOURCES} | {*PUBLIC, "everyday"}
    for weights in data_weights.MIXTURES.values():
        assert names >= {*data_weights.BEFORE, *weights}
    assert names >= {source for sources in data_weights.DOMAINS.values() for source in sources}


@pytest.mark.parametrize("tokens", [100_000, 1_000_000])
def test_runs_are_as_long_as_stated_to_a_step(tokens: int) -> None:
    assert abs(data_weights.settings_for(tokens, 6144).schedule.total_tokens - tokens) <= 4096


def test_documents_end_with_the_one_that_reaches_the_budget() -> None:
    encoded = [("a", [0] * 4), ("b", [0] * 4), ("c", [0] * 4)]
    assert [source for source, _ in data_weights.up_to(5, encoded)] == ["a", "b"]


def test_bits_per_byte_counts_the_translation_and_the_end_alone() -> None:
    tokenizer = Tokenizer.from_folder(ROOT / "src" / "soli" / "models" / "nano")
    model = Transformer(ModelConfig.from_dict(data_weights.MODEL | {"vocab_size": tokenizer.vocab_size})).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    documents = [document for document in pair_documents(Pair("a", "你好，世界。", "Hello, world.")) * 2][:3]
    expected = 0.0
    for document, (_, ids) in zip(documents, encode_documents(documents, tokenizer), strict=True):
        start = ids.index(tokenizer.token_id(document.segments[1][0])) + 1
        with torch.inference_mode():
            logits_TV = model.head(model.backbone(torch.tensor([ids])).hidden_BTD)[0].float()
        nats = torch.nn.functional.cross_entropy(logits_TV[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum")
        expected += float(nats) / math.log(2)
    size = sum(len(document.segments[1][1].encode()) for document in documents)
    assert data_weights.bits_per_byte(model, tokenizer, documents) == pytest.approx(expected / size, rel=1e-4)


def test_the_table_has_the_mean_of_both_directions() -> None:
    row = {"mixture": "before", "vocab_size": 6144, "bits_per_byte": {"everyday": {"en-zh": 2.0, "zh-en": 3.0}}}
    assert data_weights.table([row]).splitlines()[-1] == "| before | 6,144 | 2.500 |"
