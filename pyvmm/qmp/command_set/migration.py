"""Live migration. Source: qapi/migration.json as QEMU 7.2 has it; pyvmm's own members begin with ``x-``."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pyvmm.machine.run_state import RunState
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.migration.outgoing import OutgoingMigration
from pyvmm.migration.parameters import MigrationStatus, with_changes
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import QmpError

StatusName = Literal[
    "none", "setup", "cancelling", "cancelled", "active", "postcopy-active", "postcopy-paused", "postcopy-recover",
    "completed", "failed", "colo", "pre-switchover", "device", "wait-unplug",
]  # fmt: skip
CapabilityName = Literal[
    "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "compress", "events", "postcopy-ram", "x-colo",
    "release-ram", "block", "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps", "postcopy-blocktime",
    "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot", "zero-copy-send",
]  # fmt: skip
SETTABLE = frozenset({"auto-converge", "zero-blocks", "compress", "events", "x-colo"})
ALWAYS = {"return-path": "the destination always answers", "late-block-activate": "disks are taken when the guest is"}
NEVER: dict[str, str] = {
    "xbzrle": "pages are sent whole; compress has LZ4",
    "rdma-pin-all": "there is no RDMA",
    "postcopy-ram": "there is no post-copy",
    "postcopy-blocktime": "there is no post-copy",
    "release-ram": "it is for post-copy",
    "block": "disks are shared, not sent",
    "pause-before-switchover": "nothing is to be done by hand before the switch-over",
    "multifd": "there is one connection",
    "dirty-bitmaps": "disks have none",
    "x-ignore-shared": "all of RAM is sent",
    "validate-uuid": "machines have no UUID; all else is compared",
    "background-snapshot": "see snapshot-save",
    "zero-copy-send": "it is for multifd",
}


class MigrateArguments(QmpStruct):
    """``detach`` is HMP's and has no effect; the others are refused."""

    uri: str
    blk: bool = False
    inc: bool = False
    detach: bool = False
    resume: bool = False


class IncomingArguments(QmpStruct):
    """Where to wait."""

    uri: str


class CapabilityStatus(QmpStruct):
    """One capability."""

    capability: CapabilityName
    state: bool


class CapabilityArguments(QmpStruct):
    """What is to be changed."""

    capabilities: list[CapabilityStatus]


class MigrationParameters(QmpStruct):
    """All of them (query), or those to be changed. ``x-stall-timeout`` (ms): how long a peer may do nothing."""

    cpu_throttle_initial: Annotated[int, Meta(ge=1, le=99)] | None = None
    cpu_throttle_increment: Annotated[int, Meta(ge=1, le=99)] | None = None
    max_cpu_throttle: Annotated[int, Meta(ge=1, le=99)] | None = None
    throttle_trigger_threshold: Annotated[int, Meta(ge=1, le=100)] | None = None
    max_bandwidth: Annotated[int, Meta(ge=0, le=1 << 40)] | None = None
    downtime_limit: Annotated[int, Meta(ge=0, le=2_000_000)] | None = None
    announce_initial: Annotated[int, Meta(ge=0, le=100_000)] | None = None
    announce_max: Annotated[int, Meta(ge=0, le=100_000)] | None = None
    announce_rounds: Annotated[int, Meta(ge=0, le=1000)] | None = None
    announce_step: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    x_checkpoint_delay: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None
    x_checkpoint_timeout: Annotated[int, Meta(ge=100, le=3_600_000)] | None = None
    x_colo_mode: Literal["hybrid", "periodic"] | None = None
    x_colo_delta: Literal["off", "xor", "lz4"] | None = None
    x_stall_timeout: Annotated[int, Meta(ge=100, le=3_600_000)] | None = None


class RamStats(QmpStruct):
    """``transferred``, ``normal-bytes``: bytes; ``duplicate``, ``normal``: pages of zeros, and others."""

    transferred: int
    remaining: int
    total: int
    duplicate: int
    skipped: int
    normal: int
    normal_bytes: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int
    postcopy_requests: int
    page_size: int
    multifd_bytes: int
    pages_per_second: int
    precopy_bytes: int
    downtime_bytes: int
    postcopy_bytes: int


