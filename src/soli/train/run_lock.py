"""One process trains in a run's folder: a lock that the kernel releases when its holder ends, however it ends.

`run.lock` is locked with flock(2) and names its holder: {"pid", "host", "started"}. The lock belongs to the file, so
every path to the folder leads to the same one. Readers of a run (export, eval, runs) take no lock. On a file system
without flock a run is trained unprotected, and says so. No torch.
"""

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from soli.errors import SoliError

LOCK = "run.lock"
WAIT_SECONDS = 1.0  # for a holder that has just been killed
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LONGEST_RECORD = 4096  # bytes


class RunIsLocked(SoliError):
    """Another process trains in the folder."""


class RunLock:
    """A lock of this process, released when the object or the process ends."""

    def __init__(self, handle: int, is_exclusive: bool) -> None:
        self.is_exclusive = is_exclusive  # False where the file system has no locks
        self.pid = os.getpid()  # a forked child has the object, but not the lock
        self._close = weakref.finalize(self, os.close, handle)


# Of this process, by device and inode of the file: one process may build several Runs of a folder, one after another.
_locks: weakref.WeakValueDictionary[tuple[int, int], RunLock] = weakref.WeakValueDictionary()


def lock_run(folder: Path) -> RunLock:
    """Lock a run's folder, which is created where there is none; again in the same process: the lock it has.

    RunIsLocked names the process that holds it; SoliError says why the folder cannot be written.
    """
    create_folder(folder)
    deadline = time.monotonic() + WAIT_SECONDS
    while isinstance(lock := _try_lock(folder / LOCK), str):
        if time.monotonic() >= deadline:
            raise RunIsLocked(
                f"{folder} is being trained by {lock}: wait for its end, stop it with SIGTERM, or choose another --out"
            )
        time.sleep(0.05)
    return lock


def is_locked(folder: Path) -> bool | None:
    """Whether a process trains in a run's folder; None where that cannot be known: no lock file, or no locks there."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for an instant: lock_run tries for longer
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def create_folder(folder: Path) -> None:
    """Create a run's folder, or one inside it, where there is none; SoliError says what is in its place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder.is_symlink() and not folder.exists():
            raise SoliError(
                f"{folder} is a link to {os.readlink(folder)}, which does not exist; create that folder or remove the "
                "link"
            ) from None
        if folder.exists():
            raise SoliError(f"{folder} is not a folder; remove it, or choose another --out") from None
        raise SoliError(f"{folder} cannot be created ({error.strerror}); {_other_folder()}") from None


def _other_folder() -> str:
    return "check its free space and permissions, or choose another --out"


def _try_lock(file: Path) -> RunLock | str:
    """The lock, or who holds it."""
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise SoliError(f"{file} cannot be opened ({error.strerror}); {_other_folder()}") from None
    with ExitStack() as unless_locked:
        unless_locked.callback(os.close, handle)
        key = _identity(os.fstat(handle))
        own = _locks.get(key)
        if own is not None and own.pid == os.getpid():
            return own
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_exclusive = True
        except BlockingIOError:
            return _read_holder(handle)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            is_exclusive = False
        if not file.exists() or _identity(file.stat()) != key:  # removed by someone since it was opened
            return "another process"
        _record_holder(handle, file)
        unless_locked.pop_all()
    _locks[key] = lock = RunLock(handle, is_exclusive)
    return lock


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _record_holder(handle: int, file: Path) -> None:
    record = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(" ", "seconds"),
    }
    text = json.dumps(record).encode() + b"\n"
    try:
        os.pwrite(handle, text, 0)  # before the file is cut: a full disk still has the block that it occupies
        os.ftruncate(handle, len(text))
    except OSError as error:
        raise SoliError(f"{file} cannot be written ({error.strerror}); {_other_folder()}") from None


def _read_holder(handle: int) -> str:
    """The holder as a message names it; without details where its record cannot be read."""
    try:
        record = json.loads(os.pread(handle, LONGEST_RECORD, 0))
        pid, host, started = (str(record[key])[:64] for key in ("pid", "host", "started"))
        text = f"process {pid} on {host} since {started}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    return "".join(character for character in text if character.isprintable())
