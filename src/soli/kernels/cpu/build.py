"""Compile the C++ kernels once per machine into a cache folder; nothing is downloaded.

The cache (SOLI_CACHE, else XDG_CACHE_HOME/soli, else ~/.cache/soli) has one library per sources, flags, compiler and
OpenMP library. A lock keeps processes from compiling twice; the library appears by a rename, complete. What is loaded
from it is library_cache.py's decision. A cache that cannot be used is replaced by one in the folder for temporary
files. `make install` runs `python -m soli.kernels.cpu`; without that the first use compiles.

Threads are torch's: the library links the OpenMP runtime that torch has loaded and no other.

A BuildError gives the reason on systems other than Linux, without a compiler, and when the compiler fails.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from soli.atomic_file import remove
from soli.kernels.cpu.library_cache import check_folder, install, make_private, open_verified

SOURCES: Final = Path(__file__).parent / "csrc"
# No contraction: the source says what is one rounding and what is two, so every tile size gives the same bits. Nothing
# reads floating-point flags or errno: without them exponentials are vectorized, with the same bits.
FLAGS: Final = (
    *("-O3", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-DNDEBUG"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
)
ISA_FLAGS: Final = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi", "vnni", "bf16")),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ),
    "amx": ("-mamx-tile", "-mamx-bf16", "-mamx-int8"),  # beside avx512's; not known to compilers before 2021
}
TEMPORARY_FAILURES: Final = ("No space left", "Killed", "annot allocate memory", "out of memory")  # not cached
COMMON: Final = (
    "dispatch", "experts", "forward", "latent_attention", "linear", "order_int4", "portable", "struct_layouts"
)  # fmt: skip


class BuildError(Exception):
    """Why there are no C++ kernels, in a clause that can follow "because"."""


def build(cache: Path | None = None, rebuild: bool = False) -> Path:
    """The compiled library, from the cache where it is there. Needs torch imported, for its OpenMP runtime.

    `rebuild` compiles it again even so. SOLI_CPU_FLAGS adds flags, for a sanitizer or a debugger.
    """
    if platform.system() != "Linux":
        raise BuildError(f"they are built on Linux alone, and this is {platform.system()}")
    compiler = find_compiler()
    runtime = next(iter(openmp_runtimes()), None)  # torch's; none where it was built without
    version = _run([compiler, "--version"]).splitlines()[0]
    flags = [*FLAGS, *os.environ.get("SOLI_CPU_FLAGS", "").split()]
    key = _key(version, str(runtime), *flags, platform.machine())
    reasons = []
    for find_folder in (lambda: cache,) if cache else (cache_folder, temporary_cache):
        try:
            library = find_folder() / "kernels" / key / "soli_cpu.so"
            _ensure(compiler, flags, runtime, library, rebuild)
        except OSError as error:
            reasons.append(f"{error.filename or cache_folder()}: {error.strerror or error}")
            continue
        if reasons:
            note = f"soli: the C++ kernels are in {library.parent}; the cache cannot be used ({reasons[0]})"
            print(note, file=sys.stderr)
        return library
    raise BuildError("; ".join(dict.fromkeys(reasons)))


def _ensure(compiler: str, flags: Sequence[str], runtime: str | None, library: Path, rebuild: bool) -> None:
    """Compile `library` unless it is there and can be loaded. BuildError when the compiler fails, OSError naming what
    cannot be used of the cache."""
    failure = library.with_name("failed.txt")
    folders = (library.parent.parent, library.parent)
    if not rebuild and not os.access(library.parent, os.W_OK) and _is_verified(library, folders):
        return  # a cache that was filled for everybody
    for folder in folders:
        make_private(folder)
    lock = os.open(library.with_name("lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if rebuild or not _is_verified(library, folders):
            for path in (library, *library.parent.glob("tmp*")):  # the latter of compilations that were killed
                remove(path)
            if not failure.exists():
                _compile(compiler, flags, runtime, library, failure)
    finally:
        os.close(lock)
    if failure.exists():
        raise BuildError(f"{compiler} failed; {failure} has its messages (delete it to try again)")


def _is_verified(library: Path, folders: Iterable[Path]) -> bool:
    try:
        for folder in folders:
            check_folder(folder)
        os.close(open_verified(library))
    except OSError:
        return False
    return True


def find_compiler() -> str:
    """CXX, g++ or clang++: the first that is there."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise BuildError("there is no C++ compiler (g++ or clang++) on this machine")