class MigrationInfo(QmpStruct):
    """Times are milliseconds."""

    status: StatusName | None = None
    ram: RamStats | None = None
    total_time: int | None = None
    expected_downtime: int | None = None
    downtime: int | None = None
    setup_time: int | None = None
    cpu_throttle_percentage: int | None = None
    error_desc: str | None = None


@command("migrate")
def migrate(context: CommandContext, arguments: MigrateArguments) -> None:
    """Begin to move the guest; query-migrate, or events, tell how it goes."""
    for name in ("blk", "inc"):
        if getattr(arguments, name):
            raise QmpError(f"Parameter '{name}' is not supported: disks are shared, not sent")
    if arguments.resume:
        raise QmpError("Cannot resume if there is no paused migration")
    with _named_descriptor(context, arguments.uri) as uri:
        context.monitor.migration.migrate(uri)


@command("migrate_cancel")
def migrate_cancel(context: CommandContext) -> None:
    """End it; the guest goes on here. Nothing to do if there is none."""
    context.monitor.migration.cancel()


@command("migrate-incoming")
def migrate_incoming(context: CommandContext, arguments: IncomingArguments) -> None:
    """Wait for a guest (after ``--incoming defer``)."""
    with _named_descriptor(context, arguments.uri) as uri:
        context.monitor.migration.listen(uri)


@contextlib.contextmanager
def _named_descriptor(context: CommandContext, uri: str) -> Iterator[str]:
    """``fd:NAME``, which a client sent by getfd, as ``fd:NUMBER``; it is closed if it cannot be used.

    A number is no name: a client must not be able to take this process's own descriptors.
    """
    if not uri.startswith("fd:"):
        yield uri
        return
    fd = context.monitor.take_descriptor(uri[3:])
    if fd is None:
        raise QmpError(f"File descriptor named '{uri[3:]}' has not been found")
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise QmpError(f"File descriptor named '{uri[3:]}' is not a socket")
        yield f"fd:{fd}"
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise


@command("migrate-set-capabilities")
def migrate_set_capabilities(context: CommandContext, arguments: CapabilityArguments) -> None:
    """Change some. Those that cannot be changed are refused unless they are that way already."""
    manager = context.monitor.migration
    changes: dict[str, bool] = {}
    for one in arguments.capabilities:
        if one.capability in SETTABLE:
            changes[one.capability] = one.state
        elif one.state and one.capability in NEVER:
            raise QmpError(f"Migration capability '{one.capability}' cannot be turned on: {NEVER[one.capability]}")
        elif not one.state and one.capability in ALWAYS:
            raise QmpError(f"Migration capability '{one.capability}' cannot be turned off: {ALWAYS[one.capability]}")
    manager.set_capabilities(with_changes(manager.capabilities, changes))


@command("query-migrate-capabilities", allow_oob=True)
def query_migrate_capabilities(context: CommandContext) -> list[CapabilityStatus]:
    """All that QEMU has; those that pyvmm lacks are off."""
    capabilities = context.monitor.migration.capabilities
    states = {name: name in ALWAYS for name in NEVER | ALWAYS} | {
        name: getattr(capabilities, name.replace("-", "_")) for name in SETTABLE
    }
    return msgspec.convert([{"capability": name, "state": states[name]} for name in states], list[CapabilityStatus])


@command("migrate-set-parameters")
def migrate_set_parameters(context: CommandContext, arguments: MigrationParameters) -> None:
    """Change some; limits count at once, for a migration under way, too."""
    manager = context.monitor.migration
    changes = {name: value for name, value in msgspec.to_builtins(arguments).items() if value is not None}
    manager.set_parameters(with_changes(manager.parameters, changes))


@command("query-migrate-parameters", allow_oob=True)
def query_migrate_parameters(context: CommandContext) -> MigrationParameters:
    """All."""
    parameters = context.monitor.migration.parameters
    shown = msgspec.structs.replace(parameters, x_checkpoint_delay=parameters.checkpoint_delay)
    return msgspec.convert(msgspec.to_builtins(shown), MigrationParameters)


@command("query-migrate", allow_oob=True)
def query_migrate(context: CommandContext) -> MigrationInfo:
    """How it stands, on either side; nothing if there was none."""
    manager = context.monitor.migration
    if manager.outgoing is not None:
        return info_of(manager.outgoing, sum(region.size for region in context.machine.memory.regions))
    if manager.incoming is not None:
        return MigrationInfo(status=manager.incoming.status.value, error_desc=manager.incoming.problem)
    return MigrationInfo()


