"""The registry of commands. Adding one is a function in a file of ``command_set/``::

    class MigrateArguments(QmpStruct):
        uri: str
        detach: bool = False

    @command("migrate")
    def migrate(context: CommandContext, arguments: MigrateArguments) -> None:
        ...

Its annotations are what clients see in ``query-qmp-schema``: a QmpStruct of arguments (or no second parameter), and
what it returns (None, a QmpStruct, a list, a str...). It raises QmpError, or any PyvmmError, to refuse.
"""

from __future__ import annotations

import enum
import importlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from pyvmm.errors import PyvmmError
from pyvmm.machine.run_state import RunState
from pyvmm.qmp.arguments import NoArguments, parse_arguments
from pyvmm.qmp.errors import ErrorClass, QmpError

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.qmp.monitor import Monitor
    from pyvmm.qmp.session import Session

COMMAND_SETS = (
    "introspection", "run_state", "machine_facts", "memory", "tracing", "human_monitor", "devices", "descriptors",
    "snapshots", "migration", "colo", "debugging", "statistics", "disk_sums",
)  # fmt: skip
"""Modules of ``command_set/``."""


class Place(enum.Enum):
    """Which thread carries a command out when it comes in its order."""

    LOOP = "loop"
    """The machine's: the only one that may change its run state."""
    MONITOR = "monitor"
    """The monitor's own: commands that ask nothing of the machine."""


@dataclass(frozen=True)
class CommandContext:
    """What a handler works on."""

    machine: Machine
    monitor: Monitor
    session: Session


@dataclass(frozen=True)
class Command:
    """One registered command. ``states``: the run states it may be given in, ``None`` for all."""

    name: str
    handler: Callable[..., Any]
    arguments: type[Any]
    takes_arguments: bool
    returns: Any
    allow_oob: bool
    place: Place
    states: frozenset[RunState] | None


_commands: dict[str, Command] = {}


def command(
    name: str, *, allow_oob: bool = False, place: Place = Place.LOOP, states: frozenset[RunState] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler under QMP's ``name``.

    With ``allow_oob`` it may also be given by ``exec-oob``; it then runs in the monitor's thread, while the loop does
    something else, and must not wait for the loop.
    """

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _commands[name] = _described(name, handler, allow_oob, place, states)
        return handler

    return register


def _described(
    name: str, handler: Callable[..., Any], allow_oob: bool, place: Place, states: frozenset[RunState] | None
) -> Command:
    if name in _commands:
        raise ValueError(f"QMP command {name!r} is registered twice")
    hints = typing.get_type_hints(handler, include_extras=True)
    returns = hints.pop("return")
    _context, *arguments = hints.values()
    return Command(
        name=name,
        handler=handler,
        arguments=arguments[0] if arguments else NoArguments,
        takes_arguments=bool(arguments),
        returns=returns,
        allow_oob=allow_oob,
        place=place,
        states=states,
    )


def all_commands() -> dict[str, Command]:
    """Every command by name."""
    for name in COMMAND_SETS:
        importlib.import_module(f"pyvmm.qmp.command_set.{name}")
    return _commands


def find_command(name: str) -> Command:
    """The command ``name``; QmpError CommandNotFound."""
    found = all_commands().get(name)
    if found is None:
        raise QmpError(f"The command {name} has not been found", ErrorClass.COMMAND_NOT_FOUND)
    return found


def carry_out(found: Command, context: CommandContext, arguments: dict[str, Any]) -> Any:
    """Call the handler; the JSON-ready ``return`` member. Every deliberate refusal comes out as a QmpError."""
    if found.states is not None and context.machine.run_state not in found.states:
        state = context.machine.run_state.value
        raise QmpError(f"The command {found.name} is not available while the machine is {state}")
    values = parse_arguments(found.arguments, arguments)
    try:
        result = found.handler(context, values) if found.takes_arguments else found.handler(context)
    except QmpError:
        raise
    except PyvmmError as error:
        raise QmpError(str(error)) from error
    return {} if result is None else msgspec.to_builtins(result)
