"""What two guests answered: which frames are released, and when a checkpoint is due. No thread, no socket, no clock.

``native/proxy_compare.h`` has the rules; this is a thin cover, and the names. Frames of the guests come in, frames for
clients come out of ``release``. Times are milliseconds of one monotonic clock.

The order of calls of a checkpoint that starts epoch ``n``::

    primary is paused    begin_epoch(n)      what the primary sends from now on is of epoch n
    vmstate-received     commit(n, now)      its frames of epochs before n go out, the secondary's of those are dropped,
                                             and those of epoch n are compared
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from pyvmm.errors import ChannelError, ConfigError, StateError
from pyvmm.native import ffi, lib
from pyvmm.net.filter import Frame
from pyvmm.net.flow import PACKET_CLASSES, Flow, flow_of

_HEADER: int = lib.PV_NET_HEADER


class Mode(enum.Enum):
    """What becomes of frames."""

    PASS = lib.PV_COMPARE_PASS
    """Alone: the primary's go out at once."""
    HOLD = lib.PV_COMPARE_HOLD
    """Periodic: the primary's go out with the commit; the secondary sends none."""
    HYBRID = lib.PV_COMPARE_HYBRID
    """The primary's go out when the secondary's equal them, or with the commit."""


class Policy(enum.Enum):
    """What becomes of a kind of packets in hybrid mode."""

    COMPARE = lib.PV_POLICY_COMPARE
    RELEASE = lib.PV_POLICY_RELEASE
    """Not compared: a client may see what the survivor of a failover knows nothing of."""
    CHECKPOINT = lib.PV_POLICY_CHECKPOINT
    """Not compared: each of them wants a checkpoint."""


class Reason(enum.Enum):
    """Why a checkpoint is due."""

    PAYLOAD = lib.PV_DUE_PAYLOAD
    LENGTH = lib.PV_DUE_LENGTH
    HEADER = lib.PV_DUE_HEADER
    SYN = lib.PV_DUE_SYN
    FIN = lib.PV_DUE_FIN
    RST = lib.PV_DUE_RST
    START = lib.PV_DUE_START
    PRIMARY_ALONE = lib.PV_DUE_PRIMARY_ALONE
    SECONDARY_ALONE = lib.PV_DUE_SECONDARY_ALONE
    ACK = lib.PV_DUE_ACK
    PRIMARY_FULL = lib.PV_DUE_PRIMARY_FULL
    SECONDARY_FULL = lib.PV_DUE_SECONDARY_FULL
    CONNECTIONS = lib.PV_DUE_CONNECTIONS
    POLICY = lib.PV_DUE_POLICY


_TEXT = {
    Reason.PAYLOAD: "the bytes differ",
    Reason.LENGTH: "one message is longer than the other",
    Reason.HEADER: "hop limit, DSCP, options or fragments differ",
    Reason.SYN: "options or flags of the SYN differ",
    Reason.FIN: "one stream ends where the other goes on",
    Reason.RST: "the resets differ",
    Reason.START: "one side has begun another connection",
    Reason.PRIMARY_ALONE: "the secondary did not send it in time",
    Reason.SECONDARY_ALONE: "the primary did not send it in time",
    Reason.ACK: "the secondary did not acknowledge as much in time",
    Reason.PRIMARY_FULL: "too much waits for the secondary",
    Reason.SECONDARY_FULL: "too much waits for the primary",
    Reason.CONNECTIONS: "more connections than are tracked",
    Reason.POLICY: "the policy for such packets",
}


class CheckpointDue(msgspec.Struct, frozen=True):
    """The first packet that made a checkpoint necessary, and how many more there were since (``coalesced``).

    ``position`` is a sequence number of the primary's (TCP), or a byte of the message; ``primary`` and ``secondary``
    are up to 16 bytes from there.
    """

    reason: Reason
    epoch: int
    flow: Flow
    position: int
    primary: bytes
    secondary: bytes
    coalesced: int

    def __str__(self) -> str:
        return f"{self.flow}: {_TEXT[self.reason]}"


class ConnectionCounters(msgspec.Struct, frozen=True):
    """One flow: frames of either side that came and that wait, frames released as equal, differences found."""

    flow: Flow
    frames: tuple[int, int]
    waiting: tuple[int, int]
    released: int
    differences: int
    diverged: bool


class CompareTunables(msgspec.Struct, frozen=True, kw_only=True):
    """QEMU's names and defaults where it has them; times in ms."""

    compare_timeout: int = 3000
    expired_scan_cycle: int = 1000
    max_queue_size: int = 1024
    """Frames of one connection and side; one more makes a checkpoint due."""
    max_connections: int = 16384
    max_bytes: int = 64 << 20
    """Held of one side, of all connections. The primary's beyond it are refused."""
    idle_timeout: int = 600_000
    policy: Mapping[str, Policy] = {}
    """By ``PACKET_CLASSES``; what is not named is compared."""

    def __post_init__(self) -> None:
        for name in ("compare_timeout", "expired_scan_cycle", "max_queue_size", "max_connections", "idle_timeout"):
            if not 0 < getattr(self, name) < 1 << 31:
                raise ConfigError(f"colo-compare: {name} {getattr(self, name)} is out of range; use 1 to 2147483647")
        if self.max_bytes < 1 << 20:
            raise ConfigError(f"colo-compare: max_bytes {self.max_bytes} is too small; use at least 1 MiB")
        for name in self.policy:
            if name not in PACKET_CLASSES:
                raise ConfigError(f"colo-compare: no packets of kind {name!r}; use {', '.join(PACKET_CLASSES)}")


