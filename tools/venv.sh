#!/bin/sh
# Make a virtual environment with a Python of 3.11 or newer and a PyTorch of 2.11 or newer in it. Safe to run again.
# usage: sh tools/venv.sh FOLDER
# SOLI_PYTHON=/path/to/python chooses the Python; TORCH_INDEX=URL is the package index that PyTorch alone comes from.
set -eu
venv=$1

say() { printf 'soli: %s\n' "$*"; }
fail() {
    printf 'soli: %s\n' "$*" >&2
    exit 1
}

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_torch() { "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; }

choose_python() {
    if [ -n "${SOLI_PYTHON:-}" ]; then
        usable "$SOLI_PYTHON" || fail "SOLI_PYTHON=$SOLI_PYTHON is no Python of 3.11 or newer with venv and pip"
        echo "$SOLI_PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11; do # one that has PyTorch already goes first
        if usable "$candidate" && "$candidate" -c 'import torch' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    for candidate in python3.12 python3.11 python3; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python of 3.11 or newer with venv and pip was found; install one (on Debian also python3-venv), or name it in SOLI_PYTHON"
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(choose_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
    if has_torch "$python"; then
        # Borrow the PyTorch that is installed, and its setuptools. A line in a .pth file reaches them even where that
        # Python is itself in a virtual environment, which --system-site-packages does not.
        "$venv/bin/python" -m pip uninstall --quiet --yes setuptools
        "$venv/bin/python" - "$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')" <<'PY'
import pathlib, sys, sysconfig

packages = pathlib.Path(sysconfig.get_path("purelib"))
(packages / "soli-base.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")
PY
    fi
fi

if has_torch "$venv/bin/python"; then
    say "PyTorch $("$venv/bin/python" -c 'import torch; print(torch.__version__)') is in place"
    exit
fi
if command -v nvidia-smi >/dev/null 2>&1; then
    wheel='torch>=2.11'
    say "installing PyTorch for the GPU: about 3 GB to download"
else
    wheel='torch==2.13.0'
    say "installing PyTorch: 0.2 GB from an index of CPU wheels; 3 GB, in some twenty packages, where the index has only"
    say "the CUDA build, as PyPI on Linux. To name an index: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"
fi
if [ -n "${TORCH_INDEX:-}" ]; then
    "$venv/bin/python" -m pip install --index-url "$TORCH_INDEX" "$wheel"
else
    "$venv/bin/python" -m pip install "$wheel"
fi
