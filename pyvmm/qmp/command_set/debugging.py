"""gdbserver: pyvmm's own as a QMP command; QEMU has it among its human monitor's (hmp-commands.hx)."""

from __future__ import annotations

from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.debugging import serve_gdb


class GdbserverArguments(QmpStruct):
    """``address``: what --gdb takes, or ``none`` to stop listening. ``tcp:HOST:0`` finds a free port."""

    address: str = "tcp:localhost:1234"


class GdbserverInfo(QmpStruct):
    """Where it listens; absent if it does not."""

    address: str | None = None


@command("gdbserver")
def gdbserver(context: CommandContext, arguments: GdbserverArguments) -> GdbserverInfo:
    """Listen for a debugger. One that is connected at the former address is let go."""
    return GdbserverInfo(address=serve_gdb(context.monitor, arguments.address))
