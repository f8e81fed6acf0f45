"""Trace events at run time: groups (one per folder), events, and the sinks they go to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyvmm.trace.parser import EventDeclaration, parse_trace_events

Sink = Callable[["Event", tuple[Any, ...]], None]

_PACKAGE = Path(__file__).resolve().parent.parent
_groups: dict[str, TraceGroup] = {}


class Event:
    """One declared event. ``on`` is tested at the call site; calling it hands it to every sink."""

    __slots__ = ("declaration", "group", "name", "on", "sinks")

    def __init__(self, group: str, declaration: EventDeclaration) -> None:
        self.group = group
        self.name = declaration.name
        self.declaration = declaration
        self.on = False
        self.sinks: list[Sink] = []

    def __call__(self, *values: Any) -> None:
        for sink in self.sinks:
            sink(self, values)


class TraceGroup:
    """The events of one folder, as attributes named after the event."""

    def __init__(self, name: str, declarations: list[EventDeclaration]) -> None:
        self.name = name
        self.events = {d.name: Event(name, d) for d in declarations}

    def __getattr__(self, name: str) -> Event:
        try:
            return self.events[name]
        except KeyError:
            raise AttributeError(f"trace event {name!r} is not declared in {self.name}/trace-events") from None


def trace_group(name: str) -> TraceGroup:
    """The group of folder ``name`` (slashes for nested folders, relative to the package)."""
    group = _groups.get(name)
    if group is None:
        path = _PACKAGE / name / "trace-events"
        group = _groups[name] = TraceGroup(name, parse_trace_events(path))
    return group
