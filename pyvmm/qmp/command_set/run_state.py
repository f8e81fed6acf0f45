"""Stop, go on, reset, power down, quit. Source: qapi/run-state.json, qapi/misc.json, qapi/machine.json."""

from __future__ import annotations

from typing import Literal

from pyvmm.machine.ending import Ending
from pyvmm.machine.run_state import RunState
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import QmpError

# QEMU's RunState; pyvmm has those of pyvmm/machine/run_state.py.
RunStateName = Literal[
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch", "finish-migrate",
    "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog", "guest-panicked", "colo",
]  # fmt: skip
ENDED = frozenset({RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR})


class StatusInfo(QmpStruct):
    """The run state. ``singlestep`` is QEMU's; nothing here steps."""

    status: RunStateName
    singlestep: bool
    running: bool


def status_of(state: RunState) -> StatusInfo:
    """``state`` as query-status tells it."""
    name: RunStateName = state.value
    return StatusInfo(status=name, singlestep=False, running=state is RunState.RUNNING)


@command("query-status", allow_oob=True)
def query_status(context: CommandContext) -> StatusInfo:
    """What the machine is doing. Out-of-band, too: a loop that is stuck does not hide it."""
    return status_of(context.machine.run_state)


@command("stop")
def stop(context: CommandContext) -> None:
    """Stop the vCPUs; nothing to do where they do not run."""
    state = context.machine.run_state
    if state is RunState.RUNNING or (state is RunState.COLO and context.monitor.migration.outgoing is not None):
        context.machine.pause()  # for good, if it only stood still for a checkpoint


@command("cont")
def cont(context: CommandContext) -> None:
    """Let the vCPUs run."""
    state = context.machine.run_state
    if state in ENDED:
        raise QmpError("Resetting the Virtual Machine is required")
    if state is RunState.COLO and context.monitor.migration.outgoing is not None:
        return  # it stands still for a checkpoint, and goes on by itself
    if state is not RunState.RUNNING:
        context.monitor.migration.before_resume()
        context.machine.resume()


@command("system_reset")
def system_reset(context: CommandContext) -> None:
    """A power-on anew; one that has ended (--no-shutdown) is ready to run again then."""
    if context.machine.run_state in (RunState.INMIGRATE, RunState.POSTMIGRATE):
        raise QmpError("The guest is not here: it is expected from, or went to, another machine")
    if context.monitor.migration.standing_still:
        raise QmpError("There's a migration process in progress")
    context.machine.request_reset("QMP system_reset", by_guest=False)


@command("system_powerdown")
def system_powerdown(context: CommandContext) -> None:
    """Press the ACPI power button; what becomes of it is the guest's choice."""
    context.machine.power_button()
    context.monitor.emit("POWERDOWN")


@command("quit", allow_oob=True)
def quit_(context: CommandContext) -> None:
    """End the process, in order, with status 0."""
    context.machine.request_end(Ending(kind="quit", reason="quit by QMP", asked_by="qmp"))
