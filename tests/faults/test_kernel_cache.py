"""The kernel cache: what others can have written, or what is damaged, is compiled again or not used; never loaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soli.kernels.cpu import build, native
from soli.kernels.cpu.library_cache import install, open_verified
from tests.kernels.weights import needs_kernels

ANOTHER_USER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def compilations(monkeypatch) -> list[Path]:
    """Compiling writes a few bytes; the list has the libraries that were compiled."""
    libraries: list[Path] = []

    def compile_quickly(compiler, flags, runtime, library, failure) -> None:
        libraries.append(library)
        linked = library.with_name("tmp-linked")
        linked.write_bytes(b"compiled")
        install(linked, library)

    monkeypatch.setattr(build, "_compile", compile_quickly)
    return libraries


def digest_of(library: Path) -> Path:
    return Path(f"{library}.sha256")


def replace_by(path: Path, make) -> None:
    path.unlink()
    make(path)


DAMAGES = {
    "cut short": lambda library: os.truncate(library, 3),
    "empty": lambda library: os.truncate(library, 0),
    "longer": lambda library: library.write_bytes(library.read_bytes() + b"x"),
    "other bytes": lambda library: library.write_bytes(b"replaced"),
    "writable by all": lambda library: library.chmod(0o777),
    "writable by its group": lambda library: library.chmod(0o775),
    "a symlink": lambda library: replace_by(library, lambda path: path.symlink_to("/bin/true")),
    "a folder": lambda library: replace_by(library, Path.mkdir),
    "a FIFO": lambda library: replace_by(library, os.mkfifo),
    "gone": Path.unlink,
    "no digest": lambda library: digest_of(library).unlink(),
    "an empty digest": lambda library: os.truncate(digest_of(library), 0),
    "a digest that all can write": lambda library: digest_of(library).chmod(0o666),
    "a digest that is a FIFO": lambda library: replace_by(digest_of(library), os.mkfifo),
    "a folder that all can write": lambda library: library.parent.chmod(0o777),
    "a folder above that all can write": lambda library: library.parent.parent.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_does_not_verify_is_compiled_again(damage, tmp_path, compilations) -> None:
    library = build.build(cache=tmp_path)
    assert build.build(cache=tmp_path) == library and compilations == [library]
    damage(library)
    assert build.build(cache=tmp_path) == library and compilations == [library] * 2
    assert library.read_bytes() == b"compiled"
    os.close(open_verified(library))
    assert build.build(cache=tmp_path) == library and compilations == [library] * 2


@needs_root
@pytest.mark.parametrize("name", ["soli_cpu.so", "soli_cpu.so.sha256"])
def test_a_file_of_another_user_is_compiled_again(name, tmp_path, compilations) -> None:
    library = build.build(cache=tmp_path)
    os.chown(library.with_name(name), ANOTHER_USER, ANOTHER_USER)
    assert build.build(cache=tmp_path) == library and compilations == [library] * 2
    assert library.stat().st_uid == digest_of(library).stat().st_uid == os.geteuid()


def another_users(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, ANOTHER_USER, ANOTHER_USER)


def a_symlink(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder.parent)


UNUSABLE = {
    "kernels of another user": (needs_root, lambda cache: another_users(cache / "kernels")),
    "kernels is a symlink": ((), lambda cache: a_symlink(cache / "kernels")),
    "a file": ((), lambda cache: cache.write_text("")),
    "a symlink to itself": ((), lambda cache: cache.symlink_to(cache)),
    "below a file": ((), lambda cache: cache.parent.joinpath("file").write_text("")),
}


@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=marks, id=name) for name, (marks, make) in UNUSABLE.items()]
)
def test_a_cache_that_cannot_be_used_is_replaced_by_one_of_this_user(
    make, tmp_path, compilations, monkeypatch, capsys, request
) -> None:
    cache = tmp_path / "cache"
    make(cache)
    monkeypatch.setenv("SOLI_CACHE", str(tmp_path / "file" / "cache" if "below" in request.node.name else cache))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    library = build.build()
    assert library.is_relative_to(tmp_path / f"soli-{os.geteuid()}") and library.read_bytes() == b"compiled"
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "the cache cannot be used" in note and str(tmp_path) in note


def test_without_any_usable_folder_the_reason_is_one_clause(tmp_path, compilations, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SOLI_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"file: File exists; .*Not a directory|File exists"):
        build.build()
    assert not compilations


@needs_root
def test_a_cache_that_root_filled_serves_a_user_who_cannot_write_to_it(tmp_path, compilations, monkeypatch) -> None:
    library = build.build(cache=tmp_path)
    build_compiler = build.find_compiler()
    monkeypatch.setattr(build, "find_compiler", lambda: build_compiler)
    monkeypatch.setattr(build.os, "access", lambda path, mode: False)
    monkeypatch.setattr(build.os, "geteuid", lambda: ANOTHER_USER)
    assert build.build(cache=tmp_path) == library and compilations == [library]


def test_a_failure_of_the_machine_is_not_cached(tmp_path, monkeypatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'g++: fatal error: Killed signal terminated program cc1plus'\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "_run", lambda command: "g++ 0\n")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match="Killed signal"):
        build.build(cache=tmp_path)
    assert not [*tmp_path.rglob("failed.txt")]


LOAD = """
import shutil, sys
import torch
from soli.kernels.cpu import build, native
from soli.kernels.cpu.library_cache import install

def copy(compiler, flags, runtime, library, failure):
    print("compiled")
    linked = library.with_name("tmp-linked")
    shutil.copyfile(sys.argv[1], linked)
    install(linked, library)

build._compile = copy
print(getattr(native.library_or_reason(), "best_isa", None))
"""


@needs_kernels
@pytest.mark.parametrize("digest", ["of the whole file", "of what is left"])
def test_a_library_cut_short_is_compiled_again_and_ends_no_process(digest, tmp_path, compilations) -> None:
    """Found by its digest; where that is right, by the loader's error."""
    whole = native.library()
    library = build.build(cache=tmp_path)
    linked = library.with_name("tmp-linked")
    shutil.copyfile(whole.path, linked)
    if digest == "of what is left":
        os.truncate(linked, 40)
    install(linked, library)
    if digest == "of the whole file":
        os.truncate(library, 4096)
    command = [sys.executable, "-c", LOAD, str(whole.path)]
    environment = os.environ | {"SOLI_CACHE": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (0, f"compiled\n{whole.best_isa}\n"), result
    assert library.read_bytes() == whole.path.read_bytes()


@needs_kernels
def test_a_library_of_other_functions_is_compiled_again(tmp_path, monkeypatch) -> None:
    whole = native.library().path
    source = tmp_path / "empty.c"
    source.write_text("")
    other = tmp_path / "other.so"
    subprocess.run([build.find_compiler(), "-shared", "-o", other, "-x", "c", source], check=True)
    contents = [other, whole]

    def compile_in_order(compiler, flags, runtime, library, failure) -> None:
        linked = library.with_name("tmp-linked")
        shutil.copyfile(contents.pop(0), linked)
        install(linked, library)

    monkeypatch.setattr(build, "_compile", compile_in_order)
    monkeypatch.setenv("SOLI_CACHE", str(tmp_path / "cache"))
    native.library_or_reason.cache_clear()
    try:
        library = native.library_or_reason()
    finally:
        native.library_or_reason.cache_clear()
    assert isinstance(library, native.Library) and not contents
