"""Compiling and loading: cache, one OpenMP runtime, one sentence where there is no compiler, no read past a weight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soli.kernels.cpu import build, native
from tests.kernels.weights import isas, needs_kernels

LOADED = """
import torch
from soli.kernels.cpu import build, native
assert native.library()
print(*build.openmp_runtimes())
"""


@needs_kernels
def test_one_openmp_runtime_is_in_the_process_and_it_is_torchs() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    (runtime,) = done.stdout.split()
    assert Path(runtime).is_relative_to(Path(torch.__file__).parents[1])


@needs_kernels
def test_the_second_use_compiles_nothing(monkeypatch) -> None:
    first = build.build()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.build() == first


def test_another_flag_is_another_library_and_a_failure_is_kept(tmp_path, monkeypatch) -> None:
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


@needs_kernels
def test_a_compiler_that_knows_no_tiles_builds_the_rest(tmp_path, monkeypatch) -> None:
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
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no C++ compiler" in said


@needs_kernels
@pytest.mark.parametrize("isa", isas())
def test_nothing_is_read_before_or_past_a_weight(isa) -> None:
    """Weights and scales end, and then begin, at pages that may not be touched: a stray read ends the process."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("guarded.py"), isa], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("isa", isas())
def test_the_address_sanitizer_finds_nothing(isa, tmp_path) -> None:
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "SOLI_CPU_FLAGS": "-fsanitize=address -g -O1",
        "SOLI_CACHE": str(tmp_path),
    }
    command = [sys.executable, Path(__file__).with_name("guarded.py"), isa]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
