"""What tests remember of experts' usage is not kept in the user's cache folder."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that usage is remembered in."""
    monkeypatch.setattr("soli.experts.usage.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "experts"
