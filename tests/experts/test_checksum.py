"""Checksums of packed experts: the same number whichever library computes it."""

import runpy
import sys
import zlib

import pytest

from soli import checksum


@pytest.mark.parametrize("length", [0, 1, 15, 64, 4096, 100_003])
def test_it_is_zlib_s_number(length: int) -> None:
    data = bytes(at * 7 % 251 for at in range(length))
    assert checksum.crc32(data) == checksum.crc32(memoryview(bytearray(data))) == zlib.crc32(data)


def test_without_isal_zlib_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    assert runpy.run_path(checksum.__file__)["crc32"] is zlib.crc32
