"""Arguments against their declaration: QEMU's sentences, and nothing that passes by mistake."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.qmp.arguments import QmpStruct, parse_arguments
from pyvmm.qmp.errors import QmpError


class Inner(QmpStruct):
    deep_one: int


class Sample(QmpStruct):
    val: int
    file_name: str
    cpu_index: Annotated[int, msgspec.Meta(ge=0, le=7)] | None = None
    format: Literal["elf", "raw"] = "elf"
    flag: bool = False
    ratio: float = 0.0
    inner: Inner | None = None
    many: list[Inner] = msgspec.field(default_factory=list)


GOOD = {"val": 1, "file-name": "x"}


def test_names_are_those_of_the_protocol_and_defaults_fill_in() -> None:
    parsed = parse_arguments(Sample, GOOD | {"cpu-index": 3, "inner": {"deep-one": 5}, "many": [{"deep-one": 6}]})
    assert (parsed.val, parsed.file_name, parsed.cpu_index, parsed.format) == (1, "x", 3, "elf")
    assert (parsed.inner.deep_one, parsed.many[0].deep_one, parsed.flag) == (5, 6, False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": 1}, "Parameter 'x' is unexpected"),
        ({"file_name": "y"}, "Parameter 'file_name' is unexpected"),
        ({"val": "a"}, "Invalid parameter type for 'val', expected: integer"),
        ({"val": True}, "Invalid parameter type for 'val', expected: integer"),
        ({"val": 1.0}, "Invalid parameter type for 'val', expected: integer"),
        ({"val": None}, "Invalid parameter type for 'val', expected: integer"),
        ({"val": 1 << 64}, "Invalid parameter type for 'val', expected: integer"),
        ({"file-name": 1}, "Invalid parameter type for 'file-name', expected: string"),
        ({"cpu-index": 8}, "Parameter 'cpu-index' expects a number from 0 to 7"),
        ({"cpu-index": None}, "Invalid parameter type for 'cpu-index', expected: integer"),
        ({"format": "zip"}, "Parameter 'format' does not accept value 'zip'"),
        ({"flag": 1}, "Invalid parameter type for 'flag', expected: boolean"),
        ({"ratio": "1"}, "Invalid parameter type for 'ratio', expected: number"),
        ({"inner": []}, "Invalid parameter type for 'inner', expected: object"),
        ({"inner": {}}, "Parameter 'inner.deep-one' is missing"),
        ({"many": {}}, "Invalid parameter type for 'many', expected: array"),
        ({"many": [{"deep-one": 1}, {"deep-one": "x"}]},
         "Invalid parameter type for 'many[1].deep-one', expected: integer"),
    ],
)  # fmt: skip
def test_mistakes_in_qemus_words(change: dict[str, Any], text: str) -> None:
    with pytest.raises(QmpError) as caught:
        parse_arguments(Sample, GOOD | change)
    assert str(caught.value) == text


def test_a_missing_member_is_told_before_one_too_much() -> None:
    with pytest.raises(QmpError, match=r"^Parameter 'file-name' is missing$"):
        parse_arguments(Sample, {"val": 1, "x": 2})


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["val", "file-name", "cpu-index", "format", "flag", "inner", "zz"]), ANY))
def test_whatever_comes_is_taken_whole_or_refused(values: dict[str, Any]) -> None:
    try:
        parsed = parse_arguments(Sample, values)
    except QmpError:
        return
    assert type(parsed.val) is int and type(parsed.file_name) is str and type(parsed.flag) is bool
    assert parsed.format in ("elf", "raw") and parsed.inner is None and "zz" not in values
