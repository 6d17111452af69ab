"""Files that are written whole or not at all: what was there before a failure, or a kill, is still there after it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from soli.errors import SoliError


def sync(path: Path) -> None:
    """fsync of a file, or of a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """SoliError that names `path` where writing fails, on a full disk for example."""
    try:
        yield
    except OSError as error:
        raise SoliError(
            f"{path} cannot be written ({error.strerror or error}): check the folder's free space and permissions"
        ) from None


def check_space(path: Path, folder: Path, size: int, what: str = "bytes") -> None:
    """SoliError that names `path` where the disk of `folder` has no room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise SoliError(f"{path}: needs {size:,} {what}, but {free:,} bytes are free on that disk")


def remove(path: Path) -> None:
    """Remove a folder with all that it holds, or whatever else has its name, if it is there: a file, a symlink, or a
    FIFO, which `shutil.rmtree` would open and wait for."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(file: Path, content: str | bytes) -> None:
    """Write a hidden draft beside `file` and rename it when every byte is on disk; text as UTF-8.

    SoliError where that fails, on a full disk for example: no draft is left, and `file` is as it was.
    """
    draft = file.with_name(f".{file.name}.partial")
    try:
        with draft.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise SoliError(
            f"{file} cannot be written ({error.strerror or error}); what was there is unchanged: check the folder's "
            "free space and permissions, then run the same command again"
        ) from None
