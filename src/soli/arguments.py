"""Names of keyword arguments: an unknown one is an error that says what was meant, never ignored.

Values that change nothing where they are known (`trust_remote_code=False`) are accepted where a name is not supported,
so that a call written for another engine runs or says why not.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from soli.errors import SoliError
from soli.sections import shown, suggest

P = ParamSpec("P")
T = TypeVar("T")


class UnknownArgument(SoliError, TypeError):
    """A keyword argument that a function does not have."""


def reject_unknown_arguments(
    function: str, names: Iterable[str], known: Iterable[str], hints: Mapping[str, str] | None = None
) -> None:
    """UnknownArgument for the first name that is not `known`. `hints`: what to do instead, by unknown name."""
    known = list(known)
    for name in names:
        if name not in known:
            advice = (hints or {}).get(name) or suggest(name, known)
            raise UnknownArgument(f"{function} has no argument {name!r}; {advice}")


def without_neutral(
    function: str,
    arguments: Mapping[str, Any],
    neutral: Mapping[str, tuple[Any, ...]],
    hints: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The arguments but for those that are in `neutral`, by name the values that change nothing; None is one always.
    UnknownArgument for any other value of such a name."""
    remaining = {}
    for name, value in arguments.items():
        if name not in neutral:
            remaining[name] = value
        elif value is not None and not any(type(value) is type(one) and value == one for one in neutral[name]):
            advice = (hints or {}).get(name, "leave it out")
            raise UnknownArgument(f"{function} does not support {name}={shown(value)}; {advice}")
    return remaining


def checks_arguments(
    function: str, hints: Mapping[str, str] | None = None, neutral: Mapping[str, tuple[Any, ...]] | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: unknown keyword arguments of `function`, as messages call it, are rejected as above."""

    def decorate(implementation: Callable[P, T]) -> Callable[P, T]:
        known = [name for name in inspect.signature(implementation).parameters if name != "self"]

        @functools.wraps(implementation)
        def checked(*positional: P.args, **arguments: P.kwargs) -> T:
            named: dict[str, Any] = dict(arguments)
            if not named.keys() <= set(known):
                named = without_neutral(function, named, neutral or {}, hints)
                reject_unknown_arguments(function, named, known, hints)
            return implementation(*positional, **named)  # type: ignore[arg-type]

        return checked

    return decorate
