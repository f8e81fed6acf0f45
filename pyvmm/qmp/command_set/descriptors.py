"""Descriptors that a client hands over (SCM_RIGHTS), for URIs like ``fd:NAME``. Source: qapi/misc.json."""

from __future__ import annotations

import os

from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import QmpError


class FdArguments(QmpStruct):
    """The name it goes by."""

    fdname: str


@command("getfd")
def getfd(context: CommandContext, arguments: FdArguments) -> None:
    """Name the descriptor that came with this command."""
    fd = context.session.take_received()
    if fd is None:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")
    try:
        if not arguments.fdname or arguments.fdname[0].isdigit():
            raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
        if not context.monitor.keep_descriptor(arguments.fdname, fd):
            raise QmpError("Too many file descriptors have names; close some with closefd")
    except QmpError:
        os.close(fd)
        raise


@command("closefd")
def closefd(context: CommandContext, arguments: FdArguments) -> None:
    """Close one that was named."""
    fd = context.monitor.take_descriptor(arguments.fdname)
    if fd is None:
        raise QmpError(f"File descriptor named '{arguments.fdname}' not found")
    os.close(fd)
