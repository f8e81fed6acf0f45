"""Trace events of a running machine. Source: qapi/trace.json.

What is turned on goes to the files of ``--trace``; without any, to standard error as a log.
"""

from __future__ import annotations

from typing import Literal

from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import QmpError
from pyvmm.trace import control


class GetStateArguments(QmpStruct):
    """``name``: an event's, or a pattern."""

    name: str


class SetStateArguments(QmpStruct):
    """``ignore-unavailable`` is QEMU's; every declared event is available here."""

    name: str
    enable: bool
    ignore_unavailable: bool = False


class TraceEventInfo(QmpStruct):
    """One event."""

    name: str
    state: Literal["unavailable", "disabled", "enabled"]
    vcpu: bool


@command("trace-event-get-state")
def trace_event_get_state(context: CommandContext, arguments: GetStateArguments) -> list[TraceEventInfo]:
    """The events that match, in the order of their names."""
    return [
        TraceEventInfo(name=name, state="enabled" if on else "disabled", vcpu=False)
        for name, on in sorted(_matching(arguments.name).items())
    ]


@command("trace-event-set-state")
def trace_event_set_state(context: CommandContext, arguments: SetStateArguments) -> None:
    """Turn all that match on or off."""
    names = list(_matching(arguments.name))
    if names:
        control.switch(names, arguments.enable)


def _matching(pattern: str) -> dict[str, bool]:
    found = control.states(pattern)
    if not found and not any(mark in pattern for mark in "*?["):
        raise QmpError(f'unknown event "{pattern}"')
    return found
