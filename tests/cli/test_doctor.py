"""`soli doctor`: every line is there, the figures are positive, and what cannot be had is said."""

import json

import pytest

from soli import machine
from soli.cli import main
from soli.kernels.cpu import native


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(machine, "DISK_FILE", 2 * machine.PIECE)
    for name in ("SOLI_KERNELS", "SOLI_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_json_has_every_figure(capsys, tmp_path):
    assert main(["doctor", "--json", "--disk", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_gb_per_second"] > 0 and found["disk_gb_per_second"] > 0 and found["cores"] >= 1
    assert found["disk_folder"] == str(tmp_path) and found["versions"]["torch"] and not list(tmp_path.iterdir())
    assert found["kernels"] in (*native.ISAS, "torch")


def test_the_table_says_which_kernels_run(capsys, monkeypatch):
    monkeypatch.setattr(machine, "disk_bandwidth", lambda folder: None)
    monkeypatch.setattr(native, "library_or_reason", lambda: "there is no C++ compiler")
    assert main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["processor", "features", "kernels", "threads", "memory", "disk", "GPU", "versions"]
    assert lines["kernels"] == "torch: there is no C++ compiler" and lines["disk"].startswith("not measured")


def test_a_forced_path_is_shown(capsys, monkeypatch):
    if isinstance(native.library_or_reason(), str):
        pytest.skip("no C++ kernels here")
    for name, value, said in (
        ("SOLI_KERNELS", "torch", "torch: SOLI"),
        ("SOLI_CPU_ISA", "portable", "C++ for portable"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert main(["doctor"]) == 0
        assert said in capsys.readouterr().out


def test_a_missing_folder_is_one_sentence(capsys):
    assert main(["doctor", "--disk", "/nowhere"]) == 1
    assert capsys.readouterr().err == "soli: /nowhere: there is no such folder to measure a disk in\n"
