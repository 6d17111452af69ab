"""What the tests of this folder share: the toy corpus, made once for each file, as in tests/train."""

from tests.train.conftest import data

__all__ = ["data"]
