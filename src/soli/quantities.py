"""Large numbers for a person, and sizes as a person writes them."""

import re
from typing import Final

from soli.errors import SoliError

DECIMAL: Final = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY: Final = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
UNITS: Final = {"B": 1} | DECIMAL | BINARY
LARGEST_BYTES: Final = 2**60
LEAST_RATE: Final = 10**6  # bytes per second: "7" is not meant as seven of them
LARGEST_FLOPS: Final = 10**21


def parse_bytes(text: str | int, name: str) -> int:
    """"16GB" -> 16 * 10^9, "1.5 GiB" -> 1.5 * 2^30; a number alone is bytes. SoliError names `name`, the value and
    what is read."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match and (match[2] or "B").lower() in units:
        size = int(float(match[1]) * units[(match[2] or "B").lower()])
        if 0 < size <= LARGEST_BYTES:
            return size
    raise SoliError(f"{name} is {str(text)[:40]!r}: give a size such as 16GB (10^9 bytes) or 16GiB (2^30)")


def parse_rate(text: str | int, name: str) -> int:
    """Bytes per second: "7GB/s" -> 7 * 10^9; the "/s" may be left out. SoliError as for a size, and below 1 MB/s."""
    try:
        rate = parse_bytes(re.sub(r"\s*/\s*s(ec)?\s*$", "", str(text)), name)
    except SoliError:
        rate = 0
    if rate < LEAST_RATE:
        raise SoliError(f"{name} is {str(text)[:40]!r}: give a rate such as 7GB/s (10^9 bytes per second)")
    return rate


def parse_flops(text: str | int, name: str) -> float:
    """FLOP per second: "1.5T", "1.5TFLOPS" and "1.5 TFLOP/s" -> 1.5 * 10^12. SoliError as for a size."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,9})?)\s*([kMGTP]?)(?:FLOPS?)?(?:/s)?\s*", str(text), re.ASCII)
    if match:
        rate = float(match[1]) * 1000 ** " kMGTP".index(match[2] or " ")
        if 0 < rate <= LARGEST_FLOPS:
            return rate
    raise SoliError(f"{name} is {str(text)[:40]!r}: give a rate such as 1.5TFLOPS (10^12 operations per second)")


def parse_share(text: str, name: str) -> float:
    """"25%" -> 0.25; SoliError for what is no share above 0 and up to 100 %."""
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", text, re.ASCII)
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise SoliError(f"{name} is {text[:40]!r}: give a share above 0 % and up to 100 %, such as 25%")
    return share


def scaled(value: float, unit: str = "") -> str:
    """671026419200 -> "671.0 B"; bytes and FLOPs take SI prefixes, "689.4 GB"."""
    prefixes = ("", "k", "M", "G") if unit else ("", "K", "M", "B")
    power = min(3, max(0, (len(str(round(value))) - 1) // 3))
    number = f"{value / 1000**power:,.1f}" if power else f"{value:.0f}"
    return f"{number} {prefixes[power]}{unit}".rstrip()
