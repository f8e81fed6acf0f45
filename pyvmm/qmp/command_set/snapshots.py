"""Snapshots of the whole machine but its disks. QEMU's commands of these names are jobs that write into disk images.

Source: qapi/migration.json (snapshot-save, snapshot-load); here ``tag`` names a file (migration/snapshot_store.py) and
the command is done when it answers.
"""

from __future__ import annotations

from typing import Literal

from pyvmm.machine.run_state import RunState
from pyvmm.migration.snapshot import restore_snapshot, save_snapshot
from pyvmm.migration.snapshot_store import snapshot_path
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command

_STANDING = frozenset({RunState.PRELAUNCH, RunState.RUNNING, RunState.PAUSED})


class SnapshotSaveArguments(QmpStruct):
    """``tag``: a name, or an absolute path; ``base``: one that exists, to store only what differs from it."""

    tag: str
    description: str = ""
    base: str | None = None
    compress: Literal["none", "zstd"] = "none"


class SnapshotLoadArguments(QmpStruct):
    """``tag`` as for saving; ``verify`` reads all RAM first to check it."""

    tag: str
    verify: bool = False


class SnapshotInfo(QmpStruct):
    """What was written or loaded."""

    path: str
    id: str
    pages: int


@command("snapshot-save", states=_STANDING)
def snapshot_save(context: CommandContext, arguments: SnapshotSaveArguments) -> SnapshotInfo:
    """Write a snapshot; a running machine stands still meanwhile."""
    context.monitor.migration.refuse_while_under_way()
    path = snapshot_path(arguments.tag, make_folder=True)
    base = snapshot_path(arguments.base) if arguments.base is not None else None
    header = save_snapshot(
        context.machine, path, description=arguments.description, base=base, compress=arguments.compress
    )
    return SnapshotInfo(path=path, id=header.id, pages=sum(part.pages for part in header.ram))


@command("snapshot-load", states=_STANDING)
def snapshot_load(context: CommandContext, arguments: SnapshotLoadArguments) -> SnapshotInfo:
    """Put the machine back to a snapshot. It goes on from there if it ran when it was told to."""
    context.monitor.migration.refuse_while_under_way()
    machine = context.machine
    running = machine.run_state is RunState.RUNNING
    path = snapshot_path(arguments.tag)
    header = restore_snapshot(machine, path, verify=arguments.verify)
    if running:
        machine.resume()
    return SnapshotInfo(path=path, id=header.id, pages=sum(part.pages for part in header.ram))
