"""Documents, mixture and packed files: both directions, weights, special tokens, and incomplete folders."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.data.documents import Pair, encode_by_source, split_middle
from soli.data.token_files import DTYPE, inspect_folder, read_meta
from soli.data.tokenizer import Tokenizer
from soli.errors import SoliError
from soli.recipes.nano_corpus.build import build_data, write_token_files
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.corpus import Corpus, Line, write_corpus
from soli.recipes.nano_corpus.mixture import heldout_documents, mix

PAIRS = [Pair("games", f"第{i}只猫", f"cat number {i}") for i in range(300)]
LINES = [Line("en", "manual", f"Line {i} of the manual.") for i in range(100)]


@given(text=st.text(max_size=40), seed=st.integers(0, 99))
def test_fim_parts_join_to_the_text(text, seed):
    parts = split_middle(text, 1.0, np.random.default_rng(seed))
    assert parts is None if len(text) < 3 else ("".join(parts) == text and parts[1])
    assert split_middle(text, 0.0, np.random.default_rng(seed)) is None


def test_documents_are_rearranged_at_the_given_rate():
    rng = np.random.default_rng(0)
    assert 0.2 < np.mean([split_middle("some text", 0.3, rng) is not None for _ in range(500)]) < 0.4


def test_weights_are_mean_copies_and_single_words_are_bounded():
    words = [Pair("games", f"猫{i}", f"cat{i}") for i in range(300)]
    config = CorpusConfig(weights={"games": 2.5, "manual (en)": 0.5}, one_word_weight=0.25)
    drawn = mix([*PAIRS, *words], LINES, config)
    counts = Counter(document.segments[0] for document in drawn)
    sentences = [counts["<|en|>", pair.en] for pair in PAIRS] + [counts["<|zh|>", pair.zh] for pair in PAIRS]
    assert set(sentences) == {2, 3} and 2.4 < np.mean(sentences) < 2.6
    assert 0.2 < np.mean([counts["<|en|>", pair.en] for pair in words]) < 0.3
    assert 30 < sum(counts["<|text|>", line.text] for line in LINES) < 70


@pytest.mark.parametrize(
    "direction, first_segments", [("en-zh", {"<|en|>"}), ("zh-en", {"<|zh|>"}), (None, {"<|en|>", "<|zh|>"})]
)
def test_a_source_with_a_direction_is_read_that_way_alone(direction, first_segments):
    other = Pair("manual", "另一本书", "another book")
    directions = {} if direction is None else {"games": direction}
    drawn = mix([*PAIRS, other], [], CorpusConfig(directions=directions))
    games = [document for document in drawn if document.source == "games"]
    assert {document.segments[0][0] for document in games} == first_segments
    assert len(games) == len(PAIRS) * len(first_segments) and len(drawn) - len(games) == 2


def test_mixture_depends_on_the_seed_alone():
    one, same, other = (mix(PAIRS, LINES, CorpusConfig(seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other and Counter(one) == Counter(other)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    corpus = Corpus(PAIRS, [Pair("games", "一条狗", "one dog")], LINES, [Line("zh", "poems", "床前明月光")])
    write_corpus(corpus, folder)
    meta = write_token_files(corpus, CorpusConfig(vocab_size=400, fim_rate=0.5), folder, lambda name, event: None)
    return folder, meta


def test_packed_files_are_documents_end_to_end(built):
    folder, meta = built
    tokenizer = Tokenizer.from_folder(folder)
    tokens = np.fromfile(folder / "train.bin", dtype=DTYPE)
    starts, ends = np.flatnonzero(tokens == tokenizer.bos_id), np.flatnonzero(tokens == tokenizer.eos_id)
    assert starts[0] == 0 and ends[-1] == len(tokens) - 1 and list(starts[1:]) == list(ends[:-1] + 1)
    assert meta["train_tokens"] == len(tokens) == sum(row["tokens"] for row in meta["sources"].values())
    assert meta["sources"]["games"]["documents"] == 2 * len(PAIRS)
    assert (meta["dtype"], meta["vocab_size"]) == ("uint16", tokenizer.vocab_size)


def test_a_given_tokenizer_is_not_learnt_anew(built, tmp_path):
    corpus = Corpus(PAIRS, PAIRS[:1], LINES, LINES[:1])
    config = CorpusConfig(vocab_size=400, tokenizer=str(built[0]))
    (tmp_path / "other").mkdir()
    meta = write_token_files(corpus, config, tmp_path / "other", lambda name, event: None)
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (built[0] / "tokenizer.json").read_bytes()
    assert meta["tokenizer_sha256"] == built[1]["tokenizer_sha256"]
    with pytest.raises(SoliError, match=r"no tokenizer\.json"):
        write_token_files(corpus, CorpusConfig(tokenizer=str(tmp_path / "none")), tmp_path, lambda name, event: None)


def test_a_tokenizer_that_is_not_there_is_noticed_before_anything_is_fetched(tmp_path):
    with pytest.raises(SoliError, match=r"no tokenizer\.json"):
        build_data(CorpusConfig(tokenizer=str(tmp_path / "none")), tmp_path / "out", tmp_path / "cache", print)
    assert not (tmp_path / "out").exists()


def test_documents_are_framed_as_prompts_are(built):
    tokenizer = Tokenizer.from_folder(built[0])
    (_, forward), (_, back) = encode_by_source(heldout_documents(PAIRS[:1], []), tokenizer)
    prompt = tokenizer.translation_prompt(PAIRS[0].en, "zh")
    assert forward[: len(prompt)] == prompt and forward[-1] == tokenizer.eos_id
    prompt = tokenizer.translation_prompt(PAIRS[0].zh, "en")
    assert back == [*prompt, *tokenizer.encode(PAIRS[0].en), tokenizer.eos_id]


def test_heldout_documents_are_complete_and_in_order(built):
    folder, meta = built
    tokens = np.fromfile(folder / "valid.bin", dtype=DTYPE)
    text = Tokenizer.from_folder(folder).decode(tokens)
    assert text == "one dog一条狗一条狗one dog床前明月光"
    assert meta["valid_sources"]["poems (zh)"]["documents"] == 1


def test_inspection_shows_documents_as_they_are_trained_on(built):
    inspection = inspect_folder(built[0], samples=5, seed=1)
    assert len(inspection["samples"]) == 5
    assert all(
        sample["text"].startswith(("<|en|>", "<|zh|>", "<|text|>", "<|fim_prefix|>"))
        for sample in inspection["samples"]
    )
    assert inspection["document_tokens"]["median"] <= inspection["document_tokens"]["longest"]
    assert set(inspection["characters_per_token"]) == {"en", "zh"}
    assert inspect_folder(built[0], samples=0, seed=0)["samples"] == []


def test_damaged_folders_are_rejected(built, tmp_path):
    with pytest.raises(SoliError, match="holds no packed tokens"):
        read_meta(tmp_path)
    for name in ("meta.json", "tokenizer.json", "train.bin", "valid.bin"):
        (tmp_path / name).write_bytes((built[0] / name).read_bytes())
    (tmp_path / "train.bin").write_bytes(b"\0" * 20)
    with pytest.raises(SoliError, match=r"train.bin holds 10 tokens, not"):
        read_meta(tmp_path)
    (tmp_path / "train.bin").unlink()
    with pytest.raises(SoliError, match=r"train.bin is missing"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"train_tokens": 3}))
    with pytest.raises(SoliError, match=r"meta.json is damaged"):
        read_meta(tmp_path)
