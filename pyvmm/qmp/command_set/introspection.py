"""Negotiation, and what the monitor can do. These ask nothing of the machine. Source: qapi/control.json."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, Place, all_commands, command
from pyvmm.qmp.errors import QmpError
from pyvmm.qmp.schema import build_schema
from pyvmm.qmp.session import CAPABILITIES
from pyvmm.qmp.version import VersionInfo, version_info


class CapabilitiesArguments(QmpStruct):
    """What to enable of what the greeting offered."""

    enable: list[Literal["oob"]] = msgspec.field(default_factory=list)


class CommandInfo(QmpStruct):
    """One command."""

    name: str


@command("qmp_capabilities", place=Place.MONITOR)
def qmp_capabilities(context: CommandContext, arguments: CapabilitiesArguments) -> None:
    """End the negotiation."""
    missing = set(arguments.enable) - set(CAPABILITIES)
    if missing:
        raise QmpError(f"Capability '{missing.pop()}' is not available")
    context.session.oob = "oob" in arguments.enable
    context.session.negotiated = True


@command("query-version", place=Place.MONITOR, allow_oob=True)
def query_version(context: CommandContext) -> VersionInfo:
    """pyvmm's version in QEMU's structure."""
    return version_info()


@command("query-commands", place=Place.MONITOR)
def query_commands(context: CommandContext) -> list[CommandInfo]:
    """Every command."""
    return [CommandInfo(name=name) for name in sorted(all_commands())]


@command("query-qmp-schema", place=Place.MONITOR)
def query_qmp_schema(context: CommandContext) -> list[Any]:
    """Every command, event and type, in QEMU's introspection format."""
    return build_schema()