class Compare:
    """See the module. Any thread; nothing waits."""

    def __init__(self, tunables: CompareTunables | None = None) -> None:
        self.tunables = tunables or CompareTunables()
        limits = ffi.new("struct pv_compare_limits *")
        for name in ("compare_timeout", "idle_timeout", "max_queue_size", "max_connections", "max_bytes"):
            setattr(limits, name, getattr(self.tunables, name))
        for at, kind in enumerate(PACKET_CLASSES):
            limits.policy[at] = self.tunables.policy.get(kind, Policy.COMPARE).value
        native = lib.pv_compare_new(limits)
        if not native:
            raise MemoryError("colo-compare")
        self._native = ffi.gc(native, lib.pv_compare_free)
        self.mode = Mode.PASS
        self._taking = threading.Lock()
        self._unit = ffi.new("uint8_t[]", lib.PV_NET_UNIT)
        self._bytes = ffi.buffer(self._unit)

    def set_mode(self, mode: Mode, epoch: int, now: int) -> None:
        """PASS: all of the primary's goes out, the rest is forgotten. From PASS to another: frames are of ``epoch``
        from now on, and both guests are the same at this moment. StateError for anything else.
        """
        if lib.pv_compare_set_mode(self._native, mode.value, epoch, now):
            raise StateError(f"colo-compare cannot go from {self.mode.name} to {mode.name}")
        self.mode = mode

    def primary(self, frame: Frame, now: int) -> bool:
        """What the primary's guest sends. ``False``: there is no room until the next commit, the caller still has it.
        StateError if it is no frame.
        """
        result = lib.pv_compare_primary(self._native, _header(frame), frame.data, len(frame.data), now)
        if result == lib.PV_COMPARE_BAD:
            raise StateError(f"colo-compare: {len(frame.data)} bytes are no frame")
        return bool(result == lib.PV_COMPARE_TAKEN)

    def secondary(self, frame: Frame, epoch: int, now: int) -> None:
        """What the secondary's guest sent in ``epoch``. ChannelError if that has not begun, or it is no frame."""
        if not 0 <= epoch < 1 << 64 or lib.pv_compare_secondary(
            self._native, _header(frame), frame.data, len(frame.data), epoch, now
        ):
            raise ChannelError(f"the secondary sent {len(frame.data)} bytes of epoch {epoch} for a frame")

    def release(self) -> list[Frame]:
        """What may go to clients, oldest first, each once."""
        frames = []
        with self._taking:
            while size := lib.pv_compare_take(self._native, self._unit):
                frames.append(Frame(self._bytes[:_HEADER], self._bytes[_HEADER:size]))
        return frames

    def scan(self, now: int) -> None:
        """Look at the age of what waits: every ``expired_scan_cycle``."""
        lib.pv_compare_scan(self._native, now)

    def begin_epoch(self, epoch: int) -> None:
        """The primary is paused for the checkpoint that starts it. StateError: the last one is not committed."""
        if lib.pv_compare_begin_epoch(self._native, epoch):
            raise StateError(f"epoch {epoch} cannot begin now: one checkpoint at most is under way")

    def commit(self, epoch: int, now: int) -> None:
        """The secondary holds that checkpoint. Harmless twice; StateError if it never began."""
        if lib.pv_compare_commit(self._native, epoch, now):
            raise StateError(f"epoch {epoch} cannot be committed: it has not begun")

    @property
    def checkpoint_due(self) -> CheckpointDue | None:
        """Why a checkpoint is wanted, until one begins."""
        return self._due(last=False)

    @property
    def last_due(self) -> CheckpointDue | None:
        """Why one was wanted last."""
        return self._due(last=True)

    def _due(self, last: bool) -> CheckpointDue | None:
        due = ffi.new("struct pv_due *")
        if not lib.pv_compare_due(self._native, due, last):
            return None
        samples = [bytes(ffi.buffer(due.samples[side], 16))[: due.sizes[side]] for side in (0, 1)]
        return CheckpointDue(
            Reason(due.reason), due.epoch, flow_of(due.key), due.position, samples[0], samples[1], due.coalesced
        )

    def connections(self, limit: int = 1000) -> list[ConnectionCounters]:
        """At most ``limit`` flows, those that wait first."""
        infos = ffi.new("struct pv_connection_info[]", limit)
        count = lib.pv_compare_connections(self._native, infos, limit)
        return [
            ConnectionCounters(
                flow_of(each.key), tuple(each.frames), tuple(each.waiting), each.released, each.differences,
                bool(each.diverged),
            )
            for each in infos[0:count]
        ]  # fmt: skip

    def counters(self) -> dict[str, int]:
        """All since the start, by the names of ``struct pv_compare_counters``; ``due_*`` by reason."""
        native = ffi.new("struct pv_compare_counters *")
        lib.pv_compare_read_counters(self._native, native)
        names = (
            "released", "committed", "dropped", "refused", "bad", "equal_bytes", "acknowledged",
            "connections_forgotten",
        )  # fmt: skip
        found = {name: int(getattr(native, name)) for name in names}
        for side, name in enumerate(("primary", "secondary")):
            found[f"{name}_frames"] = int(native.frames[side])
            found[f"{name}_bytes"] = int(native.bytes[side])
        return found | {f"due_{reason.name.lower()}": int(native.due[reason.value]) for reason in Reason}


def _header(frame: Frame) -> Any:
    if len(frame.header) != _HEADER:
        raise ValueError(f"a virtio_net_hdr has {_HEADER} bytes, not {len(frame.header)}")
    return frame.header
