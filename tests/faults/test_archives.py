"""Archives of the corpus: read to their checksums, of the pinned version and digest, of bounded size."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from soli.errors import SoliError
from soli.recipes.nano_corpus import corpus, digests, fetch
from soli.recipes.nano_corpus.config import CorpusConfig
from soli.recipes.nano_corpus.fetch import Package, gunzip, read_members, zip_members
from soli.recipes.nano_corpus.sources import SOURCES, Source, SourceRow
from tests.recipes.archives import wheel

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
CONTENT = bytes(range(256)) * 4000


def tgz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as out:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
    return path


def deb(folder: Path, members: dict[str, bytes], version: str = "1.0-1", name: str = "p") -> Path:
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    (tree / "DEBIAN" / "control").write_text(control)
    for path, content in members.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    archive = folder / f"{name}.deb"
    subprocess.run(["dpkg-deb", "-Zgzip", "--build", tree, archive], check=True, capture_output=True)
    shutil.rmtree(tree)
    return archive


MAKERS = {
    "tgz": lambda folder, members: tgz(folder / "x.tgz", members),
    "whl": lambda folder, members: wheel(folder / "x.whl", members),
    "deb": deb,
}


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGES = {
    "another checksum": lambda data: flip(data, len(data) - 8),
    "another length": lambda data: flip(data, len(data) - 1),
    "no checksum": lambda data: data[:-8],
    "cut short": lambda data: data[: len(data) // 2],
    "bytes after the end": lambda data: data + b"more",
    "another byte": lambda data: flip(data, len(data) // 2),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tgz_gives_no_member(damage, tmp_path) -> None:
    archive = tgz(tmp_path / "x.tgz", {"a": CONTENT, "b": CONTENT})
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(SoliError, match=r"x.tgz is not a complete package .*delete it and build again"):
        next(read_members(archive, "*"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_gzip_file_inside_a_package(damage) -> None:
    assert gunzip(gzip.compress(CONTENT), "dict.dz") == CONTENT
    with pytest.raises(SoliError, match=r"dict.dz is not a complete archive"):
        gunzip(damage(gzip.compress(CONTENT)), "dict.dz")


@needs_dpkg
@pytest.mark.parametrize("position", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["cut short", "another byte"])
def test_a_damaged_debian_package_is_named(kind, position, tmp_path) -> None:
    archive = deb(tmp_path, {f"usr/{i}": hashlib.sha256(bytes([i])).digest() * 4000 for i in range(20)})
    data = bytearray(archive.read_bytes())
    if kind == "cut short":
        del data[int(len(data) * position) :]
    else:
        data[int(len(data) * position)] ^= 1
    archive.write_bytes(data)
    with pytest.raises(SoliError, match=r"p.deb is not a complete package"):
        list(read_members(archive, "usr/*"))


@pytest.mark.parametrize("kind", [name if name != "deb" else pytest.param(name, marks=needs_dpkg) for name in MAKERS])
def test_a_member_that_is_too_large_is_named(kind, tmp_path, monkeypatch) -> None:
    archive = MAKERS[kind](tmp_path, {"usr/large": CONTENT, "usr/small": b"1"})
    monkeypatch.setattr(fetch, "MEMBER_BYTES", len(CONTENT))
    assert dict(read_members(archive, "usr/*")) == {"usr/large": CONTENT, "usr/small": b"1"}
    monkeypatch.setattr(fetch, "MEMBER_BYTES", len(CONTENT) - 1)
    assert dict(read_members(archive, "usr/small")) == {"usr/small": b"1"}
    with pytest.raises(SoliError, match=rf"{archive.name} .*usr/large in it has more than {len(CONTENT) - 1:,} bytes"):
        list(read_members(archive, "usr/*"))


def test_what_is_small_in_an_archive_and_large_outside(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "MEMBER_BYTES", 2**20)
    zeros = bytes(2**22)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.ftl", zeros)
    with pytest.raises(SoliError, match=r"omni.ja is not .*a.ftl in it has more than"):
        list(zip_members((tmp_path / "x.zip").read_bytes(), "omni.ja", "*.ftl"))
    with pytest.raises(SoliError, match=r"x.gz in it has more than"):
        gunzip(gzip.compress(zeros), "x.gz")
    monkeypatch.setattr(fetch, "ARCHIVE_BYTES", 2**21)
    with pytest.raises(SoliError, match=r"x.tgz .*holds more than 2,097,152 bytes"):
        list(read_members(tgz(tmp_path / "x.tgz", {"unread": zeros}), "nothing"))


def packages(*clients: str) -> list[Package]:
    return [package for source in SOURCES for package in source.packages if package.client in clients]


def test_every_package_of_an_index_has_a_version_and_a_digest() -> None:
    for package in packages("pip", "npm"):
        (name,) = package.names
        plain, _, version = name.rpartition("==" if package.client == "pip" else "@")
        assert len(digests.recipe_digests()[package.client, plain, version]) == 64
    for package in packages("apt"):
        assert any((client, name) == ("apt", package.names[0]) for client, name, _ in digests.recipe_digests())
    assert len(digests.recipe_digests()) == len({(p.client, p.names[0]) for p in packages("pip", "npm", "apt")})


@pytest.fixture
def table(monkeypatch):
    """Replaces the recipe's digests."""
    return lambda rows: monkeypatch.setattr(digests, "recipe_digests", lambda: rows)


