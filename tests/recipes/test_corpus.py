"""The split leaks nothing, repeats are bounded, a build restarts, a missing source is refused or named."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.data.text import comparison_key, is_held_out
from soli.errors import SoliError
from soli.recipes.nano_corpus import corpus
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.sources import Source, SourceRow
from soli.recipes.nano_corpus.sources.extra import read_extra

CONFIG = CorpusConfig(heldout_every=4, heldout_books=("ruth",), most_renderings=2)


def source(name, rows, kind="pairs", calls=None):
    def read(archives):
        if calls is not None:
            calls.append(name)
        if rows is None:
            raise SoliError("apt-get is not on this machine")
        yield from rows

    return Source(name, kind, (), read, "none")


def build(sources, tmp_path, config=CONFIG, **options):
    options = {"sources": sources, "everyday": (), **options}
    return corpus.build_corpus(config, tmp_path / "cache", lambda name, event: None, **options)


def numbered(count, stop=""):
    return [SourceRow(f"第{i}只猫坐垫子{stop}", f"Cat number {i} sits on the mat{stop}") for i in range(count)]


def test_no_heldout_text_is_trained_on(tmp_path):
    games = numbered(200)
    verses = [SourceRow(f"路得第{i}节经文在这里", f"Verse {i} of Ruth in one wording", "ruth") for i in range(5)]
    other = [SourceRow(f"路得第{i}节经文在这里", f"Verse {i} of Ruth, another wording", "ruth2") for i in range(5)]
    twice = [SourceRow(row.zh.upper() + "。", row.en.upper() + ".") for row in games]
    inside = [
        SourceRow(f"{a.zh}。还有{i}句话。", f"{a.en}. There are {i} things more to say.") for i, a in enumerate(games)
    ]
    lines = [SourceRow("", f"It is known. {row.en}. So it is.") for row in games]
    sources = [source("games", games), source("web", verses), source("bbe", other), source("again", twice)]
    built = build([*sources, source("inside", inside), source("lines", lines, "en")], tmp_path)
    assert 20 < len([pair for pair in built.heldout if pair.source == "games"]) < 80
    held = {comparison_key(text) for pair in built.heldout for text in (pair.en, pair.zh)}
    assert {pair.en for pair in built.heldout} >= {row.en for row in verses}
    for pair in built.pairs:
        assert comparison_key(pair.en) not in held and comparison_key(pair.zh) not in held
    texts = [comparison_key(text) for pair in built.pairs for text in (pair.en, pair.zh)] + [
        comparison_key(line.text) for line in built.mono
    ]
    long = {text for text in held if len(text) >= 16}
    assert long and not any(part in text for part in long for text in texts)
    assert any(pair.source == "inside" for pair in built.pairs) and built.mono


def test_heldout_lines_are_not_in_trained_pairs_either(tmp_path):
    rows = [SourceRow("", f"{row.en}. A line of the manual, number {i}.") for i, row in enumerate(numbered(200))]
    built = build([source("games", numbered(200)), source("manual", rows, "en")], tmp_path)
    trained = {comparison_key(pair.en) for pair in built.pairs}
    assert built.mono and trained
    assert not any(part in comparison_key(line.text) for line in built.heldout_mono for part in trained)


def test_renderings_of_one_english_text_stay_together_and_few(tmp_path):
    rows = [SourceRow(f"打开文件{j}的{i}种说法", f"Open file {j}") for j in range(60) for i in "甲乙丙丁"]
    built = build([source("menu", rows)], tmp_path)
    counts = Counter(pair.en for pair in [*built.pairs, *built.heldout])
    assert set(counts.values()) == {2}
    assert not {pair.en for pair in built.pairs} & {pair.en for pair in built.heldout}


def test_repeats_count_once_across_sources(tmp_path):
    built = build([source("a", numbered(40)), source("b", numbered(40, "."))], tmp_path)
    assert {pair.source for pair in [*built.pairs, *built.heldout]} == {"a"}


@given(st.text(max_size=30))
def test_the_side_of_a_text_does_not_depend_on_how_it_is_written(text):
    side = is_held_out(text, 2)
    assert side == is_held_out(f" {text.lower()}. " if text.isascii() else text + "。", 2)


def test_the_side_of_a_text_never_changes():
    assert [n for n in range(40) if is_held_out(f"text {n}", 8)] == [2, 15, 22, 31, 35]


def test_pairs_that_are_no_translations_are_dropped_and_counted_by_rule(tmp_path):
    wrong = [SourceRow("第77只猫坐垫子", "Cat 78 sits on the mat"), SourceRow("打开 Xyzzy 窗口", "Open the window")]
    extra = tmp_path / "own.tsv"
    extra.write_text("own\t打开 Xyzzy 窗口\tOpen the window\nown\t关上所有的窗口\tClose every window\n")
    built = build([source("a", [*numbered(40), *wrong])], tmp_path, extra=read_extra([extra]))
    assert built.dropped == {
        "own": {"before": 2, "latin words": 1},
        "a": {"before": 42, "numbers": 1, "latin words": 1},
    }
    assert not {pair.zh for pair in [*built.pairs, *built.heldout]} & {row.zh for row in wrong}
    corpus.write_corpus(built, tmp_path)
    assert json.loads((tmp_path / "counts.json").read_text())["dropped"] == built.dropped


def test_nothing_is_held_out_of_a_source_read_in_one_direction(tmp_path):
    config = CorpusConfig(heldout_every=4, directions={"one way": "en-zh"})
    sources = [source("games", numbered(40)), source("one way", numbered(80)[40:])]
    built = build(sources, tmp_path, config)
    assert {pair.source for pair in built.heldout} == {"games"}
    assert Counter(pair.source for pair in built.pairs)["one way"] == 40


def test_caps_bound_characters_of_one_source(tmp_path):
    rows = [SourceRow("", f"Sentence number {i} of the manual.") for i in range(200)]
    config = CorpusConfig(caps={"manual (en)": 1000})
    built = build([source("manual", rows, "en")], tmp_path, config)
    assert 950 < sum(len(line.text) for line in [*built.mono, *built.heldout_mono]) < 1100


@pytest.mark.parametrize("table, value", [("weights", 2.0), ("directions", "en-zh"), ("caps", 5)])
def test_unknown_names_in_the_recipe_are_refused(table, value, tmp_path):
    message = rf"\[data.{table}\] names manuel, which is no source: write one of manual"
    with pytest.raises(SoliError, match=message):
        build([source("manual", numbered(3))], tmp_path, CorpusConfig(**{table: {"manuel": value}}))


def test_a_stopped_build_goes_on_from_its_cache(tmp_path):
    calls = []
    first = source("a", numbered(9), calls=calls)
    with pytest.raises(SoliError, match="source b: apt-get is not on this machine"):
        build([first, source("b", None, calls=calls)], tmp_path)
    build([first, source("b", numbered(9, "!"), calls=calls)], tmp_path)
    assert calls == ["a", "b", "b"]
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_missing_sources_are_skipped_only_when_allowed_and_named(tmp_path):
    events = []
    sources = [source("a", numbered(9)), source("b", None), source("c", [])]
    built = corpus.build_corpus(CONFIG, tmp_path, lambda *event: events.append(event), True, sources)
    assert built.skipped == ["b", "c"]
    assert ("b", "skipped: apt-get is not on this machine") in events
    corpus.write_corpus(built, tmp_path)
    assert json.loads((tmp_path / "counts.json").read_text())["skipped"] == ["b", "c"]


def test_files_hold_the_corpus_and_damage_is_named(tmp_path):
    built = build([source("a", numbered(9)), source("m", [SourceRow("", "A line of text.")], "en")], tmp_path)
    corpus.write_corpus(built, tmp_path)
    assert [corpus.Pair(*row) for row in corpus.read_tsv(tmp_path / "pairs.tsv", 3)] == built.pairs
    counts = built.counts()
    assert counts["a"]["pairs"] + counts["a"].get("heldout", 0) == 9
    assert counts["m (en)"]["characters"] == len("A line of text.")
    (tmp_path / "pairs.tsv").write_text("a\tb\n")
    with pytest.raises(SoliError, match=r"pairs.tsv:1 has 2 columns, not 3"):
        list(corpus.read_tsv(tmp_path / "pairs.tsv", 3))
