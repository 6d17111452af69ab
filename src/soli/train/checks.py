"""Checks of a recipe's values, for settings to call at construction; each refusal names field, value and limit."""

from soli.errors import SoliError


def require_positive(name: str, value: float) -> None:
    """SoliError unless `value` is above 0."""
    if not value > 0:
        raise SoliError(f"{name} is {value!r}; it must be above 0")


def require_range(name: str, value: float, low: float, high: float = float("inf"), open_end: bool = False) -> None:
    """SoliError unless low <= value <= high, or < high with an open end."""
    if not low <= value <= high or (open_end and value == high):
        limit = f"at least {low}" if high == float("inf") else f"from {low} to {'below ' if open_end else ''}{high}"
        raise SoliError(f"{name} is {value!r}; it must be {limit}")


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """SoliError unless `value` is among `allowed`."""
    if value not in allowed:
        raise SoliError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
