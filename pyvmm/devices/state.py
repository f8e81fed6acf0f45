"""The one way a device keeps, saves and loads its state.

A device's registers live in one :class:`DeviceState` (a typed msgspec structure), so whatever is state is
saved, without code that could forget a register::

    class PostState(DeviceState):
        code: Byte = 0

    class PostPort(StatefulDevice[PostState]):
        section_id = "post"

        def __init__(self) -> None:
            super().__init__(PostState)

Field values are immutable (int, bool, bytes, str, None), so that what ``save`` returned never changes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from pyvmm.devices.device import Device
from pyvmm.errors import SectionError

Byte = Annotated[int, Meta(ge=0, le=0xFF)]
Word = Annotated[int, Meta(ge=0, le=0xFFFF)]
Nibble = Annotated[int, Meta(ge=0, le=0xF)]


class DeviceState(msgspec.Struct, kw_only=True):
    """Base of a device's registers. The defaults are the power-on values."""

    def problem(self) -> tuple[str, str] | None:
        """(field, what is wrong) if the fields, each valid by itself, contradict each other."""
        return None


S = TypeVar("S", bound=DeviceState)
F = TypeVar("F", bound=msgspec.Struct)


def decode_state(section: str, state_type: type[S], data: object) -> S:
    """``data`` (hostile) as a ``state_type``.

    Raises SectionError naming ``section`` and the field that is unknown, missing, ill-typed, out of range or
    contradicts another one.
    """
    state = decode_fields(section, state_type, data)
    problem = state.problem()
    if problem is not None:
        raise SectionError(section, *problem)
    return state


def decode_fields(section: str, record_type: type[F], data: object) -> F:
    """``data`` (hostile) as a ``record_type``, whose fields may themselves be records, tuples and dicts.

    Raises SectionError naming ``section`` and the field that is unknown, missing, ill-typed, out of range or wider
    than 64 bits; a field inside a field by its path. Defaults do not count: saved state says everything.
    """
    if not isinstance(data, dict):
        raise SectionError(section, "(state)", f"expected a mapping, got {type(data).__name__}")
    try:
        # Loading counts in a migration's downtime, and what a machine saved itself passes here, at C speed: a record
        # that is written as the same bytes as what was given has it all, and msgpack has no more than 64 bits.
        record = msgspec.convert(data, record_type, builtin_types=(bytes,))
        if msgspec.msgpack.encode(record) == msgspec.msgpack.encode(data):
            return record
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError, RecursionError):
        pass  # what exactly is wrong is found out one by one
    fields = {field.name: field.type for field in msgspec.structs.fields(record_type)}
    for name in data:
        if name not in fields:
            raise SectionError(section, str(name)[:60], "unknown field")
    values: dict[str, Any] = {}
    for name, kind in fields.items():
        if name not in data:
            raise SectionError(section, name, "missing")
        try:
            values[name] = msgspec.convert(data[name], kind, builtin_types=(bytes,))
        except msgspec.ValidationError as error:
            raise SectionError(section, name, str(error)) from None
        _compare(section, name, data[name], values[name])
    return record_type(**values)


def _compare(section: str, path: str, given: Any, taken: Any) -> None:
    """Refuse what msgspec lets pass: fields that it dropped or filled in, integers of more than 64 bits."""
    if isinstance(taken, msgspec.Struct):
        taken = msgspec.structs.asdict(taken)
        for name in given:
            if name not in taken:
                raise SectionError(section, f"{path}.{str(name)[:60]}", "unknown field")
        for name, value in taken.items():
            if name not in given:
                raise SectionError(section, f"{path}.{name}", "missing")
            _compare(section, f"{path}.{name}", given[name], value)
    elif isinstance(taken, dict):
        for key in taken:
            _compare(section, f"{path}[{key}]", key, key)
            _compare(section, f"{path}[{key}]", given[key], taken[key])
    elif isinstance(taken, list | tuple):
        for index, value in enumerate(taken):
            _compare(section, f"{path}[{index}]", given[index], value)
    elif isinstance(taken, int) and not -(1 << 63) <= taken < 1 << 64:
        raise SectionError(section, path, "more than 64 bits")


class StatefulDevice(Device, Generic[S]):
    """A device whose whole state is ``self.state``; saving, loading and reset follow from that."""

    def __init__(self, state_type: type[S]) -> None:
        super().__init__()
        self._state_type = state_type
        self.state: S = state_type()

    def save(self) -> dict[str, Any]:
        """The registers, by name."""
        with self.lock:
            return msgspec.structs.asdict(self.state)

    def prepare_load(self, state: dict[str, Any]) -> Callable[[], None]:
        """As :meth:`Device.prepare_load`."""
        decoded = decode_state(self.section_id, self._state_type, state)

        def apply() -> None:
            with self.lock:
                self.state = decoded
                self.state_replaced()

        return apply

    def reset(self) -> None:
        """Back to the power-on values."""
        with self.lock:
            self.state = self._state_type()
            self.state_replaced()

    def state_replaced(self) -> None:
        """Called, with the lock held, after ``self.state`` was replaced: drive again what follows from it."""
