"""What the tests of this folder share: the toy corpus, made once for each file."""

from pathlib import Path

import pytest

from tests.train.toy import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("toy") / "data")