def info_of(migration: OutgoingMigration, total: int) -> MigrationInfo:
    """What query-migrate tells of ``migration`` of a machine with ``total`` bytes of RAM."""
    status, counters = migration.status, migration.counters
    over = not status.under_way
    normal = counters.pages - counters.zero_pages
    info = MigrationInfo(
        status=status.value,
        ram=RamStats(
            transferred=counters.bytes, remaining=migration.remaining_bytes, total=total,
            duplicate=counters.zero_pages, skipped=0, normal=normal, normal_bytes=normal * PAGE_SIZE,
            dirty_pages_rate=round(migration.dirty_rate), mbps=round(migration.bandwidth * 8 / 1e6, 3),
            dirty_sync_count=counters.rounds, postcopy_requests=0, page_size=PAGE_SIZE, multifd_bytes=0,
            pages_per_second=round(migration.bandwidth / PAGE_SIZE),
            precopy_bytes=counters.bytes - migration.downtime_bytes, downtime_bytes=migration.downtime_bytes,
            postcopy_bytes=0,
        ),
        total_time=_ms((migration.ended_at if over else time.monotonic()) - migration.started_at),
        setup_time=_ms(max(0.0, migration.active_at - migration.started_at)),
        error_desc=migration.problem,
    )  # fmt: skip
    if status is MigrationStatus.COMPLETED and migration.downtime is not None:
        info.downtime = _ms(migration.downtime)
    elif not over and migration.bandwidth:
        info.expected_downtime = _ms(migration.remaining_bytes / migration.bandwidth)
    if migration.throttle_percentage:
        info.cpu_throttle_percentage = migration.throttle_percentage
    return info


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


DirtyRateMode = Literal["page-sampling", "dirty-ring", "dirty-bitmap"]


class CalcDirtyRateArguments(QmpStruct):
    """Seconds; ``mode`` is how pages are logged here, or left out."""

    calc_time: Annotated[int, Meta(ge=1, le=60)]
    sample_pages: int | None = None
    mode: DirtyRateMode | None = None


class HotSpanInfo(QmpStruct):
    """2 MiB of guest memory, and how many of its pages were written."""

    address: int
    pages: int


class DirtyRateInfo(QmpStruct):
    """MiB a second; ``x-hottest``: where most pages were written, hottest first."""

    status: Literal["unstarted", "measuring", "measured"]
    start_time: int
    calc_time: int
    sample_pages: int
    mode: DirtyRateMode
    dirty_rate: int | None = None
    x_hottest: list[HotSpanInfo] | None = None


@command("calc-dirty-rate")
def calc_dirty_rate(context: CommandContext, arguments: CalcDirtyRateArguments) -> None:
    """Begin to measure."""
    manager, mode = context.monitor.migration, _mode(context)
    manager.refuse_while_under_way()
    if arguments.mode not in (None, mode):
        raise QmpError(f"mode {arguments.mode} is not enabled, use {mode} instead")
    if arguments.sample_pages is not None:
        raise QmpError("Parameter 'sample-pages' is for page-sampling, which is not how it is measured here")
    if context.machine.run_state is RunState.INMIGRATE:
        raise QmpError("Guest is waiting for an incoming migration")
    manager.dirty_rate.start(arguments.calc_time)


@command("query-dirty-rate")
def query_dirty_rate(context: CommandContext) -> DirtyRateInfo:
    """What was measured last."""
    meter = context.monitor.migration.dirty_rate
    if meter.problem is not None:
        raise QmpError(meter.problem)
    info = DirtyRateInfo(
        status="measuring" if meter.measuring else "measured" if meter.found else "unstarted",
        start_time=int(meter.began), calc_time=meter.seconds, sample_pages=0, mode=_mode(context),
    )  # fmt: skip
    if meter.found is not None:
        info.dirty_rate = round(meter.found.mib_per_second)
        info.x_hottest = [HotSpanInfo(address=gpa, pages=pages) for gpa, pages in meter.found.hottest]
    return info


def _mode(context: CommandContext) -> DirtyRateMode:
    return "dirty-ring" if context.machine.dirty.method == "ring" else "dirty-bitmap"
