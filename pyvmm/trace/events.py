"""Trace events at run time: groups (one per folder), events, and the sinks they go to.

Threads: a call site reads ``on`` and ``sinks`` without a lock; both are replaced, never changed in place.
Groups are made under ``registry_lock``, which also protects what control.py knows of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyvmm.errors import ConfigError
from pyvmm.trace.parser import EventDeclaration, parse_trace_events

Sink = Callable[["Event", tuple[Any, ...]], None]

PACKAGE = Path(__file__).resolve().parent.parent
registry_lock = threading.RLock()
_groups: dict[str, TraceGroup] = {}
_new_group: Callable[[TraceGroup], None] | None = None


class Event:
    """One declared event. ``on`` is tested at the call site; calling it hands it to every sink."""

    __slots__ = ("declaration", "group", "name", "on", "sinks")

    def __init__(self, group: str, declaration: EventDeclaration) -> None:
        self.group = group
        self.name = declaration.name
        self.declaration = declaration
        self.on = False
        self.sinks: tuple[Sink, ...] = ()

    def __call__(self, *values: Any) -> None:
        for sink in self.sinks:
            sink(self, values)

    def set_sinks(self, sinks: tuple[Sink, ...]) -> None:
        """Where the event goes from now on; nowhere turns it off."""
        self.sinks = sinks
        self.on = bool(sinks)

    def text(self, values: tuple[Any, ...]) -> str:
        """``values`` in the declared format. Never raises: a trace must not change what it watches."""
        try:
            return self.declaration.format % values
        except (TypeError, ValueError, OverflowError):
            return f"{values!r} does not fit {self.declaration.format!r}"


class TraceGroup:
    """The events of one folder, as attributes named after the event."""

    def __init__(self, name: str, declarations: list[EventDeclaration]) -> None:
        self._name = name
        self._events = {d.name: Event(name, d) for d in declarations}
        for event in self._events.values():
            if event.name.startswith("_"):
                raise ConfigError(f"{name}/trace-events: {event.name!r} must not start with an underscore")
        # Real attributes, so that T.event is one dictionary look-up; __getattr__ is only for mypy and mistakes.
        self.__dict__.update(self._events)

    def __getattr__(self, name: str) -> Event:
        raise AttributeError(f"trace event {name!r} is not declared in {self._name}/trace-events")


def group_events(group: TraceGroup) -> dict[str, Event]:
    """All events of ``group`` by name (not an attribute of it, since those are the events)."""
    return group._events


def trace_group(name: str) -> TraceGroup:
    """The group of folder ``name`` (slashes for nested folders, relative to the package)."""
    with registry_lock:
        group = _groups.get(name)
        if group is None:
            group = TraceGroup(name, parse_trace_events(PACKAGE / name / "trace-events"))
            _groups[name] = group
            if _new_group is not None:
                _new_group(group)
        return group


def groups_and_later_ones(then: Callable[[TraceGroup], None]) -> list[TraceGroup]:
    """The groups there are; ``then`` is called with each one made later (by a later import)."""
    global _new_group
    with registry_lock:
        _new_group = then
        return list(_groups.values())


def all_declared_events() -> dict[str, EventDeclaration]:
    """Every event that the package declares, by name, whether its module was imported yet or not."""
    found: dict[str, EventDeclaration] = {}
    for path in sorted(PACKAGE.rglob("trace-events")):
        for declaration in parse_trace_events(path):
            if declaration.name in found:
                raise ConfigError(f"{path}: trace event {declaration.name!r} is declared in another folder, too")
            found[declaration.name] = declaration
    return found
