"""One reader for the sections of a configuration: dataclasses whose annotations say what each field may hold.

    @dataclass(frozen=True)
    class RunSettings(Section, section="run"):
        precision: Literal["auto", "fp32", "bf16"] = "auto"
        log_every: PositiveInt = 10

Values are checked, and brought to their declared type, whenever a section is constructed; `from_dict` also rejects
unknown and missing fields. Known types: int, float, bool, str, Literal, None and unions, tuple, list, dict, other
sections, Any; `Annotated[int, Bounds(...)]` limits a number. A whole float such as 1e6 may stand for an int. Integers
have 64 bits, floats the range of float32, and text has no NUL byte and no half surrogate pair.
Every error names section, field, value and what the field may hold. No torch.

`--set FIELD=VALUE` of the command line is the same for every verb: a value is TOML (`3`, `1e-3`, `true`, `[1, 2]`,
`"text"`), or plain text where it is not TOML; `null` and `none` unset.
"""

import dataclasses
import datetime
import difflib
import math
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, Union, get_args, get_origin, get_type_hints

from soli.errors import SoliError
from soli.input_files import is_nested_too_deeply


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, for `Annotated`; the ones that are None do not limit."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def contains(self, value: float) -> bool:
        return not (
            (self.at_least is not None and value < self.at_least)
            or (self.at_most is not None and value > self.at_most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        """The limits as the end of "it must be a number ..."."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:g} to {self.at_most:g}"
        limits = (
            ("of at least", self.at_least),
            ("above", self.above),
            ("of at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None)


PositiveInt = Annotated[int, Bounds(above=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeInt = Annotated[int, Bounds(at_least=0)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0)]
Share = Annotated[float, Bounds(at_least=0, at_most=1)]
BelowOne = Annotated[float, Bounds(at_least=0, below=1)]


LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 3.4e38  # about float32's
TOML_DOTS = 500  # in a line: tomllib takes quadratic time for keys of many parts
LONGEST_SHOWN = 200  # characters


class Section:
    """Base of a frozen dataclass that is one section of a configuration, called `section` in messages."""

    section: ClassVar[str]
    exact_integers: ClassVar[bool]  # 1e6 is no int: for JSON, where writers of integers write integers

    def __init_subclass__(cls, section: str, exact_integers: bool = False) -> None:
        cls.section = section
        cls.exact_integers = exact_integers

    def __post_init__(self) -> None:
        prefix = f"{self.section}." if self.section else ""
        for name, annotation in annotations_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            converted = convert(f"{prefix}{name}", value, annotation)
            if self.exact_integers and isinstance(value, float) and isinstance(converted, int):
                reject(f"{prefix}{name}", value, f"it must be {describe(annotation)}")
            object.__setattr__(self, name, converted)

    @classmethod
    def from_dict(cls, table: Any) -> Self:
        """The section from a table of a TOML or JSON file; SoliError where it cannot be one."""
        if not isinstance(table, Mapping):
            raise SoliError(f"the section {cls.section} is {shown(table)}; write a table, [{cls.section}]")
        annotations = annotations_of(cls)  # type: ignore[arg-type]
        reject_unknown(cls.section, table, annotations)
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if item.name not in table and item.default is item.default_factory is dataclasses.MISSING:
                raise SoliError(f"{cls.section}.{item.name} is missing; give it {describe(annotations[item.name])}")
        return cls(**table)


@cache
def annotations_of(cls: Any) -> dict[str, Any]:
    """The annotation of each field of a dataclass, limits included."""
    hints = get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def reject(name: str, value: Any, remedy: str) -> NoReturn:
    """Raise the error of one value: field, value, what to do about it."""
    raise SoliError(f"{name} is {shown(value)}; {remedy}")


def shown(value: Any) -> str:
    """A value for an error: its repr, of a long one the beginning."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists nested a thousand deep
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def reject_unknown(section: str, names: Iterable[str], known: Iterable[str]) -> None:
    """SoliError when a section names fields that it does not have; it lists them, and suggests what was meant."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        fields = ", ".join(f"{section}.{name}" for name in unknown)
        raise SoliError(f"there is no field {fields}; {suggest(unknown[0], known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    by_lower_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f"did you mean {by_lower_case[near[0]]}?" if near else f"choose one of {', '.join(known)}"


def convert(name: str, value: Any, annotation: Any, expected: str | None = None) -> Any:
    """`value` as the type that `annotation` declares; SoliError with field, value and what it must be.

    `expected` is that description where `annotation` is only a part of what the field may hold.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    expected = expected or describe(annotation)
    if annotation is Any:
        return value
    if origin is Annotated:
        number = convert(name, value, arguments[0], expected)
        if not arguments[1].contains(number):
            reject(name, value, f"it must be {expected}")
        return number
    if origin is Union or origin is types.UnionType:
        return _convert_union(name, value, arguments, expected)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            reject(name, value, f"it must be {expected}")
        return value
    if origin is tuple or origin is list:
        return _convert_sequence(name, value, annotation, expected)
    if origin is dict:
        if not isinstance(value, Mapping):
            reject(name, value, f"it must be {expected}")
        return {str(key): convert(f"{name}.{key}", item, arguments[1]) for key, item in value.items()}
    if dataclasses.is_dataclass(annotation):
        return value if isinstance(value, annotation) else annotation.from_dict(value)  # type: ignore[arg-type, union-attr]
    return _convert_scalar(name, value, annotation, expected)


def _convert_scalar(name: str, value: Any, kind: type, expected: str) -> Any:
    if kind is int or kind is float:
        if isinstance(value, float) and not math.isfinite(value):
            reject(name, value, f"it must be finite, {expected}")
        if isinstance(value, int | float) and not isinstance(value, bool) and (kind is float or value == int(value)):
            if abs(value) > (LARGEST_FLOAT if kind is float else LARGEST_INT):
                reject(name, value, f"that is too large; it must be {expected}")
            return kind(value)
    elif type(value) is kind:
        if kind is str and not is_text(value):
            reject(name, value, "it must be text without NUL bytes and half surrogate pairs")
        return value
    reject(name, value, f"it must be {expected}")


def is_text(value: Any) -> bool:
    """Whether a value is text that a file name, a terminal and UTF-8 can hold."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _convert_union(name: str, value: Any, kinds: tuple[Any, ...], expected: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    for kind in kinds[:-1]:
        try:
            return convert(name, value, kind)
        except SoliError:
            continue
    return convert(name, value, kinds[-1], expected)


def _convert_sequence(name: str, value: Any, annotation: Any, expected: str) -> Any:
    kind, arguments = get_origin(annotation), get_args(annotation)
    any_length = kind is list or arguments[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (any_length or len(value) == len(arguments)):
        reject(name, value, f"it must be {expected}")
    kinds = [arguments[0]] * len(value) if any_length else arguments
    return kind(convert(f"{name}[{i}]", item, of) for i, (item, of) in enumerate(zip(value, kinds, strict=True)))


NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


@cache
def describe(annotation: Any) -> str:
    """What a field may hold, as the end of "it must be ..."."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in NOUNS:
        return NOUNS[annotation]
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1]}"
    if origin is Union or origin is types.UnionType:
        return ", or ".join(describe(kind) for kind in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else str(arguments[0])
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list, each item {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} values: {', '.join(describe(kind) for kind in arguments)}"
    return "a table (a JSON object)"


_WORDS = {"null": None, "none": None, "None": None, "True": True, "False": False}


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read `["n_group=1", "rope_scaling=null"]` into a dictionary by name; None for a name that is to be unset."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise SoliError(f"--set {assignment!r} is not of the form FIELD=VALUE")
        if name in values:
            raise SoliError(f"--set gives {name} twice; give it once")
        values[name] = parse_value(text.strip())
    return values


def parse_value(text: str) -> Any:
    """One value: null or none, TOML, else the text itself (dates too, which no field of Soli holds)."""
    if text in _WORDS:
        return _WORDS[text]
    if text.count(".") > TOML_DOTS:
        return text
    try:
        table = tomllib.loads(f"value = {text}")
    except ValueError:  # no TOML, or an integer of thousands of digits
        return text
    except RecursionError:
        raise SoliError(f"--set: the value {shown(text)} is nested too deeply") from None
    value = table.pop("value")
    if is_nested_too_deeply(value):
        raise SoliError(f"--set: the value {shown(text)} is nested too deeply")
    return text if table or isinstance(value, datetime.date | datetime.time) else value
