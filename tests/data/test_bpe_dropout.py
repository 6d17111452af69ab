"""BPE-dropout: the texts stay, tokens are split at the given rate, and what is held out is as it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.data.bpe_dropout import BpeDropout, merged_from
from soli.data.documents import Pair
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.recipes.nano_corpus.build import write_token_files
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.corpus import Corpus

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。 naïve café"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 3, 420)


@given(texts=st.lists(st.text(max_size=30), max_size=5), rate=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_texts_stay_as_they_are(tokenizer, texts, rate, seed):
    encoded = tokenizer.encode_batch([*texts, TEXT, ""])
    split = BpeDropout(tokenizer, rate, seed)(encoded)
    assert [tokenizer.decode(ids) for ids in split] == [tokenizer.decode(ids) for ids in encoded]


def test_a_token_is_split_with_the_given_probability_and_its_parts_again(tokenizer):
    parts = merged_from(tokenizer)
    ids = tokenizer.encode(TEXT)
    token = max(ids, key=lambda token: len(tokenizer.token_bytes(token)) * (parts[token, 0] >= 0))
    left, right = parts[token]
    assert tokenizer.token_bytes(left) + tokenizer.token_bytes(right) == tokenizer.token_bytes(token)
    split = BpeDropout(tokenizer, 0.3, 0)([[token]] * 4000)
    assert np.mean([len(ids) > 1 for ids in split]) == pytest.approx(0.3, abs=0.03)
    of_parts = [len(ids) > 2 for ids in split if len(ids) > 1]
    again = 1 - np.prod([0.7 if parts[part, 0] >= 0 else 1 for part in (left, right)])
    assert again > 0 and np.mean(of_parts) == pytest.approx(again, abs=0.06)


def test_characters_are_never_split(tokenizer):
    split = BpeDropout(tokenizer, 0.99, 0)([tokenizer.encode(TEXT)])[0]
    whole = [token for token in split if tokenizer.token_bytes(token).decode(errors="ignore").encode()]
    assert "".join(tokenizer.token_bytes(token).decode() for token in whole).replace(" ", "") in TEXT.replace(" ", "")
    assert set(split) - set(whole) <= set(tokenizer.encode(TEXT))  # parts of characters that no token has whole


def test_copies_differ_and_a_seed_gives_them_again(tokenizer):
    copies = [tokenizer.encode(TEXT)] * 3
    first, second = (BpeDropout(tokenizer, 0.3, 5) for _ in range(2))
    one, two = first(copies), first(copies)
    assert one == second(copies) and two == second(copies)
    assert len({tuple(ids) for ids in [*one, *two]}) == 6
    assert BpeDropout(tokenizer, 0.3, 6)(copies) != one
    assert BpeDropout(tokenizer, 0.0, 5)(copies) == copies


def test_training_texts_are_split_and_held_out_ones_are_not(tmp_path):
    pairs = [Pair("games", f"第{i}只猫在屋里", f"cat number {i} is inside") for i in range(200)]
    corpus = Corpus(pairs, pairs[:20], [], [])
    lengths = {}
    for rate in (0.0, 0.2):
        config = CorpusConfig(vocab_size=400, bpe_dropout=rate)
        lengths[rate] = write_token_files(corpus, config, tmp_path / str(rate), lambda name, event: None)
    assert lengths[0.2]["train_tokens"] > 1.05 * lengths[0.0]["train_tokens"]
    assert lengths[0.2]["valid_tokens"] == lengths[0.0]["valid_tokens"]
    assert (tmp_path / "0.2" / "valid.bin").read_bytes() == (tmp_path / "0.0" / "valid.bin").read_bytes()


@pytest.mark.parametrize("rate", [-0.1, 1.0, "often"])
def test_a_rate_is_a_probability_below_one(rate):
    with pytest.raises(SoliError, match=r"data\.bpe_dropout is .*it must be a number"):
        CorpusConfig(bpe_dropout=rate)
