"""Large numbers for a person."""


def scaled(value: float, unit: str = "") -> str:
    """671026419200 -> "671.0 B"; bytes and FLOPs take SI prefixes, "689.4 GB"."""
    prefixes = ("", "k", "M", "G") if unit else ("", "K", "M", "B")
    power = min(3, max(0, (len(str(round(value))) - 1) // 3))
    number = f"{value / 1000**power:,.1f}" if power else f"{value:.0f}"
    return f"{number} {prefixes[power]}{unit}".rstrip()
