"""Verbs that write on a disk that is full, or that fails: one sentence with the file, and nothing half written."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from soli.analysis.figure import new_figure, save_figure
from soli.cli import main
from soli.cli._shared.text_input import file_texts
from soli.data.readers import InputLayout, read_file
from soli.errors import SoliError
from soli.input_files import read_lines
from tests.serve.live import live
from tests.serve.test_bench import stub_server

PACK = ("data", "pack", "{}/texts.jsonl", "--tokenizer", "nano", "--heldout-every", "5", "--out", "{}/out/packed")
COMMANDS = {
    "texts": PACK,
    "bad lines": (*PACK[:2], "{}/bad.jsonl", *PACK[3:]),
    "pairs": (*PACK, "--pair", "en,zh"),
    "a model": ("convert", "nano", "{}/out/model", "--to", "fp8"),
    "a plot": ("train", "nano-zh-en", "--dry-run", "--no-measure", "--plot", "{}/out/plan.png"),
}


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file may have more than 2,000 bytes, whose error has no file's name, like that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written_is_named_and_leaves_nothing(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    rows = [json.dumps({"text": f"text {n}", "en": f"line {n}", "zh": f"第{n}行"}) for n in range(2000)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    (tmp_path / "bad.jsonl").write_text("no object\n" * 2000)
    (tmp_path / "out").mkdir()
    request.getfixturevalue("file_limit")
    assert main([part.replace("{}", str(tmp_path)) for part in COMMANDS[name]]) == 1
    sentences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("soli: ")]
    assert len(sentences) == 1 and "File too large" in sentences[0] and str(tmp_path / "out") in sentences[0]
    assert not list((tmp_path / "out").iterdir())


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save_figure(new_figure(1, 1), tmp_path / "plot.png")
    before = (tmp_path / "plot.png").read_bytes()
    request.getfixturevalue("file_limit")
    with pytest.raises(SoliError, match=r"plot\.png cannot be written"):
        save_figure(new_figure(9, 9), tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
@pytest.mark.parametrize("command", [("count", "nano"), ("count", "nano", "--json"), ("--version",), ("train", "-h")])
def test_a_full_standard_output_is_one_sentence(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "soli", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("soli: standard output, or a file, cannot be written (No space left on device)")


def test_a_file_that_fails_while_it_is_read_is_named() -> None:
    """/proc/self/mem can be opened, and fails when it is read, as a file on a broken disk."""
    memory = "/proc/self/mem"
    readers = (
        lambda: file_texts(memory),
        lambda: list(read_lines(memory)),
        lambda: list(read_file(Path(memory), "jsonl", InputLayout(("text",)))),
    )
    for read in readers:
        with pytest.raises(SoliError, match="cannot be read") as raised:
            read()
        assert memory in str(raised.value)


def test_results_are_printed_before_they_are_written(capsys: pytest.CaptureFixture) -> None:
    """What took long to measure is not lost with the folder that was to take it."""
    with live(stub_server()) as url:
        options = ["--rates", "100", "--requests", "2", "--out", "/nonexistent/load"]
        assert main(["bench", "serve", url, *options]) == 1
    captured = capsys.readouterr()
    assert "tokens/s" in captured.out and "/nonexistent/load.png cannot be written" in captured.err
