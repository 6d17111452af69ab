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


Expected = Mapping[str, tuple[tuple[type, ...], str]]  # by argument: its types, and what to give


def checks_arguments(
    function: str,
    hints: Mapping[str, str] | None = None,
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    expected: Expected | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: unknown keyword arguments of `function`, as messages call it, are rejected as above, and values that
    are not of an `expected` type by a SoliError. None is the default of every argument that has one."""

    def decorate(implementation: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(implementation)
        known = [name for name in signature.parameters if name != "self"]

        @functools.wraps(implementation)
        def checked(*positional: P.args, **arguments: P.kwargs) -> T:
            named: dict[str, Any] = dict(arguments)
            if not named.keys() <= set(known):
                named = without_neutral(function, named, neutral or {}, hints)
                reject_unknown_arguments(function, named, known, hints)
            try:
                bound = signature.bind(*positional, **named)
            except TypeError:
                return implementation(*positional, **named)  # type: ignore[arg-type]  # raises Python's own error
            _use_defaults(bound, signature)
            _check_types(function, bound.arguments, expected or {})
            return implementation(*bound.args, **bound.kwargs)

        return checked

    return decorate


def _use_defaults(bound: inspect.BoundArguments, signature: inspect.Signature) -> None:
    """Drops every None whose argument has a default."""
    for name, parameter in signature.parameters.items():
        if parameter.default is not parameter.empty and name in bound.arguments and bound.arguments[name] is None:
            bound.arguments[name] = parameter.default


def _check_types(function: str, arguments: Mapping[str, Any], expected: Expected) -> None:
    for name, (types, remedy) in expected.items():
        if name in arguments and not isinstance(arguments[name], types):
            raise SoliError(f"the argument {name} of {function} is {shown(arguments[name])}; give {remedy}")
