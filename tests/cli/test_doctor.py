"""`soli doctor`: every line is printed, measurements are positive, and what is missing is named."""

import json
import os
from types import SimpleNamespace as Namespace

import pytest

from soli import measured
from soli.cli import main
from soli.experts import disk, memory_rate
from soli.kernels.cpu import native


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory_rate, "SECONDS", 0.01)
    monkeypatch.setattr(disk, "FILE_BYTES", 4 * disk.READ_BYTES)
    monkeypatch.setattr(disk, "TRIAL_BYTES", 2 * disk.READ_BYTES)
    monkeypatch.setattr(measured, "FILE", f"machine-{os.getpid()}.json")  # of this test run alone
    for name in ("SOLI_KERNELS", "SOLI_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_json_has_every_measurement(capsys, tmp_path):
    assert main(["doctor", "--json", "--disk", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["memory_gb_per_second"] > 0 and report["disk_gb_per_second"] > 0 and report["cores"] >= 1
    assert report["disk_folder"] == str(tmp_path) and report["versions"]["torch"] and not list(tmp_path.iterdir())
    assert report["kernels"] in (*native.ISAS, "torch")


def test_the_table_names_the_kernels_in_use(capsys, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: Namespace(free=0))
    monkeypatch.setattr(native, "library_or_reason", lambda: "there is no C++ compiler")
    assert main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["processor", "features", "kernels", "threads", "memory", "disk", "GPU", "versions"]
    assert lines["kernels"] == "torch: there is no C++ compiler" and lines["disk"].startswith("not measured")


def test_a_forced_backend_is_shown(capsys, monkeypatch):
    if isinstance(native.library_or_reason(), str):
        pytest.skip("no C++ kernels here")
    for name, value, text in (
        ("SOLI_KERNELS", "torch", "torch: set by SOLI"),
        ("SOLI_CPU_ISA", "portable", "C++ for portable"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert main(["doctor"]) == 0
        assert text in capsys.readouterr().out


def test_a_missing_folder_is_one_sentence(capsys):
    assert main(["doctor", "--disk", "/nowhere"]) == 1
    assert capsys.readouterr().err == "soli: /nowhere: there is no such folder to measure a disk in\n"
