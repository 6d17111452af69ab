"""Install a wheel in a clean environment without a compiler and try what it holds.

    python tools/check_wheel.py dist/soli-*.whl
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "He drank a cup of tea."
REPORT = """
import json, torch
from soli.kernels.cpu import native
from soli.kernels.cpu.build import openmp_runtimes
library = native.library()
print(json.dumps({"path": str(library.path), "isa": library.best_isa, "openmp": openmp_runtimes()}))
"""


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        venv = folder / "venv"
        subprocess.run(["sh", str(ROOT / "tools" / "venv.sh"), str(venv)], check=True)
        python = venv / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel.resolve())], check=True)
        # No compiler is on this PATH, and nothing of the checkout is in reach.
        environment = {"PATH": str(venv / "bin"), "HOME": scratch, "SOLI_CACHE": str(folder / "cache")}
        assert shutil.which("g++", path=environment["PATH"]) is None

        def run(*command: str | Path, **changes: str) -> str:
            result = subprocess.run(command, cwd=scratch, env=environment | changes, capture_output=True, text=True)
            if result.returncode or result.stderr.startswith("soli: computing with torch"):
                sys.exit(f"{wheel.name}: {' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")
            return result.stdout

        report = json.loads(run(python, "-c", REPORT))
        assert Path(report["path"]).is_relative_to(venv), report
        assert len(report["openmp"]) == 1 and "torch" in report["openmp"][0], report
        soli = venv / "bin" / "soli"
        isas = ("portable", "avx2", "avx512", "amx")
        answers = {
            isa: run(soli, "translate", SENTENCE, SOLI_CPU_ISA=isa) for isa in isas[: isas.index(report["isa"]) + 1]
        }
        assert all(answers.values()) and len(set(answers.values())) == 1, answers
        assert not os.path.exists(environment["SOLI_CACHE"]), "something was compiled"
        print(f"soli: {wheel.name} works without a compiler, with {', '.join(answers)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