@pytest.fixture
def download(monkeypatch):
    """Replaces the clients by a copy of a file."""

    def serve(file: Path) -> None:
        def copy(client: str, name: str, folder: Path) -> str:
            shutil.copy(file, folder)
            return ""

        monkeypatch.setattr(fetch, "_download", copy)

    return serve


@pytest.mark.parametrize(("client", "name"), [("pip", "poems==1.0"), ("npm", "@scope/poems@1.0")])
def test_an_archive_with_another_digest_is_rejected_and_not_cached(client, name, tmp_path, table, download) -> None:
    archive = wheel(tmp_path / "x.whl", {"a": "1"})
    plain = name.rpartition("==" if client == "pip" else "@")[0]
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    download(archive)
    package = Package(client, (name,))
    table({})
    with pytest.raises(SoliError, match=r"has no SHA-256"):
        fetch.fetch(package, tmp_path / "cache")
    table({(client, plain, "1.0"): "0" * 64})
    with pytest.raises(SoliError, match=rf"its SHA-256 is {digest}, but {name} has {'0' * 64} in "):
        fetch.fetch(package, tmp_path / "cache")
    assert not [*(tmp_path / "cache").iterdir()]
    table({(client, plain, "1.0"): digest})
    cached = fetch.fetch(package, tmp_path / "cache")
    assert fetch.describe(package, tmp_path / "cache").version == "1.0"
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(SoliError, match=r"its SHA-256 is .*delete"):
        fetch.fetch(package, tmp_path / "cache")


@pytest.fixture
def apt_index(tmp_path, monkeypatch):
    """Puts a script in the place of apt-cache that prints an index."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def serve(*rows: tuple[str, str]) -> None:
        text = "\n".join(f"Package: p\nVersion: {version}\nSHA256: {sha256}\n" for version, sha256 in rows)
        script = tmp_path / "bin" / "apt-cache"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        script.chmod(0o755)

    return serve


@needs_dpkg
def test_a_debian_package_must_be_the_one_of_its_version_in_the_index(tmp_path, table, download, apt_index) -> None:
    archive = deb(tmp_path, {"usr/a": b"1"})
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    download(archive)
    table({})
    package = Package("apt", ("p",))
    apt_index(("1.0-1", "0" * 64), ("2.0-1", digest))
    with pytest.raises(SoliError, match=rf"its SHA-256 is {digest}, but p 1.0-1 has 0{{64}} in apt's index"):
        fetch.fetch(package, tmp_path / "cache")
    apt_index(("2.0-1", "0" * 64), ("1.0-1", digest))
    fetch.fetch(package, tmp_path / "cache")
    record = fetch.describe(package, tmp_path / "cache")
    assert record == digests.ArchiveRecord("apt", "p", "1.0-1", digest, "apt's index")
    apt_index(("2.0-1", "0" * 64))  # updated since: no error
    assert fetch.describe(package, tmp_path / "cache").checked_by is None
    table({("apt", "p", "1.0-1"): digest})
    assert fetch.describe(package, tmp_path / "cache").checked_by == "recipe"


@needs_dpkg
def test_another_version_is_one_line_and_in_the_report(tmp_path, table, download, apt_index) -> None:
    archive = deb(tmp_path, {"usr/a": b"1"}, version="2:1.5-1")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    download(archive)
    apt_index(("2:1.5-1", digest))
    table({("apt", "p", "1.0-1"): "0" * 64})
    lines = []

    def read(archives):
        yield from (SourceRow(f"第{i}只猫坐垫子", f"Cat number {i} sits on the mat") for i in range(30))

    source = Source("cats", "pairs", (Package("apt", ("p",)),), read, "none")
    config = CorpusConfig(heldout_every=4)
    built = corpus.build_corpus(
        config, tmp_path / "cache", lambda *line: lines.append(line), sources=[source], everyday=()
    )
    assert [line for line in lines if line[0] == "Debian p"] == [
        ("Debian p", "version 2:1.5-1; the recipe was made with 1.0-1")
    ]
    corpus.write_corpus(built, tmp_path)
    record = {"client": "apt", "name": "p", "version": "2:1.5-1", "sha256": digest, "checked_by": "apt's index"}
    assert json.loads((tmp_path / "counts.json").read_text())["archives"] == [record]


def test_damaged_content_is_a_sentence(tmp_path) -> None:
    def read(archives):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        yield

    source = Source("cats", "pairs", (), read, "none")
    with pytest.raises(SoliError, match=r"is damaged .*invalid start byte"):
        corpus.source_rows(source, tmp_path, lambda *line: None)
