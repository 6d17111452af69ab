"""Parquet files and saved Hugging Face `datasets` folders, read batch by batch with pyarrow, an optional package.

Nothing is downloaded and the `datasets` library is not needed: such a folder is Arrow streams and a state.json that
names them. Rejects a damaged file, a column that is missing or not text, and rows selected by an index file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from soli.data.entries import BadLine, TextEntry, missing_column, text_entry
from soli.errors import SoliError
from soli.input_files import open_regular, read_object
from soli.sections import is_text, shown

_BATCH_ROWS = 1024


def read_parquet(path: Path, fields: Sequence[str]) -> Iterator[TextEntry | BadLine]:
    """Rows of a parquet file, numbered from 1."""
    pyarrow = _pyarrow(path)
    open_regular(path).close()  # pyarrow would wait for a FIFO
    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        columns = sorted({_column_of(path, file.schema_arrow, field) for field in fields})
        first = 1
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            yield from _rows(path, batch, fields, first)
            first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def read_dataset(folder: Path, fields: Sequence[str]) -> Iterator[TextEntry | BadLine]:
    """Rows of a folder that `Dataset.save_to_disk` wrote, numbered from 1 through all its files."""
    pyarrow = _pyarrow(folder)
    first = 1
    for path in _streams(folder):
        open_regular(path).close()
        try:
            with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
                for batch in stream:
                    yield from _rows(path, batch, fields, first)
                    first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise SoliError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    return pyarrow


def _damaged(path: Path, error: Exception) -> SoliError:
    return SoliError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): write or copy it again")


def _streams(folder: Path) -> list[Path]:
    """The Arrow files that state.json names, all of them inside the folder."""
    path = folder / "state.json"
    state = read_object(path)
    entries: Any = state.get("_data_files")
    is_list = isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)
    names: list[Any] = [entry.get("filename") for entry in entries] if is_list else []
    if not names or not all(map(is_text, names)):
        raise SoliError(
            f"{path} is not the state of a saved dataset (_data_files is {shown(entries)}, no list of objects with a "
            "filename): save it to disk again"
        )
    indexed = state.get("_indices_data_files") or state.get("_indices_files")
    if indexed:
        raise SoliError(f"{folder} selects its rows by an index: call flatten_indices() and save it to disk again")
    if any(not name or Path(name).name != name for name in names):
        raise SoliError(f"{path} names files outside its folder: save the dataset to disk again")
    return [folder / name for name in names]


def _column_of(path: Path, schema: Any, field: str) -> str:
    """The column that holds a field: the field itself, or the part before its first dot."""
    for name in (field, field.partition(".")[0]):
        if name in schema.names:
            return str(name)
    raise missing_column(path, field, schema.names)


def _rows(path: Path, batch: Any, fields: Sequence[str], first: int) -> Iterator[TextEntry | BadLine]:
    for number, values in enumerate(zip(*(_cells(path, batch, field) for field in fields), strict=True), first):
        yield text_entry(number, fields, values, values)


def _cells(path: Path, batch: Any, field: str) -> list[object]:
    """One field of a batch: text, None where there is none, bytes where it is not UTF-8."""
    import pyarrow

    column_name = _column_of(path, batch.schema, field)
    column = batch.column(column_name)
    for name in field[len(column_name) + 1 :].split(".") if field != column_name else ():
        members = [column.type.field(i).name for i in range(column.type.num_fields)]
        if not pyarrow.types.is_struct(column.type) or name not in members:
            raise missing_column(path, field, members or batch.schema.names)
        column = pyarrow.compute.struct_field(column, name)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise SoliError(f"{path}: column {field} holds {column.type}, not text: choose another with --field")
    return [_decoded(cell) for cell in column.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(cell: bytes | None) -> str | bytes | None:
    try:
        return None if cell is None else cell.decode("utf-8")
    except UnicodeDecodeError:
        return cell
