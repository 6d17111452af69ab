"""Input files of a user, read line by line: JSON lines, tab-separated columns, plain text, parquet, `datasets` folders.

A reader yields a TextEntry for each usable line and a BadLine for any other: broken JSON, a missing field, invalid
UTF-8, an empty text, another number of columns. It holds one line (or one batch of a parquet file) at a time. What
cannot be read at all is a SoliError that names the file: an unknown format, a missing column, mostly bad lines.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from soli.data.arrow import read_dataset, read_parquet
from soli.data.entries import BLANK, EXCERPT_CHARACTERS, BadLine, BadLineLog, TextEntry, missing_column, text_entry
from soli.errors import SoliError
from soli.input_files import open_regular, read_bytes, read_line

FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
}
KNOWN_SUFFIXES = ", ".join(FORMAT_OF_SUFFIX)
LONGEST_LINE = 2**26  # bytes; a longer one is a bad line
LONGEST_DOCUMENT = 2**30  # bytes of a plain text that is one document
FORMATS = (*dict.fromkeys(FORMAT_OF_SUFFIX.values()), "datasets")


@dataclass(frozen=True)
class InputLayout:
    """How inputs are read. `fields` are names (a dot reaches inside), or, in TSV without a header, numbers from 1.

    `lines`: in plain text each line is a document, not each file. `format` overrides the one of a file's suffix.
    """

    fields: tuple[str, ...] = ("text",)
    lines: bool = False
    format: str | None = None

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise SoliError(f"format is {self.format!r}: choose one of {', '.join(FORMATS)}")
        if not all(field.strip() for field in self.fields):
            raise SoliError("a field's name is empty: write --field NAME, or --pair ENGLISH,CHINESE")


def files_of(path: Path, layout: InputLayout) -> tuple[str, list[Path]]:
    """The format of an input and its files in a stable order: itself, or what a folder holds."""
    if not path.exists():
        raise SoliError(f"{path} does not exist: give files or folders of text")
    if not path.is_dir():
        return layout.format or _format_of(path), [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        raise SoliError(f"{path} holds several splits: give one, as in {path / (splits or ['train'])[0]}")
    if (path / "state.json").is_file():
        return "datasets", [path]
    return _folder(path, layout)


def _folder(path: Path, layout: InputLayout) -> tuple[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue  # hidden, or an output that is being written there
        name = FORMAT_OF_SUFFIX.get(file.suffix.lower())
        if name is not None and file.is_file() and layout.format in (None, name):
            files.setdefault(name, []).append(file)
    if len(files) != 1:
        content = f"{' and '.join(files)} files: choose with --format" if files else "no file of a known kind"
        raise SoliError(f"{path} holds {content} ({KNOWN_SUFFIXES})")
    return next(iter(files.items()))


def _format_of(path: Path) -> str:
    name = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if name is None:
        raise SoliError(f"{path} is of no known kind ({KNOWN_SUFFIXES}): name its format with --format")
    return name


def usable_entries(path: Path, layout: InputLayout, log: BadLineLog) -> Iterator[TextEntry]:
    """Entries of an input's files in order, without its bad lines, which go to `log`.

    SoliError when more than half of a file's lines are bad (of an input's files, where each is one document). Blank
    lines do not count towards that half.
    """
    form, files = files_of(path, layout)
    document_per_file = form == "text" and not layout.lines
    for group in [files] if document_per_file else [[file] for file in files]:
        lines = faults = 0
        for file in group:
            for row in read_file(file, form, layout):
                lines += 1
                if isinstance(row, BadLine):
                    faults += row.reason != BLANK
                    log.add(file, row)
                else:
                    yield row
        if 2 * faults > lines:
            name = path if document_per_file else group[0]
            raise SoliError(
                f"{name}: {faults:,} of {lines:,} {'files' if document_per_file else 'lines'} are bad, more than half: "
                "check that --field, --pair and --format fit the file"
            )


def read_file(path: Path, form: str, layout: InputLayout) -> Iterator[TextEntry | BadLine]:
    """Entries and bad lines of one file (or `datasets` folder) of a format, in order."""
    if form == "text":
        if len(layout.fields) != 1:
            raise SoliError(f"{path} is plain text, which has no columns for --pair: give JSONL, TSV or parquet")
        return _lines(path) if layout.lines else _document(path)
    if form == "jsonl":
        return _read_jsonl(path, layout.fields)
    if form == "tsv":
        return _read_tsv(path, layout.fields)
    return (read_parquet if form == "parquet" else read_dataset)(path, layout.fields)


def _lines(path: Path) -> Iterator[TextEntry | BadLine]:
    """Each line of a file without its ending; a leading byte order mark is dropped."""
    with open_regular(path) as raw:
        for number, line in enumerate(iter(lambda: read_line(raw, path, LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = read_line(raw, path, LONGEST_LINE)
                yield BadLine(number, f"longer than {LONGEST_LINE:,} bytes")
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                excerpt = line[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
                yield BadLine(number, f"not UTF-8 at byte {error.start + 1} of the line", excerpt)
                continue
            yield TextEntry(number, (text,)) if text.strip() else BadLine(number, BLANK)


def _document(path: Path) -> Iterator[TextEntry | BadLine]:
    """A whole file as one document, without blank lines around it."""
    data = read_bytes(path, LONGEST_DOCUMENT)
    try:
        text = data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        yield BadLine(data.count(b"\n", 0, error.start) + 1, "not UTF-8")
        return
    yield TextEntry(1, (text,)) if text.strip() else BadLine(1, "empty file")


def _read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[TextEntry | BadLine]:
    for row in _lines(path):
        yield row if isinstance(row, BadLine) else _parse(row.line, row.texts[0], fields)


def _parse(line: int, text: str, fields: Sequence[str]) -> TextEntry | BadLine:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return BadLine(line, f"not JSON: {error.msg} at character {error.pos + 1}", text[:EXCERPT_CHARACTERS])
    except (RecursionError, ValueError) as error:  # nested thousands deep; a number of thousands of digits
        return BadLine(line, f"JSON that cannot be read: {error}", text[:EXCERPT_CHARACTERS])
    if not isinstance(value, dict):
        return BadLine(line, f"not a JSON object but {type(value).__name__}", text[:EXCERPT_CHARACTERS])
    return text_entry(line, fields, [_field(value, name) for name in fields], text)


def _field(row: dict[str, object], name: str) -> object:
    """The value of a field; `a.b` is the key `a.b` if there is one, else the key `b` of the object `a`."""
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first) if dot else None
    return _field(inner, rest) if isinstance(inner, dict) else None


def _read_tsv(path: Path, fields: Sequence[str]) -> Iterator[TextEntry | BadLine]:
    """Columns by number (no header line), or by name (the first line holds names). Quotes are ordinary characters."""
    numbered = all(field.isdecimal() for field in fields)
    indices: list[int] | None = None
    width = 0
    for row in _lines(path):
        if isinstance(row, BadLine):
            yield row
            continue
        cells = row.texts[0].split("\t")
        if indices is None:
            indices, width = _column_indices(path, cells, fields, numbered), len(cells)
            if not numbered:
                continue
        if len(cells) != width:
            yield BadLine(row.line, f"{len(cells)} columns, not {width}", row.texts[0][:EXCERPT_CHARACTERS])
        else:
            yield text_entry(row.line, fields, [cells[index] for index in indices], row.texts[0])


def _column_indices(path: Path, cells: Sequence[str], fields: Sequence[str], numbered: bool) -> list[int]:
    for field in fields:
        if numbered and not 1 <= int(field) <= len(cells):
            raise SoliError(f"{path} has {len(cells)} columns, none is number {field}: count them from 1")
        if not numbered and field not in cells:
            raise missing_column(path, field, cells)
    return [int(field) - 1 if numbered else cells.index(field) for field in fields]
