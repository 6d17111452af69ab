"""How a disk is read: the choice, and that it is remembered."""

import json

import pytest

from soli import measured
from soli.errors import SoliError
from soli.experts import disk
from soli.experts.disk import BUFFERED, CANDIDATES, measured_disk
from soli.experts.reading import Settings

USUAL, OTHER = CANDIDATES[:2]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(disk, "FILE_BYTES", 4 * disk.READ_BYTES)
    monkeypatch.setattr(disk, "TRIAL_BYTES", 2 * disk.READ_BYTES)


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({}, USUAL),
        ({OTHER: 1.05e9}, USUAL),
        ({OTHER: 1.2e9}, OTHER),
        ({BUFFERED: 1.2e9}, USUAL),
        ({BUFFERED: 1.5e9}, BUFFERED),
        ({OTHER: 1.3e9, BUFFERED: 1.5e9}, OTHER),
    ],
)
def test_other_settings_must_be_faster_than_chance(monkeypatch, tmp_path, rates, best) -> None:
    monkeypatch.setattr(disk, "_rate", lambda file, settings, starts: rates.get(settings, 1e9))
    chosen = measured_disk(tmp_path)
    assert (chosen.threads, chosen.block) == best[:2]
    assert chosen.rate == rates.get(best, 1e9)
    if best is BUFFERED:
        assert chosen.settings == Settings(direct=False)


def test_a_disk_is_measured_once_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    first = measured_disk(folder)
    assert first.rate > 0 and first.idle_latency > 0 and not list(folder.iterdir())
    monkeypatch.setattr(disk, "_measure", lambda folder: pytest.fail("measured again"))
    assert measured_disk(folder / "not" / "there") == first
    assert "GB/s" in str(first) and "KiB" in str(first)


@pytest.mark.parametrize("damage", [{"rate": "fast"}, {"threads": None}, {"surplus": 1}, {"latency": True}])
def test_a_damaged_record_is_measured_again(tmp_path, damage) -> None:
    measured_disk(tmp_path)
    file = tmp_path / "cache" / measured.FILE
    records = json.loads(file.read_text())
    [record] = records["disks"].values()
    record |= damage
    file.write_text(json.dumps(records))
    assert measured_disk(tmp_path).rate > 0


def test_a_disk_without_space_is_rejected(tmp_path, monkeypatch) -> None:
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(SoliError, match=r"cannot be measured .*--disk"):
        measured_disk(tmp_path)
