"""Cleaning rules: what is dropped, what is accepted, how paragraphs are split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.data.text import comparison_key
from soli.recipes.nano_corpus import cleaning
from soli.recipes.nano_corpus.splitting import cut


@pytest.mark.parametrize(
    ("zh", "en"),
    [
        ("打开 %s", "Open %s"),
        ("打开 %1$s", "Open %1$s"),
        ("打开 {name}", "Open {name}"),
        ("打开 $file", "Open $file"),
        ("<b>打开</b>", "<b>Open</b>"),
        ("见 https://a.b", "See https://a.b"),
        ("Open the file", "Open the file"),  # untranslated
        ("打开文件", "打开文件"),
        ("打开 the whole file", "Open the whole file"),  # mostly Latin
        ("好", "A sentence that says much more than one Chinese character ever could say"),
        ("这一句话说得太多太多了，远远超过英文所说的内容", "Yes"),
        ("好" * 300, "x " * 400),  # too long for a small window
        ("", "Open"),
        ("打开", ""),
    ],
)
def test_pairs_that_are_dropped(zh, en):
    assert not cleaning.is_translation(zh, en)


@pytest.mark.parametrize(
    ("zh", "en"),
    [("打开文件", "Open file"), ("猫", "cat"), ("100% 棉", "100% cotton"), ("LibreOffice 宏", "LibreOffice macro")],
)
def test_pairs_that_are_accepted(zh, en):
    assert cleaning.is_translation(zh, en)


def test_a_dictionary_may_explain_a_word_at_length():
    definition = "Priory of Zion (fictional masonic order), a secret society in novels"
    assert cleaning.is_translation("锡安", definition, dictionary=True)
    assert not cleaning.is_translation("锡安", definition)


@pytest.mark.parametrize(
    ("marked", "plain"),
    [("_Add...", "Add..."), ("添加(_A)...", "添加..."), ("~File", "File"), ("文件（&F）", "文件"), ("E_xit", "Exit")],
)
def test_accelerators_are_removed(marked, plain):
    assert cleaning.without_accelerators(marked) == plain


def test_tidy_leaves_one_clean_line():
    assert cleaning.tidy(" a&amp;b\t\u200b c\n\u0000d\u00ad ") == "a&b c d"


def test_sentences_keep_closing_marks_and_abbreviations():
    assert cleaning.sentences_zh("他说：「好。」然后走了。真的！！") == ["他说：「好。」", "然后走了。", "真的！！"]
    assert cleaning.sentences_en('Ask Dr. Who. "Why?" He left, e.g. Home.') == [
        "Ask Dr. Who.",
        '"Why?"',
        "He left, e.g. Home.",
    ]


def test_paragraphs_are_split_only_where_both_sides_agree():
    assert cleaning.align("一只猫。一条狗。", "A cat. A dog.") == [("一只猫。", "A cat."), ("一条狗。", "A dog.")]
    assert cleaning.align("一只猫，一条狗。", "A cat. A dog.") == [("一只猫，一条狗。", "A cat. A dog.")]


@given(st.text(alphabet="aB .!?。！」\"'中文", max_size=80))
def test_splitting_loses_no_character(written):
    for split in (cleaning.sentences_zh, cleaning.sentences_en):
        assert "".join("".join(split(written)).split()) == "".join(written.split())
    assert "".join("".join(cut(written, 20)).split()) == "".join(written.split())


def test_cut_keeps_parts_short_and_sentences_complete():
    pieces = cut("One sentence here. Another sentence here. A third one here.", 45)
    assert pieces == ["One sentence here. Another sentence here.", "A third one here."]


def test_the_comparison_key_ignores_case_spaces_and_the_closing_stop():
    assert comparison_key("Click  OK.") == comparison_key("click ok") != comparison_key("click not ok")
    assert comparison_key("你好。") == comparison_key("你 好")
