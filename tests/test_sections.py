"""The reader of configuration sections: every annotation accepts what it declares and rejects the rest by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soli.errors import SoliError
from soli.sections import Bounds, PositiveInt, Section, Share, annotations_of, describe


@dataclass(frozen=True)
class Inner(Section, section="outer.inner"):
    depth: int = 0


@dataclass(frozen=True)
class Outer(Section, section="outer"):
    size: PositiveInt
    rate: float = 0.5
    share: Share = 0.0
    on: bool = False
    name: str = ""
    mode: Literal["fast", "exact"] = "fast"
    limit: Annotated[int, Bounds(at_least=2, at_most=9)] | None = None
    names: tuple[str, ...] = ()
    steps: tuple[tuple[PositiveInt, float], ...] = ()
    weights: dict[str, Share] = field(default_factory=dict)
    tokens: int | list[int] | None = None
    inner: Inner = field(default_factory=Inner)
    anything: dict[str, Any] | None = None


@pytest.mark.parametrize(
    ("table", "name", "value"),
    [
        ({"size": 1e6}, "size", 1_000_000),
        ({"rate": 1}, "rate", 1.0),
        ({"limit": None}, "limit", None),
        ({"names": ["a", "b"]}, "names", ("a", "b")),
        ({"steps": [[3, 1]]}, "steps", ((3, 1.0),)),
        ({"weights": {"a": 1}}, "weights", {"a": 1.0}),
        ({"tokens": [1, 2]}, "tokens", [1, 2]),
        ({"tokens": 3}, "tokens", 3),
        ({"inner": {"depth": 2}}, "inner", Inner(2)),
        ({"anything": {"x": [None]}}, "anything", {"x": [None]}),
    ],
)
def test_values_take_their_declared_type(table, name, value):
    section = Outer.from_dict({"size": 1, **table})
    assert getattr(section, name) == value and type(getattr(section, name)) is type(value)
    assert Outer(**{"size": 1, **table}) == section


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"size": 0}, "outer.size is 0; it must be a whole number above 0"),
        ({"size": 1.5}, "outer.size is 1.5; it must be a whole number above 0"),
        ({"size": True}, "outer.size is True; it must be a whole number above 0"),
        ({"size": None}, "outer.size is None; it must be a whole number above 0"),
        ({"rate": math.nan}, "outer.rate is nan; it must be finite, a number"),
        ({"rate": "fast"}, "outer.rate is 'fast'; it must be a number"),
        ({"share": 1.5}, "outer.share is 1.5; it must be a number from 0 to 1"),
        ({"on": 1}, "outer.on is 1; it must be true or false"),
        ({"name": 3}, "outer.name is 3; it must be text"),
        ({"mode": "slow"}, "outer.mode is 'slow'; it must be one of fast, exact"),
        ({"mode": ["fast"]}, "outer.mode is ['fast']; it must be one of fast, exact"),
        ({"limit": 1}, "outer.limit is 1; it must be a whole number from 2 to 9, or null"),
        ({"names": "ruth"}, "outer.names is 'ruth'; it must be a list, each item text"),
        ({"names": ["a", 1]}, "outer.names[1] is 1; it must be text"),
        ({"steps": [[1, 2, 3]]}, "outer.steps[0] is [1, 2, 3]; it must be a list of 2 values: a whole number above 0"),
        ({"steps": [[0, 1]]}, "outer.steps[0][0] is 0; it must be a whole number above 0"),
        ({"weights": {"a": -1}}, "outer.weights.a is -1; it must be a number from 0 to 1"),
        ({"weights": 3}, "outer.weights is 3; it must be a table"),
        ({"tokens": "x"}, "tokens is 'x'; it must be a whole number, or a list, each item a whole number, or null"),
        ({"inner": {"dept": 2}}, "there is no field outer.inner.dept; did you mean depth?"),
        ({"inner": 2}, "the section outer.inner is 2; write a table"),
        ({"siz": 2}, "there is no field outer.siz; did you mean size?"),
        ({"zzz": 2, "qqq": 1}, "there is no field outer.zzz, outer.qqq; choose one of size, rate,"),
    ],
)
def test_a_bad_value_is_rejected_with_section_field_value_and_remedy(table, message):
    with pytest.raises(SoliError) as error:
        Outer.from_dict({"size": 1, **table})
    assert message in str(error.value)


def test_a_missing_field_and_a_section_that_is_no_table_are_named():
    with pytest.raises(SoliError, match=r"outer.size is missing; give it a whole number above 0"):
        Outer.from_dict({})
    with pytest.raises(SoliError, match=r"the section outer is 3; write a table, \[outer\]"):
        Outer.from_dict(3)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(list(annotations_of(Outer))), json_values, max_size=3))
def test_any_table_is_read_or_rejected_in_a_sentence(table):
    try:
        section = Outer.from_dict({"size": 1, **table})
    except SoliError as error:
        assert str(error).startswith(("outer", "the section", "there is no field"))
    else:
        assert Outer.from_dict(vars(section)) == section


def test_every_annotation_is_described():
    assert all(isinstance(describe(annotation), str) for annotation in annotations_of(Outer).values())
