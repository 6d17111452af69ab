"""Build a wheel of this checkout that has the C++ kernels compiled, for any Python and any Linux that is new enough.

    python tools/build_wheel.py --out dist

One library has every instruction set and chooses at run time. OpenMP's library is not in the wheel: PyTorch brings one,
and the kernels use that. The platform tag is the one that auditwheel finds. Needs git, a C++ compiler, and the packages
of the extra `wheel`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from soli.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[1]
COMPILED = Path("src/soli/kernels/cpu/compiled")
# Marks the package as one with compiled code, without an extension module for setuptools to compile.
SETUP = """\
from setuptools import setup
from setuptools.dist import Distribution

Distribution.has_ext_modules = lambda self: True
setup()
"""


def copy_checkout(folder: Path) -> None:
    """The files that git tracks, as they are in the checkout."""
    names = run("git", "-C", str(ROOT), "ls-files", "-z").split("\0")
    for name in filter(None, names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)


def compile_kernels(folder: Path) -> None:
    """The library alone, in `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "soli_cpu.so"
        messages = build.compile_library(build.find_compiler(), build.FLAGS, library, openmp=True, runtime=None)
        if messages:
            sys.exit(f"soli: the kernels do not compile:\n{messages}")
        folder.mkdir(parents=True)
        shutil.copyfile(library, folder / library.name)


def platform_tag(wheel: Path) -> str:
    """The oldest platform that has every symbol which the wheel's library takes from elsewhere."""
    report = run(sys.executable, "-m", "auditwheel", "show", str(wheel))
    tags = re.findall(r'"(manylinux_\w+)"', report)
    if not tags:
        sys.exit(f"soli: auditwheel names no platform:\n{report}")
    return tags[0]


def run(*command: str) -> str:
    """What a command prints; its messages and its exit status end this program where it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"soli: {' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel (default dist)")
    parser.add_argument("--no-build-isolation", action="store_true", help="use the setuptools that is installed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkout, wheels = Path(scratch) / "checkout", Path(scratch) / "wheels"
        copy_checkout(checkout)
        compile_kernels(checkout / COMPILED)
        (checkout / "setup.py").write_text(SETUP, encoding="utf-8")
        isolation = ["--no-build-isolation"] if options.no_build_isolation else []
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "--wheel-dir", str(wheels), str(checkout))
        (wheel,) = wheels.iterdir()
        tags = ["--python-tag", "py3", "--abi-tag", "none", "--platform-tag", platform_tag(wheel)]
        name = run(sys.executable, "-m", "wheel", "tags", "--remove", *tags, str(wheel)).split()[-1]
        options.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheels / name, options.out / name)
    print(options.out / name)


if __name__ == "__main__":
    main()
