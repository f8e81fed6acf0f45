"""query-qmp-schema: the registry and the events in QEMU's introspection format.

Source: qapi/introspect.json (SchemaInfo). Types that have a name on the wire (``int``, ``str``...) keep it; others are
numbered, as QEMU masks its own: clients find them by following references.
"""

from __future__ import annotations

import types
import typing
from typing import Any

import msgspec
from msgspec import inspect as shape

from pyvmm.qmp.arguments import NoArguments, fields_of, without_none
from pyvmm.qmp.commands import all_commands
from pyvmm.qmp.events import EVENTS

_BUILTINS = {"int": "int", "str": "string", "bool": "boolean", "number": "number", "any": "value"}


class _Schema:
    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._names: dict[Any, str] = {}

    def add(self, **entry: Any) -> None:
        self.entries.append({key.replace("_", "-"): value for key, value in entry.items()})

    def name_of(self, kind: shape.Type) -> str:
        """The name of a type; entries for it are added the first time."""
        kind = without_none(kind)
        simple: dict[type[shape.Type], str] = {
            shape.IntType: "int", shape.StrType: "str", shape.BoolType: "bool",
            shape.FloatType: "number", shape.AnyType: "any",
        }  # fmt: skip
        builtin = simple.get(type(kind))
        if builtin is not None:
            return self._builtin(builtin)
        if isinstance(kind, shape.ListType):
            element = self.name_of(kind.item_type)
            return self._once(f"[{element}]", f"[{element}]", meta_type="array", element_type=element)
        if isinstance(kind, shape.LiteralType):
            values = [str(value) for value in kind.values]
            members = [{"name": value} for value in values]
            return self._once(kind.values, None, meta_type="enum", values=values, members=members)
        if isinstance(kind, shape.StructType):
            return self.struct(kind.cls)
        raise TypeError(f"{kind} is no type that QMP has")

    def struct(self, struct: type[Any]) -> str:
        members = []
        if struct not in self._names:
            for field in fields_of(struct):
                member: dict[str, Any] = {"name": field.encode_name, "type": self.name_of(field.type)}
                members.append(member if field.required else member | {"default": None})
        return self._once(struct, None, meta_type="object", members=members)

    def _builtin(self, name: str) -> str:
        return self._once(name, name, meta_type="builtin", json_type=_BUILTINS[name])

    def _once(self, key: Any, name: str | None, **entry: Any) -> str:
        if key not in self._names:
            self._names[key] = name or str(sum(found.isdecimal() for found in self._names.values()))
            self.add(name=self._names[key], **entry)
        return self._names[key]


def build_schema() -> list[dict[str, Any]]:
    """All SchemaInfo entries."""
    schema = _Schema()
    empty = schema.struct(NoArguments)
    for name, found in sorted(all_commands().items()):
        oob = {"allow_oob": True} if found.allow_oob else {}
        arguments = schema.struct(found.arguments) if found.takes_arguments else empty
        returns = empty if found.returns is types.NoneType else schema.name_of(_type_of(found.returns))
        schema.add(name=name, meta_type="command", arg_type=arguments, ret_type=returns, **oob)
    for name, data in sorted(EVENTS.items()):
        schema.add(name=name, meta_type="event", arg_type=empty if data is None else schema.struct(data))
    return schema.entries


def _type_of(annotation: Any) -> shape.Type:
    if typing.get_origin(annotation) is types.UnionType:
        raise TypeError(f"{annotation}: what a command returns has one type")
    return msgspec.inspect.type_info(annotation)
