"""Compiling and loading: cache, one OpenMP runtime, one sentence without a compiler, no read outside a weight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soli.kernels.cpu import build, native
from tests.kernels.weights import isas, needs_kernels

LOAD_AND_PRINT_RUNTIMES = """
import torch
from soli.kernels.cpu import build, native
assert native.library()
print(*build.openmp_runtimes())
"""


@needs_kernels
def test_one_openmp_runtime_is_in_the_process_and_it_is_torchs() -> None:
    command = [sys.executable, "-c", LOAD_AND_PRINT_RUNTIMES]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    (runtime,) = result.stdout.split()
    assert Path(runtime).resolve().is_relative_to(Path(torch.__file__).resolve().parents[1])


@needs_kernels
def test_the_second_use_compiles_nothing(monkeypatch) -> None:
    first = build.build()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.build() == first


def test_another_flag_is_another_library_and_a_failure_is_cached(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: "g++")
    monkeypatch.setattr(build, "_run", lambda command: "g++ 0\n")

    def compile_badly(compiler, flags, runtime, library, failed):
        failed.write_text("no")

    monkeypatch.setattr(build, "_compile", compile_badly)
    for _ in range(2):
        with pytest.raises(build.BuildError, match=r"g\+\+ failed; .*failed.txt has its messages"):
            build.build(cache=tmp_path)
    monkeypatch.setenv("SOLI_CPU_FLAGS", "-g")
    with pytest.raises(build.BuildError):
        build.build(cache=tmp_path)
    assert len(list(tmp_path.glob("kernels/*/failed.txt"))) == 2


@pytest.mark.slow  # compiles all kernels again
@needs_kernels
def test_a_compiler_without_amx_builds_the_rest(tmp_path, monkeypatch) -> None:
    compiler = tmp_path / "old"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {build.find_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert native.open_library(build.build(cache=tmp_path)).best_isa in ("portable", "avx2", "avx512")


def test_without_a_compiler_there_is_one_line_and_torch(monkeypatch, capsys) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    native.library_or_reason.cache_clear(), native.library.cache_clear()
    try:
        assert native.library() is None and native.library() is None
    finally:
        native.library_or_reason.cache_clear(), native.library.cache_clear()
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no C++ compiler" in message


@needs_kernels
@pytest.mark.parametrize("isa", isas())
def test_nothing_is_read_outside_a_tensor(isa) -> None:
    """Weights and scales end, and then begin, at guard pages: a read outside them ends the process."""
    command = [sys.executable, Path(__file__).with_name("guarded.py"), isa]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr or f"ended by signal {-result.returncode}"


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("isa", isas())
def test_the_address_sanitizer_finds_nothing(isa, tmp_path) -> None:
    sanitizer = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": sanitizer.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "SOLI_CPU_FLAGS": "-fsanitize=address -g -O1",
        "SOLI_CACHE": str(tmp_path),
    }
    command = [sys.executable, Path(__file__).with_name("guarded.py"), isa]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
