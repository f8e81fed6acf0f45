"""COLO. Source: qapi/migration.json as QEMU 7.2 has it; pyvmm's own commands are colo-checkpoint-now,
query-colo-stats, query-colo-checkpoints and x-colo-protect.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from pyvmm.colo.protection import Protection
from pyvmm.colo.session import ColoSession
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import QmpError

ColoMode = Literal["none", "primary", "secondary"]
ColoExitReason = Literal["none", "request", "error", "processing"]
BOUNDS_MS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)
"""Upper bounds of the histograms' bins; one more bin is for what is above."""


class ColoStatus(QmpStruct):
    """``mode``: what this side is; ``last-mode``, ``reason``: what it was, and why that ended. ``x-``: pyvmm's."""

    mode: ColoMode
    last_mode: ColoMode
    reason: ColoExitReason
    x_checkpoint_mode: Literal["hybrid", "periodic"]
    x_pair: str
    x_owner: str
    x_term: int
    x_epoch: int
    x_failover: Literal["none", "require", "active", "completed", "relaunch"]
    x_peer: str | None = None
    x_problem: str | None = None


class Histogram(QmpStruct):
    """Milliseconds. ``bins[i]``: how many were at most ``bounds[i]`` and above the one before; the last: above all."""

    bounds: list[float]
    bins: list[int]
    median: float
    largest: float


class ReasonCount(QmpStruct):
    """Why checkpoints were made."""

    reason: str
    count: int


class CardStats(QmpStruct):
    """One network card at a primary, in frames."""

    primary_frames: int
    """That the guest sent since it is protected."""
    secondary_frames: int
    released: int
    """Went to clients because both answered alike, or by policy."""
    committed: int
    """Went out with a checkpoint."""
    dropped: int
    """The secondary's that were not needed."""
    refused: int
    """The primary's that there was no room for."""


class Difference(QmpStruct):
    """Why a checkpoint was asked for, in words. ``time``: seconds since 1970."""

    time: float
    what: str


class ColoStats(QmpStruct):
    """Of this process. Times are those of the last checkpoints (1,024 at most), as a primary saw them."""

    checkpoints: int
    bytes: int
    reasons: list[ReasonCount]
    pages: int
    """Of the last checkpoint; of these ``zero-pages`` are zeros, and ``delta-pages`` were sent as changes."""
    zero_pages: int
    delta_pages: int
    size: int
    """Bytes of the last checkpoint; without the changes it would have been ``saved`` larger."""
    saved: int
    held_bytes: int
    """Console output that waits."""
    rolled_back_pages: int
    """Secondary: pages that its replica had written."""
    disk_copied: int
    """Primary: bytes of disks that were copied before a first checkpoint; ``disk-same``: that were there already."""
    disk_same: int
    failovers: int
    heartbeats_sent: int
    heartbeats_heard: int
    longest_silence: float
    """Milliseconds, of the heartbeat."""
    cards: list[CardStats]
    differences: list[Difference]
    """The last answers that were not alike; 100 at most."""
    pause: Histogram | None = None
    received: Histogram | None = None
    """Request to vmstate-received."""
    loaded: Histogram | None = None
    last_failover: float | None = None
    """Milliseconds from hearing of it to the guest running on."""


class CheckpointStats(QmpStruct):
    """One checkpoint, as its primary saw it. ``time``: seconds since 1970; the others milliseconds and bytes."""

    epoch: int
    time: float
    reason: str
    pause: float
    """The guest stood still."""
    received: float
    """Request to vmstate-received."""
    loaded: float
    pages: int
    size: int


class CheckpointsArguments(QmpStruct):
    """Those begun after ``since``, seconds since 1970."""

    since: float = 0.0


class ProtectArguments(QmpStruct):
    """Where a secondary waits."""

    uri: str


@command("query-colo-status", allow_oob=True)
def query_colo_status(context: CommandContext) -> ColoStatus:
    """How the guest is protected."""
    session = _protection(context).session
    return ColoStatus(
        mode=session.role, last_mode=session.last_mode, reason=session.last_reason, x_checkpoint_mode=session.mode,
        x_pair=session.pair, x_owner=session.owner, x_term=session.term, x_epoch=session.epoch,
        x_failover=session.failover.failover_get_state().value, x_peer=session.peer_uri, x_problem=session.problem,
    )  # fmt: skip


