"""Input files: every kind of bad line is named with its number, good lines are read, unreadable files are named."""

import json
import sys

import pytest

from soli.data.entries import BLANK, BadLine
from soli.data.readers import InputLayout, files_of, read_file
from soli.errors import SoliError

PAIR = InputLayout(("en", "zh"))


def rows(path, layout=None):
    """(line, texts) of entries and (line, reason) of bad lines."""
    layout = layout or InputLayout()
    form, files = files_of(path, layout)
    read = [row for file in files for row in read_file(file, form, layout)]
    return [(row.line, row.reason if isinstance(row, BadLine) else row.texts) for row in read]


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD_JSON = [
    (b"{broken", "not JSON: Expecting property name enclosed in double quotes at character 2"),
    (b"[1, 2]", "not a JSON object but list"),
    (b'{"title": "x"}', "no text"),
    (b'{"text": null}', "no text"),
    (b'{"text": 7}', "text is not text but int"),
    (b'{"text": " \\n"}', "text is empty"),
    (b'{"text": "\\ud800"}', "text holds half a surrogate pair, which is no character"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14 of the line"),
    (b"", BLANK),
    (b"[" * 200_000, "JSON that cannot be read"),
    (b'{"text": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_JSON)
def test_a_bad_json_line_is_named_and_the_next_is_read(tmp_path, line, reason):
    path = written(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\r\n{"text": " two"}')
    first, bad, last = rows(path)
    assert (first, last) == ((1, ("one",)), (3, (" two",)))
    assert bad[0] == 2 and bad[1].startswith(reason)


def test_json_fields_by_name_and_inside_objects(tmp_path):
    path = written(
        tmp_path / "a.jsonl", '\ufeff{"translation": {"en": "cat", "zh": "猫"}, "a.b": "dotted"}\n{"a.b": "x"}'
    )
    assert rows(path, InputLayout(("translation.en", "translation.zh"))) == [
        (1, ("cat", "猫")),
        (2, "no translation.en"),
    ]
    assert rows(path, InputLayout(("a.b",))) == [(1, ("dotted",)), (2, ("x",))]


def test_tsv_by_name_and_by_number(tmp_path):
    path = written(tmp_path / "a.tsv", 'en\tzh\nthe "cat"\t猫\none column\n\ndog\t\nx\ty\tz\n')
    bad = [(3, "1 columns, not 2"), (4, BLANK), (5, "zh is empty"), (6, "3 columns, not 2")]
    assert rows(path, PAIR) == [(2, ('the "cat"', "猫")), *bad]
    assert rows(path, InputLayout(("2",)))[:2] == [(1, ("zh",)), (2, ("猫",))]
    with pytest.raises(SoliError, match=r"a\.tsv has no column text; it has en, zh"):
        rows(path)
    with pytest.raises(SoliError, match="2 columns, none is number 3"):
        rows(path, InputLayout(("3",)))


def test_plain_text_by_file_and_by_line(tmp_path):
    path = written(tmp_path / "a.txt", b"one\r\n\r\ntwo\xff\nthree\n")
    assert rows(path) == [(3, "not UTF-8")]
    assert rows(path, InputLayout(lines=True)) == [
        (1, ("one",)),
        (2, BLANK),
        (3, "not UTF-8 at byte 4 of the line"),
        (4, ("three",)),
    ]
    assert rows(written(tmp_path / "b.txt", "\n a\n\nb\n")) == [(1, (" a\n\nb",))]
    assert rows(written(tmp_path / "c.txt", "\n")) == [(1, "empty file")]
    with pytest.raises(SoliError, match="has no columns for --pair"):
        rows(path, PAIR)


def test_folders_hold_one_kind_in_a_stable_order(tmp_path):
    for name in ("b.txt", "deep/a.txt", "a.txt", ".hidden/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, name)
    assert [texts for _, texts in rows(tmp_path)] == [("a.txt",), ("b.txt",), ("deep/a.txt",)]
    written(tmp_path / "c.jsonl", '{"text": "json"}')
    assert rows(tmp_path, InputLayout(format="jsonl")) == [(1, ("json",))]
    with pytest.raises(SoliError, match="jsonl files: choose with --format"):
        rows(tmp_path)
    with pytest.raises(SoliError, match="no file of a known kind"):
        rows(tmp_path, InputLayout(format="tsv"))


def test_what_cannot_be_an_input_is_rejected_in_a_sentence(tmp_path):
    with pytest.raises(SoliError, match="does not exist"):
        rows(tmp_path / "nowhere.txt")
    path = written(tmp_path / "a.log", "x")
    with pytest.raises(SoliError, match=r"of no known kind .* name its format with --format"):
        rows(path)
    assert rows(path, InputLayout(format="text")) == [(1, ("x",))]
    with pytest.raises(SoliError, match="choose one of jsonl"):
        InputLayout(format="xml")
    with pytest.raises(SoliError, match="a field's name is empty"):
        InputLayout(("",))


def test_parquet_rows(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = pa.array([b"one", b"caf\xe9", None, b"", "四".encode()]).cast(pa.string(), safe=False)
    numbers = pa.array(range(5))
    kinds = pa.array(["x"] * 5).dictionary_encode()
    inner = pa.array([{"en": "cat", "zh": "猫"}] * 4 + [None])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts, "n": numbers, "kind": kinds, "translation": inner}), path)
    assert rows(path) == [
        (1, ("one",)),
        (2, "text is not UTF-8"),
        (3, "no text"),
        (4, "text is empty"),
        (5, ("四",)),
    ]
    assert rows(path, InputLayout(("kind",)))[0] == (1, ("x",))
    pairs = rows(path, InputLayout(("translation.en", "translation.zh")))
    assert pairs[0] == (1, ("cat", "猫")) and pairs[4] == (5, "no translation.en")
    for field, words in (("n", "holds int64, not text"), ("body", "no column body; it has text"), ("n.a", "no column")):
        with pytest.raises(SoliError, match=words):
            rows(path, InputLayout((field,)))
    with pytest.raises(SoliError, match="cannot be read"):
        rows(written(tmp_path / "b.parquet", b"PAR1 not parquet"))


def test_saved_datasets(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    names = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    for name, texts in zip(names, (["one", None], ["three"]), strict=True):
        table = pa.table({"text": texts})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    assert rows(folder) == [(1, ("one",)), (2, "no text"), (3, ("three",))]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(SoliError, match=r"holds several splits: give one, as in .*train"):
        rows(tmp_path / "saved")
    for changed, words in (
        ({"_indices_files": [{"filename": "i.arrow"}]}, "selects its rows by an index"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, "outside its folder"),
        ({"_data_files": 3}, "not the state of a saved dataset"),
    ):
        (folder / "state.json").write_text(json.dumps(state | changed))
        with pytest.raises(SoliError, match=words):
            rows(folder)


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SoliError, match=r"needs pyarrow: pip install pyarrow$"):
        rows(written(tmp_path / "a.parquet", b""))