def cache_folder() -> Path:
    """The folder of compiled kernels and other files that can be made again."""
    if os.environ.get("SOLI_CACHE"):
        return Path(os.environ["SOLI_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return temporary_cache() if base.startswith("~") else Path(base) / "soli"  # ~ where a user has no home


def temporary_cache() -> Path:
    """The same where that folder cannot be used: one per user in the folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"soli-{os.geteuid()}"


def openmp_runtimes() -> list[str]:
    """Every OpenMP library mapped into this process, by path."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return sorted(file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp")))


def _key(*parts: str) -> str:
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, flags: Sequence[str], runtime: str | None, library: Path, failure: Path) -> None:
    """Compile into `library`; on an error write the compiler's messages to `failure` instead."""
    print("soli: compiling the C++ kernels for this machine, once; it takes about a minute", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        linked = Path(scratch) / "soli_cpu.so"
        messages = compile_library(compiler, flags, linked, openmp=runtime is not None, runtime=runtime)
        if any(reason in messages for reason in TEMPORARY_FAILURES):
            raise BuildError(f"{compiler} failed: {messages.strip().splitlines()[-1]}")
        if messages:
            failure.write_text(messages, encoding="utf-8")
        else:
            install(linked, library)


def compile_library(compiler: str, flags: Sequence[str], library: Path, *, openmp: bool, runtime: str | None) -> str:
    """Compile all units in parallel beside `library` and link it; the compiler's messages where it fails, else nothing.

    With `openmp` loops are parallel; without `runtime` the process that loads the library must offer OpenMP's symbols.
    """
    if openmp:
        flags = [*flags, "-fopenmp"]
    commands = [
        [compiler, *flags, *isa_flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(library.with_name(f"{name}.o"))]
        for name, isa_flags in _units(compiler)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        messages = "".join(pool.map(_error_messages, commands))
    objects = [command[-1] for command in commands]
    # By its path and not as -fopenmp: the linker would take the compiler's own runtime, a second one.
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    link = [compiler, "-shared", *sanitizers, "-o", str(library), *objects, *([runtime] if runtime else [])]
    return messages or _error_messages(link)


def _error_messages(command: list[str]) -> str:
    """Run a compiler: what it prints where it fails, else nothing."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.stdout if result.returncode else ""


def _units(compiler: str) -> list[tuple[str, tuple[str, ...]]]:
    """Each source file with the flags of its instruction set."""
    if platform.machine() != "x86_64":
        return [(name, ()) for name in COMMON]
    units: dict[str, tuple[str, ...]] = dict.fromkeys(COMMON, ())
    units |= dict.fromkeys(("avx2", "avx2_int8", "avx2_pack_tokens"), ISA_FLAGS["avx2"])
    units |= dict.fromkeys(("avx512", "avx512_bf16", "avx512_pack_tokens", "avx512_vnni"), ISA_FLAGS["avx512"])
    if not _knows_flags(compiler, ISA_FLAGS["amx"]):
        return list(units.items())
    units |= dict.fromkeys(("amx_bf16", "amx_int8"), (*ISA_FLAGS["avx512"], *ISA_FLAGS["amx"]))
    return [(name, ("-DSOLI_AMX", *flags)) for name, flags in units.items()]


def _knows_flags(compiler: str, flags: Sequence[str]) -> bool:
    """Whether the compiler accepts these flags."""
    command = [compiler, *flags, "-x", "c++", "-c", "/dev/null", "-o", "/dev/null"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
