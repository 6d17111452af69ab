"""What is near to held-out text is not trained on; pairs that come with the recipe or from a person's own files."""

import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.data.documents import Pair
from soli.data.text import comparison_key
from soli.errors import SoliError
from soli.recipes.nano_corpus import corpus
from soli.recipes.nano_corpus.build import build_data
from soli.recipes.nano_corpus.cleaning import is_translation
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.sources import SOURCES, SourceRow
from soli.recipes.nano_corpus.sources.extra import read_extra
from soli.recipes.nano_corpus.sources.included import everyday_pairs
from soli.recipes.nano_corpus.splitting import GRAM, TextIndex, split_pairs, word_runs

CONFIG = CorpusConfig(heldout_every=10**9)
EVERYDAY = [Pair("everyday", "我把大门漆成了蓝色的。", "I painted the old gate of the house blue again.")]


def training(*rows):
    pairs, heldout = split_pairs([("x", SourceRow(zh, en)) for zh, en in rows], EVERYDAY, CONFIG)
    assert heldout == EVERYDAY
    return [(pair.zh, pair.en) for pair in pairs]


def test_the_same_text_in_another_spelling_is_not_trained_on():
    assert training(("别的话", "I PAINTED  the old gate of the house blue again!")) == []
    assert training(("我把大门漆成了蓝色的", "Other")) == []


def test_eight_words_or_characters_in_common_are_too_near():
    assert training(("猫", "We saw he painted the old gate of the house blue then.")) == []  # painted ... blue: 8
    assert training(("他把大门漆成了蓝色", "Other")) == []  # 把大门漆成了蓝色: 8 characters
    far = ("他把大门漆成了红色", "He painted the old gate of the shed blue.")
    assert training(far) == [far]


def test_a_heldout_sentence_inside_a_longer_text_is_found():
    index = TextIndex(["The train leaves at noon."])
    assert index.is_repeated_in("Hurry up. The train leaves at noon. Run!")
    assert not index.is_repeated_in("The train left.")


@given(st.lists(st.sampled_from(["cat", "sat", "mat", "猫"]), max_size=30))
def test_word_runs_are_every_window_of_the_words(words):
    runs = list(word_runs(" ".join(words)))
    assert len(runs) == max(0, len(words) - GRAM + 1)
    assert all(run == tuple(words[start : start + GRAM]) for start, run in enumerate(runs))


def test_the_everyday_pairs_are_500_different_clean_sentences():
    pairs = everyday_pairs()
    assert len(pairs) == len({comparison_key(pair.en) for pair in pairs}) == 500
    assert all(is_translation(pair.zh, pair.en) and pair.source == "everyday" for pair in pairs)


def test_pairs_that_come_with_the_recipe():
    """The sources without packages, each read whole."""
    rows = {source.name: list(source.read([])) for source in SOURCES if not source.packages}
    assert {name: len(pairs) for name, pairs in rows.items()} == {
        "distilled": 20_048,
        "tatoeba-2": 32_535,
        "massive": 16_302,
        "mkqa": 6_719,
        "wiktionary-examples": 5_095,
        "crosswoz-en-human": 3_773,
        "multiwoz-zh-human": 3_622,
        "mgsm": 821,
        "storybooks": 817,
        "xsid": 678,
        "back-translated": 10_638,
    }
    assert all(row.zh and row.en for pairs in rows.values() for row in pairs)


def test_extra_files_bring_their_own_source_names(tmp_path):
    plain, packed = tmp_path / "a.tsv", tmp_path / "b.tsv.xz"
    plain.write_text("mine\t你好，朋友。\tHello, friend.\nmine\t{x}\tPlaceholder {x}\n", encoding="utf-8")
    packed.write_bytes(lzma.compress("theirs\t再见，朋友。\tGood bye, friend.\n".encode()))
    config = CorpusConfig(heldout_every=10**9, weights={"mine": 2.0, "tatoeba-gh": 1.0})
    events = []
    extra = read_extra([plain, packed])
    built = corpus.build_corpus(
        config, tmp_path / "cache", lambda *event: events.append(event), sources=(), extra=extra, everyday=()
    )
    assert [pair.source for pair in built.pairs] == ["mine", "theirs"]
    assert [pair.en for pair in built.pairs] == ["Hello, friend.", "Good bye, friend."]
    assert ("extra", "2 pairs") in events


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\n", r"extra\.tsv:1 has 2 columns: write source, Chinese, English between tabs"),
        (b"a\tb\tc\n\tb\tc\n", r"extra\.tsv:2 has 3 columns"),
        (b"\xff\xfe\tb\tc\n", r"extra\.tsv cannot be read as UTF-8 text"),
    ],
)
def test_an_extra_file_in_another_form_is_rejected(tmp_path, content, message):
    path = tmp_path / "extra.tsv"
    path.write_bytes(content)
    with pytest.raises(SoliError, match=message):
        list(read_extra([path]))
    with pytest.raises(SoliError, match=message):
        build_data(CorpusConfig(), tmp_path / "out", tmp_path / "cache", lambda *event: None, extra=[path])
    assert list(tmp_path.iterdir()) == [path]
