"""Python's structs and error codes are those of the compiled library; one that differs is rejected by name."""

import ctypes
import re
from pathlib import Path

import pytest

import soli.kernels.cpu
from soli.errors import SoliError
from soli.kernels.cpu import native, structs
from tests.kernels.weights import needs_kernels

CSRC = Path(soli.kernels.cpu.__file__).with_name("csrc")


@pytest.fixture
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(native.library().path))


def changed(struct: type[ctypes.Structure], fields: tuple) -> dict[str, type[ctypes.Structure]]:
    name = struct.__name__.removeprefix("C")
    return {**structs.STRUCTS, name: type(struct.__name__, (ctypes.Structure,), {"_fields_": fields})}


@needs_kernels
def test_the_structs_of_the_library_are_those_of_python(library) -> None:
    structs.check(library)


@needs_kernels
@pytest.mark.parametrize("name", structs.STRUCTS)
def test_a_swapped_or_an_extra_or_a_renamed_field_is_rejected_by_name(library, name) -> None:
    struct = structs.STRUCTS[name]
    fields = tuple(struct._fields_)
    renamed = (("other", fields[0][1]), *fields[1:])
    for wrong in (fields[::-1], (*fields, ("extra", ctypes.c_int64)), fields[1:], renamed):
        with pytest.raises(SoliError, match=rf"struct {name} of csrc/ and class C{name} of .* differ"):
            structs.check(library, changed(struct, wrong))


@needs_kernels
def test_a_struct_that_one_side_lacks_is_rejected_by_name(library) -> None:
    without = {name: struct for name, struct in structs.STRUCTS.items() if name != "Router"}
    with pytest.raises(SoliError, match=r"struct Router is missing in kernels/cpu/structs.py"):
        structs.check(library, without)
    with pytest.raises(SoliError, match=r"struct Other is missing in csrc/struct_layouts.cpp"):
        structs.check(library, {**structs.STRUCTS, "Other": structs.CNorm})


def test_every_ctypes_struct_that_a_call_takes_is_checked() -> None:
    classes = {value for value in vars(structs).values() if isinstance(value, type(ctypes.Structure))}
    assert classes - {ctypes.Structure, structs.CStructLayout} == set(structs.STRUCTS.values())


def test_loading_checks_the_structs(monkeypatch) -> None:
    def reject(library: ctypes.CDLL) -> None:
        raise SoliError("struct Router differs")

    monkeypatch.setattr(structs, "check", reject)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)
    with pytest.raises(SoliError, match="struct Router"):
        native.open_library(Path("soli_cpu.so"))


def test_error_codes_formats_and_dtypes_have_the_numbers_of_the_header() -> None:
    source = (CSRC / "kernels.h").read_text(encoding="utf-8")
    enums = {
        name: [value.strip() for value in re.sub(r"//[^\n]*", "", body).split(",") if value.strip()]
        for name, body in re.findall(r"enum (\w+) \{(.*?)\}", source, re.DOTALL)
    }
    assert enums["ErrorCode"] == list(native.ERRORS)
    assert [name.lower() for name in enums["Format"][:-1]] == list(native.FORMATS)
    assert list(native.FORMATS.values()) == list(range(len(native.FORMATS)))
    assert len(enums["Dtype"]) == len(native.DTYPES)
