"""The reader of files that anybody may have written: what it rejects, at once, with file and place."""

import os
import resource
import socket
import time
from pathlib import Path

import pytest

from soli.cli import main
from soli.config import load_config
from soli.errors import SoliError
from soli.input_files import NESTING, parse_json, read_json, read_lines, read_object_if_present

BAD_JSON = {
    "a key twice": (b'{"a": 1,\n "a": 2}', "line 2: .a. is given twice"),
    "a key twice, inside": (b'{"b": [{"a": 1, "a": 1}]}', "given twice"),
    "NaN": (b'{"a":\n NaN}', "line 2: NaN"),
    "an infinity": (b'{"a": -Infinity}', "-Infinity"),
    "a float past the largest": (b'{"a": 1e400}', "1e400 is too large"),
    "400 digits": (b'{"a": ' + b"1" * 400 + b"}", "more than 100 digits"),
    "5000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "more than 100 digits"),
    "400 decimals": (b'{"a": 0.' + b"1" * 400 + b"}", "more than 100 digits"),
    "nested a little too deep": (b"[" * (NESTING + 1) + b"]" * (NESTING + 1), "nested"),
    "nested far too deep": (b"[" * 1_000_000, "nested"),
    "objects nested too deep": (b'{"a":' * 500 + b"1" + b"}" * 500, "nested"),
    "half a surrogate pair": (b'{"a": "\\ud83d"}', "surrogate"),
    "half a surrogate pair in a key": (b'{"\\udc00": 1}', "surrogate"),
    "a second byte order mark": (b"\xef\xbb\xbf\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8 at byte 1"),
    "not UTF-8": (b'{"a": "\xff"}', "UTF-8 at byte 8"),
    "a NUL byte": (b'{"a": "\x00"}', "line 1"),
    "empty": (b"", "line 1"),
    "two documents": (b"{}{}", "line 1"),
    "millions of lists": (b"[" + b"[]," * 5_000_000 + b"[]]", "bytes"),
    "a comment": (b'{"a": 1} // one', "line 1"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_rejected_with_file_and_place(tmp_path: Path, name: str) -> None:
    content, words = BAD_JSON[name]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(SoliError, match=words) as raised:
        read_json(file)
    assert str(file) in str(raised.value) and len(str(raised.value)) < 400
    with pytest.raises(SoliError):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ['{"a": [1, 1e300, null, "\\ud83d\\ude00"]}', "[" * NESTING + "]" * NESTING, '"x"'])
def test_good_json_is_read(text: str) -> None:
    parse_json(text, "here")


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "deepseek_v3"}')
    assert read_json(tmp_path / "config.json") == {"model_type": "deepseek_v3"}
    assert load_config(tmp_path).model_type == "deepseek_v3"


def test_too_many_values_are_rejected_before_they_are_built() -> None:
    start = time.monotonic()
    with pytest.raises(SoliError, match="more than 4,000,000 values"):
        parse_json("[" + "[]," * 5_000_000 + "[]]", "here")
    assert time.monotonic() - start < 1


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


def _gigabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


NO_FILES = {
    "a FIFO": (_fifo, "a FIFO"),
    "a socket": (_socket, "a socket"),
    "a directory": (Path.mkdir, "a directory"),
    "a device without end": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a device without anything": (lambda path: path.symlink_to("/dev/null"), "a device"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "gigabytes": (_gigabytes, "3,221,225,472 bytes"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_small_regular_file_is_rejected_at_once(tmp_path: Path, name: str) -> None:
    make, words = NO_FILES[name]
    file = tmp_path / "config.json"
    make(file)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for read in (read_json, read_object_if_present, load_config):
        with pytest.raises(SoliError, match=words if read is read_json else None) as raised:
            read(file)
        assert str(file) in str(raised.value)
    with pytest.raises(SoliError):
        list(read_lines(file))
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_can_have_are_rejected(name: str) -> None:
    with pytest.raises(SoliError, match="no file can have this name"):
        read_json(name)


def test_an_absent_file_is_empty_only_where_it_may_be_absent(tmp_path: Path) -> None:
    assert read_object_if_present(tmp_path / "none.json") == {}
    with pytest.raises(SoliError, match="No such file"):
        read_json(tmp_path / "none.json")


def test_a_long_line_is_rejected_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"one\n" + b"x" * 5000)
    with pytest.raises(SoliError, match="line 2: is longer than 1,000 bytes"):
        list(read_lines(file, 1000))


FILES_OF_VERBS = {
    "a schema": ["generate", "nano", "hello", "--max-new-tokens", "2", "--json-schema", "{}"],
    "lines of JSON": ["data", "pack", "{}.jsonl", "--tokenizer", "nano", "--out", "{}.out"],
    "a text": ["data", "pack", "{}.txt", "--tokenizer", "nano", "--out", "{}.out"],
    "columns": ["data", "pack", "{}.tsv", "--field", "1", "--tokenizer", "nano", "--out", "{}.out"],
    "parquet": ["data", "pack", "{}.parquet", "--tokenizer", "nano", "--out", "{}.out"],
    "a recipe": ["train", "{}.toml", "--dry-run"],
    "pairs": ["eval", "nano", "--pairs", "{}.tsv"],
    "texts": ["routing", "{}.txt"],
    "a configuration": ["count", "{}.json"],
}


@pytest.mark.parametrize("name", FILES_OF_VERBS)
def test_no_verb_waits_for_a_fifo(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    command = [part.replace("{}", str(tmp_path / "file")) for part in FILES_OF_VERBS[name]]
    fifo = next(part for part in command if part.startswith(str(tmp_path)))
    os.mkfifo(fifo)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert fifo in error and error.count("\n") == 1 and "unexpected" not in error
    assert [path.name for path in tmp_path.iterdir()] == [Path(fifo).name]


@pytest.mark.parametrize(
    "schema",
    ["[" * 5000, '{"maximum": ' + "1" * 400 + "}", '{"maxLength": 1e400}', '{"type": "object", "type": "string"}'],
    ids=("deep", "400 digits", "1e400", "a keyword twice"),
)
def test_a_schema_is_read_as_strictly(tmp_path: Path, schema: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "schema.json").write_text(schema)
    assert main(["generate", "nano", "a", "--json-schema", str(tmp_path / "schema.json")]) == 1
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["count", "nano", "--context", "1" * 400],
        ["train", "nano-zh-en", "--dry-run", "--no-measure", "--devices", "1" * 400],
        ["convert", "nano", "{}", "--to", "bf16", "--shard-gb", "nan"],
        ["convert", "nano", "{}", "--to", "bf16", "--shard-gb", "1e300"],
        ["count", "nano", "--set", "hidden_size=" + "1" * 400],
        ["count", "nano", "--set", "rope_theta=" + "1" * 400],
        ["count", "nano", "--set", "hidden_size=0x" + "f" * 5000],
        ["count", "nano", "--set", "quantization_config=" + "[" * 5000],
        ["train", "nano-zh-en", "--dry-run", "--no-measure", "--set", "schedule.batch_ramp_tokens=1000000000000000"],
    ],
    ids=lambda command: " ".join(command)[:50],
)
def test_numbers_of_the_command_line_are_bounded(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture
) -> None:
    start = time.process_time()
    assert main([part.replace("{}", str(tmp_path / "out")) for part in command]) in (1, 2)
    assert time.process_time() - start < 1
    assert "unexpected" not in capsys.readouterr().err and not list(tmp_path.iterdir())
