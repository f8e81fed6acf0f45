"""Arguments of a command: declared as a msgspec struct, checked with the sentences QEMU uses, in its order.

A struct's fields are read by QMP's names (``cpu_index`` is ``cpu-index``). An optional member is a field with a
default; ``null`` is no way to leave a member out. Source of the sentences: qapi/qobject-input-visitor.c's errors as
QEMU 7.2 sends them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import inspect as shape

from pyvmm.qmp.errors import QmpError

INT_MIN, INT_MAX = -(1 << 63), (1 << 64) - 1

_fields: dict[type[Any], tuple[shape.Field, ...]] = {}


class QmpStruct(msgspec.Struct, rename="kebab", omit_defaults=True, kw_only=True):
    """Base of everything that goes over the wire. An answer leaves out what has its default."""


class NoArguments(QmpStruct):
    """For commands that take none."""


def fields_of(struct: type[Any]) -> tuple[shape.Field, ...]:
    """The fields of ``struct`` as msgspec sees them."""
    if struct not in _fields:
        described = shape.type_info(struct)
        assert isinstance(described, shape.StructType)
        _fields[struct] = described.fields
    return _fields[struct]




def without_none(kind: shape.Type) -> shape.Type:
    """``X`` of ``X | None``: None is only how Python says that an optional member is missing."""
    if isinstance(kind, shape.UnionType):
        rest = [one for one in kind.types if not isinstance(one, shape.NoneType)]
        assert len(rest) == 1, "QMP members have one type"
        return rest[0]
    if isinstance(kind, shape.Metadata):
        return without_none(kind.type)
    return kind


def parse_arguments(struct: type[Any], values: dict[str, Any], prefix: str = "") -> Any:
    """``struct`` made from ``values``; QmpError in QEMU's words for a member that is missing, wrong or too much."""
    found: dict[str, Any] = {}
    left = dict(values)
    for field in fields_of(struct):
        name = field.encode_name
        if name in left:
            found[field.name] = _convert(without_none(field.type), left.pop(name), prefix + name)
        elif field.required:
            raise QmpError(f"Parameter '{prefix}{name}' is missing")
    for name in left:
        raise QmpError(f"Parameter '{prefix}{name}' is unexpected")
    return struct(**found)


def _convert(kind: shape.Type, value: Any, name: str) -> Any:
    expected: str
    if isinstance(kind, shape.IntType):
        if type(value) is int and INT_MIN <= value <= INT_MAX:
            return _bounded(kind, value, name)
        expected = "integer"
    elif isinstance(kind, shape.FloatType):
        if type(value) in (int, float):
            return float(value)
        expected = "number"
    elif isinstance(kind, shape.BoolType):
        if type(value) is bool:
            return value
        expected = "boolean"
    elif isinstance(kind, shape.StrType):
        if type(value) is str:
            return value
        expected = "string"
    elif isinstance(kind, shape.LiteralType):
        if type(value) is str:
            if value in kind.values:
                return value
            raise QmpError(f"Parameter '{name}' does not accept value '{value}'")
        expected = "string"
    elif isinstance(kind, shape.ListType):
        if type(value) is list:
            return [_convert(kind.item_type, one, f"{name}[{number}]") for number, one in enumerate(value)]
        expected = "array"
    elif isinstance(kind, shape.StructType):
        if type(value) is dict:
            return parse_arguments(kind.cls, value, f"{name}.")
        expected = "object"
    elif isinstance(kind, shape.AnyType):
        return value
    else:
        raise TypeError(f"{name}: {kind} is no type that QMP has")
    raise QmpError(f"Invalid parameter type for '{name}', expected: {expected}")


def _bounded(kind: shape.IntType, value: int, name: str) -> int:
    if (kind.ge is not None and value < kind.ge) or (kind.le is not None and value > kind.le):
        low = INT_MIN if kind.ge is None else kind.ge
        high = INT_MAX if kind.le is None else kind.le
        raise QmpError(f"Parameter '{name}' expects a number from {low} to {high}")
    return value
