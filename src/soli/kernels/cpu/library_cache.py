"""Which files of the kernel cache are loaded: those that no other user can have written, and that are complete.

A library of the cache runs inside every command. It is loaded when it and its folders belong to this user or to root,
nobody else may write to them, no name on the way from the cache to it is a symlink, and its SHA-256 is the one stored
beside it. What does not pass is compiled again; a folder of another user is not used at all.
"""

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from soli.atomic_file import remove, sync

DIGEST_SUFFIX: Final = ".sha256"
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> None:
    """Make `folder`, writable by this user alone; one of this user's that others could write to is emptied first.

    OSError naming a folder that cannot be used.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)
    status = folder.lstat()
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if own and status.st_mode & _WRITABLE_BY_OTHERS:
        folder.chmod(0o755)
        for path in folder.iterdir():
            remove(path)
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """OSError naming a folder that is a symlink, belongs to another user or can be written by others."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.ENOTDIR, "is a symlink or a file, not a folder", str(folder))
    _check_status(folder, status)


def open_verified(library: Path) -> int:
    """A file descriptor of a library that may be loaded. OSError, naming the file, for one that may not.

    What is behind the descriptor stays what was checked, whatever happens to the name.
    """
    expected = _read_private(Path(f"{library}{DIGEST_SUFFIX}"))
    descriptor = _open_private(library)
    with open(descriptor, "rb", closefd=False) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest.encode() != expected.strip():
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not the file that was compiled", str(library))
    return descriptor


def install(linked: Path, library: Path) -> None:
    """Move a linked library of the same folder to its name, with its digest; after a crash both are whole or one is
    missing."""
    digest = linked.with_name(f"{linked.name}{DIGEST_SUFFIX}")
    digest.write_text(hashlib.sha256(linked.read_bytes()).hexdigest() + "\n", encoding="ascii")
    for source, name in ((linked, library), (digest, Path(f"{library}{DIGEST_SUFFIX}"))):
        source.chmod(0o755)
        sync(source)
        if not name.is_file():
            remove(name)
        os.replace(source, name)
    sync(library.parent)


def _open_private(file: Path) -> int:
    # Without waiting, should it be a FIFO.
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
        _check_status(file, status)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _read_private(file: Path) -> bytes:
    descriptor = _open_private(file)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def _check_status(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, f"belongs to another user (id {status.st_uid})", str(path))
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise OSError(errno.EPERM, "can be written by other users", str(path))