@command("query-colo-stats", allow_oob=True)
def query_colo_stats(context: CommandContext) -> ColoStats:
    """What checkpoints cost, and why there were any."""
    protection = _protection(context)
    session = protection.session
    counters, last = session.counters, session.counters.times[-1:]
    beats = session.heartbeat.counts if session.heartbeat is not None else None
    return ColoStats(
        checkpoints=counters.checkpoints, bytes=counters.bytes,
        reasons=[ReasonCount(reason=reason, count=count) for reason, count in counters.reasons.items()],
        pages=last[0].pages if last else 0, zero_pages=last[0].zero_pages if last else 0,
        delta_pages=last[0].delta_pages if last else 0, saved=last[0].saved if last else 0,
        size=last[0].size if last else 0, held_bytes=context.machine.backend.hold.held,
        rolled_back_pages=counters.rolled_back_pages, disk_copied=counters.disk_copied, disk_same=counters.disk_same,
        failovers=counters.failovers,
        heartbeats_sent=beats.sent if beats else 0, heartbeats_heard=beats.heard if beats else 0,
        longest_silence=beats.longest_silence * 1000 if beats else 0.0,
        cards=_cards(protection),
        differences=[Difference(time=at, what=what) for at, what in list(session.differences)],
        pause=_histogram([times.pause for times in list(counters.times)]),
        received=_histogram([times.received for times in list(counters.times)]),
        loaded=_histogram([times.loaded for times in list(counters.times)]),
        last_failover=None if counters.last_failover is None else counters.last_failover * 1000,
    )  # fmt: skip


@command("query-colo-checkpoints", allow_oob=True)
def query_colo_checkpoints(context: CommandContext, arguments: CheckpointsArguments) -> list[CheckpointStats]:
    """The last checkpoints (1,024 at most), one by one."""
    return [
        CheckpointStats(
            epoch=one.epoch, time=one.at, reason=one.reason, pause=one.pause * 1000, received=one.received * 1000,
            loaded=one.loaded * 1000, pages=one.pages, size=one.size,
        )
        for one in list(_session(context).counters.times)
        if one.at > arguments.since
    ]  # fmt: skip


@command("x-colo-lost-heartbeat", allow_oob=True)
def x_colo_lost_heartbeat(context: CommandContext) -> None:
    """The other side is gone: be the guest's only one, if the arbiter agrees."""
    _session(context).lost_heartbeat()


@command("colo-checkpoint-now")
def colo_checkpoint_now(context: CommandContext) -> None:
    """Make a checkpoint soon, whatever the delay."""
    _session(context).ask_checkpoint("asked")


@command("x-colo-protect")
def x_colo_protect(context: CommandContext, arguments: ProtectArguments) -> None:
    """Make a pair with the secondary that waits at ``uri``; query-migrate and query-colo-status tell how it goes."""
    if arguments.uri.startswith("fd:"):
        raise QmpError("protection needs several connections: give it tcp: or unix:")
    _protection(context).protect(arguments.uri)


def _protection(context: CommandContext) -> Protection:
    protection = context.monitor.protection
    if protection is None:
        raise QmpError("COLO is not configured: start the machine with --colo primary|secondary --arbiter A")
    return protection


def _session(context: CommandContext) -> ColoSession:
    return _protection(context).session


def _cards(protection: Protection) -> list[CardStats]:
    if protection.cards is None:
        return []
    return [
        CardStats(**{name: counters[name] for name in CardStats.__struct_fields__})
        for counters in protection.cards.statistics()
    ]


def _histogram(seconds: Sequence[float]) -> Histogram | None:
    if not seconds:
        return None
    bins = [0] * (len(BOUNDS_MS) + 1)
    for value in seconds:
        bins[next((i for i, bound in enumerate(BOUNDS_MS) if value * 1000 <= bound), len(BOUNDS_MS))] += 1
    return Histogram(
        bounds=list(BOUNDS_MS), bins=bins, median=statistics.median(seconds) * 1000, largest=max(seconds) * 1000
    )
