"""Each source of interface texts reads a package of a few lines: what it takes, joins and leaves."""

import io
import json
import struct
import zipfile

import pytest

from soli.errors import SoliError
from soli.recipes.nano_corpus.sources import SOURCES, android, browsers, gettext, locale_files, program_texts
from tests.recipes.archives import compiled_messages, wheel


def pairs(rows):
    return [(row.zh, row.en) for row in rows]


def resource_pack(texts):
    header = struct.pack("<IBxxxHH", 5, 1, len(texts), 0)
    start, entries, strings = 12 + 6 * (len(texts) + 1), b"", b""
    for number, text in texts.items():
        entries += struct.pack("<HI", number, start + len(strings))
        strings += text.encode()
    return header + entries + struct.pack("<HI", 0, start + len(strings)) + strings


def zipped(members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return content.getvalue()


def chunk(kind, header, body):
    return struct.pack("<HHI", kind, 8 + len(header), 8 + len(header) + len(body)) + header + body


def string_pool(strings):
    encoded = [text.encode() for text in strings]
    bodies = [bytes((len(text), len(data))) + data + b"\0" for text, data in zip(strings, encoded, strict=True)]
    offsets = [sum(map(len, bodies[:n])) for n in range(len(bodies))]
    header = struct.pack("<5I", len(strings), 0, 1 << 8, 28 + 4 * len(strings), 0)
    return chunk(android.STRING_POOL, header, struct.pack(f"<{len(strings)}I", *offsets) + b"".join(bodies))


def resource_type(language, values, flags=0):
    """One type's entries; a value None is missing, a negative one stands for a compound entry."""
    config = struct.pack("<I4x4s", 64, language.encode().ljust(4, b"\0")).ljust(64, b"\0")
    offsets, entries = [], b""
    for value in values:
        offsets.append(0xFFFFFFFF if value is None else len(entries))
        if value is not None:
            entries += struct.pack("<HHIHBBI", 8, int(value < 0), 0, 8, 0, 3, abs(value))
    header = struct.pack("<BBHII", 1, flags, 0, len(values), 8 + 12 + 64 + 4 * len(values)) + config
    return chunk(android.TYPE, header, struct.pack(f"<{len(values)}I", *offsets) + entries)


def test_chromium_pairs_texts_of_one_number(tmp_path):
    folder = "usr/lib/chromium/locales/"
    packs = {"en-US": {7: "&Open file", 9: "Yes"}, "zh-CN": {7: "打开文件(&O)", 8: "多"}, "zh-TW": {7: "開啟檔案"}}
    members = {f"{folder}{language}.pak": resource_pack(texts) for language, texts in packs.items()}
    rows = [(zh, en) for zh, en in pairs(browsers.read_chromium([wheel(tmp_path / "a.whl", members)])) if en]
    assert rows == [("打开文件", "Open file"), ("打开文件", "Open file")]


def test_a_resource_pack_of_another_version_is_rejected():
    with pytest.raises(SoliError, match=r"x\.pak is not a resource pack of version 5"):
        browsers.read_pak(struct.pack("<IBxxxHH", 4, 1, 0, 0), "x.pak")


def test_fluent_joins_lines_and_leaves_selectors_out():
    text = "# note\na = One\n    two\n-b = Brand\n    .title = T\n"
    text += "c =\n    { $n ->\n        [one] x\n       *[other] y\n    }\n"
    assert list(browsers.parse_fluent(text)) == [("a", "One two"), ("-b", "Brand"), ("-b.title", "T")]


def test_mozilla_pairs_the_program_with_its_language_packs(tmp_path):
    english = {
        "localization/en-US/browser/a.ftl": "hello = Hello\nhello-accesskey = H\n",
        "chrome/en-US/locale/en-US/global/p.properties": "# c\nbye=Good bye\n",
    }
    chinese = {
        "browser/localization/zh-CN/browser/a.ftl": "hello = 你好\nhello-accesskey = H\n",
        "chrome/zh-CN/locale/zh-CN/global/p.properties": "bye=再见\n",
    }
    program = wheel(tmp_path / "a.whl", {"usr/lib/x/browser/omni.ja": zipped(english)})
    pack = wheel(tmp_path / "b.whl", {"usr/lib/x/langpack-zh-CN@x.xpi": zipped(chinese)})
    assert pairs(browsers.read_mozilla([program, pack])) == [("你好", "Hello"), ("再见", "Good bye")]


def test_locale_files_pair_by_file_and_place(tmp_path):
    files = {
        "package/locales/en-US/a.json": {"x": {"y": "Open. Close."}, "list": ["One"], "only": "English"},
        "package/locales/zh-CN/a.json": {"x": {"y": "打开。关闭。"}, "list": ["一"]},
        "package/locales/zh-TW/a.json": {"x": {"y": "軟體。"}},
        "package/locales/zh-CN/b.json": {"only": "别的文件"},
    }
    archive = wheel(tmp_path / "a.whl", {name: json.dumps(tree) for name, tree in files.items()})
    rows = pairs(locale_files.NODE_RED.read([archive]))
    assert rows == [("打开。", "Open."), ("关闭。", "Close."), ("一", "One"), ("软件。", "Open. Close.")]


def test_files_with_the_language_at_their_root(tmp_path):
    files = {"package/dist/locales/en.min.json": {"en": {"a": "Road"}}, "package/dist/locales/zh-CN.min.json": {}}
    files["package/dist/locales/zh-CN.min.json"] = {"zh-CN": {"a": "道路"}}
    files["package/dist/locales/zh-TW.min.json"] = {"zh-TW": {"a": "車道"}}
    archive = wheel(tmp_path / "a.whl", {name: json.dumps(tree) for name, tree in files.items()})
    assert pairs(locale_files.OPENSTREETMAP.read([archive])) == [("道路", "Road")]


def test_yaml_trees_give_one_line_scalars_by_path():
    content = b"a:\n  b: Text # note\n  'c': 'It''s'\n  d: |\n    folded\n  e:\n    f: \"Say \\\"x\\\"\"\n# c\ng: 1\n"
    assert locale_files.parse_yaml_tree(content) == {
        ("a", "b"): "Text",
        ("a", "c"): "It's",
        ("a", "e", "f"): 'Say "x"',
        ("g",): "1",
    }


def test_spoken_names_leave_keywords_out(tmp_path):
    def tree(spoken, keywords):
        return json.dumps({"annotations": {"annotations": {"x": {"default": keywords, "tts": [spoken]}}}})

    members = {"package/annotations/en/annotations.json": tree("dog", ["pet"])}
    members["package/annotations/zh/annotations.json"] = tree("狗", ["宠物"])
    assert pairs(locale_files.read_spoken_names([wheel(tmp_path / "a.whl", members)])) == [("狗", "dog")]


def test_android_reads_the_plain_entries_of_each_language(tmp_path):
    strings = string_pool(["Open", "打开", "開啟", "Compound"])
    types = resource_type("", [0, 3, None, -3]) + resource_type("zhCN", [1, None, 1]) + resource_type("zhTW", [2])
    table = struct.pack("<HHII", android.TABLE, 12, 0, 1) + strings + chunk(android.PACKAGE, b"\0" * 4, types)
    archive = wheel(tmp_path / "a.whl", {"usr/share/x/framework-res.apk": zipped({"resources.arsc": table})})
    rows = [(zh, en) for zh, en in pairs(android.read_android([archive])) if en]
    assert rows == [("打开", "Open"), ("打开", "Open")]


def test_a_table_of_another_kind_is_rejected():
    with pytest.raises(SoliError, match="holds no compiled resource table"):
        android.read_table(b"\x03\x00\x08\x00" + b"\0" * 12, "framework-res.apk")


def test_po_catalogues_skip_fuzzy_entries_and_are_read_where_nothing_is_compiled(tmp_path):
    source = 'msgid ""\nmsgstr "header"\n\n#, fuzzy\nmsgid "Old"\nmsgstr "旧"\n\nmsgctxt "c"\nmsgid "_Add "\n"more"\n'
    source += 'msgstr "添加"\n"更多"\n\nmsgid "cat"\nmsgid_plural "cats"\nmsgstr[0] "猫"\n'
    members = {
        "x/locale/zh_CN/LC_MESSAGES/a.po": source,
        "x/locale/zh_Hant/LC_MESSAGES/b.mo": compiled_messages({"software": "軟體"}),
        "x/locale/zh_Hant/LC_MESSAGES/b.po": 'msgid "software"\nmsgstr "x"\n',
        "x/locale/fr/LC_MESSAGES/a.po": 'msgid "a"\nmsgstr "b"\n',
    }
    rows = pairs(gettext.read_catalogues([wheel(tmp_path / "a.whl", members)]))
    assert rows == [("添加更多", "Add more"), ("猫", "cat"), ("软件", "software")]


def test_vscode_texts_go_by_number(tmp_path):
    listing = 'var content = [\n\tundefined,\n\t"关闭"\n];\n\nexport { content as default };\n'
    pack = wheel(tmp_path / "a.whl", {"package/translations/main.i18n.json.js": listing})
    script = "f(localize(1, \"Close\"), localize(7, 'None'), localize(0, 'A'))"
    code = wheel(tmp_path / "b.whl", {"package/a.js": script})
    assert [(zh, en) for zh, en in pairs(program_texts.read_vscode([pack, code])) if zh] == [("关闭", "Close")]


def test_typescript_and_blockly_messages_go_by_name(tmp_path):
    members = {
        "package/lib/typescript.js": 'x: diag(1, 1 /* Error */, "K_1", "A \\"b\\"."),',
        "package/lib/zh-cn/diagnosticMessages.generated.json": json.dumps({"K_1": "一个“b”。", "other": "无"}),
        "package/msg/en.js": 'Blockly.Msg["A"] = "Add";\n',
        "package/msg/zh-hans.js": 'Blockly.Msg["A"] = "添加";\nBlockly.Msg["B"] = "Alt";  // untranslated\n',
    }
    archive = wheel(tmp_path / "a.whl", members)
    assert pairs(program_texts.read_typescript([archive])) == [("一个“b”。", 'A "b".')]
    assert pairs(program_texts.read_blockly([archive])) == [("添加", "Add")]


def test_sheet_formulas_go_by_the_path_of_nested_objects(tmp_path):
    def script(text, detail):
        inner = f'\t\tabstract: "{text}",\n\t\tp: {{\n\t\t\tdetail: "{detail}"\n\t\t}}\n'
        return f"const locale$1 = {{\n\tSUM: {{\n{inner}\t}}\n}};\n"

    members = {
        "package/lib/es/locale/en-US.js": script("Adds", "A number"),
        "package/lib/es/locale/zh-CN.js": script("求和", "数字"),
    }
    rows = program_texts.read_sheet_formulas([wheel(tmp_path / "a.whl", members)])
    assert pairs(rows) == [("求和", "Adds"), ("数字", "A number")]


def test_renpy_pairs_a_line_with_the_comment_above(tmp_path):
    script = 'translate schinese a:\n\n    # e "Hi {b}there{/b}."\n    e "你好。"\n'
    script += '\n    old "copy"\n    new "复制"\n    e "单独"\n'
    members = {"usr/share/games/renpy/demo/game/tl/schinese/a.rpy": script}
    rows = program_texts.read_renpy([wheel(tmp_path / "a.whl", members)])
    assert pairs(rows) == [("你好。", "Hi there."), ("复制", "copy")]


def test_tencent_pairs_docstrings_of_one_property(tmp_path):
    def module(text):
        return f'class A:\n    @property\n    def B(self):\n        r"""{text}\n        :rtype: str\n        """\n'

    name = "tencentcloud/cvm/v1/models.py"
    archives = [
        wheel(tmp_path / f"{n}.whl", {name: module(text)}) for n, text in enumerate(("镜像<br>列表", "Image list"))
    ]
    assert pairs(program_texts.read_tencent(archives)) == [("镜像列表", "Image list")]


def test_debmake_pairs_paragraphs_of_chapters_with_as_many(tmp_path):
    folder = "usr/share/doc/debmake-doc/html/"
    members = {
        f"{folder}ch1.en.html": "<p>A <b>file</b>.</p><p>Two</p>",
        f"{folder}ch1.zh-cn.html": "<p>文件。</p><p>二</p>",
        f"{folder}ch2.en.html": "<p>One</p>",
        f"{folder}ch2.zh-cn.html": "<p>一</p><p>二</p>",
    }
    rows = program_texts.read_debmake([wheel(tmp_path / "a.whl", members)])
    assert pairs(rows) == [("文件。", "A file."), ("二", "Two")]


def test_graded_sentences(tmp_path):
    content = json.dumps([{"chinese": "您好！", "translation": {"en": "Hello!"}}])
    archive = wheel(tmp_path / "a.whl", {"x/data/sentences.json": content})
    assert pairs(program_texts.read_hsk([archive])) == [("您好！", "Hello!")]


def test_no_source_is_of_a_copyleft_program_and_names_are_unique():
    labels = [source.label for source in SOURCES]
    assert len(set(labels)) == len(labels)
    assert not [source.name for source in SOURCES if "GPL" in source.licence]
