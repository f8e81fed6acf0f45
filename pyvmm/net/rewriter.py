"""filter-rewriter: on the secondary, clients see the primary's sequence numbers and timestamps.

``native/proxy_rewriter.h`` has the rules. It stands next to the guest, before all else of the proxy: what redirects its
output, and once this side is a primary again, what compares it and mirrors its input. After a failover it stays there,
for the connections that still have an offset.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from pyvmm.errors import ChannelError, ConfigError
from pyvmm.native import ffi, lib
from pyvmm.net.filter import Direction, Filter, Frame

RECORD: int = ffi.sizeof("struct pv_rewriter_record")


class RewriterTunables(msgspec.Struct, frozen=True, kw_only=True):
    """Times in ms without a segment, after which a connection is forgotten: one with an offset, any other."""

    max_connections: int = 16384
    live_timeout: int = 5 * 24 * 3_600_000
    quiet_timeout: int = 120_000

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < 1 << 31:
                raise ConfigError(f"filter-rewriter: {name} {getattr(self, name)} is out of range; use 1 to 2147483647")


class Rewriter:
    """Frames with their numbers changed; no thread, no clock. ``now``: ms, monotonic."""

    def __init__(self, tunables: RewriterTunables | None = None) -> None:
        self.tunables = tunables or RewriterTunables()
        limits = ffi.new("struct pv_rewriter_limits *")
        for name in self.tunables.__struct_fields__:
            setattr(limits, name, getattr(self.tunables, name))
        native = lib.pv_rewriter_new(limits)
        if not native:
            raise MemoryError("filter-rewriter")
        self._native = ffi.gc(native, lib.pv_rewriter_free)

    def rewrite(self, direction: Direction, frame: Frame, now: int) -> Frame:
        """RX: a client's, for this guest; TX: this guest's, for clients."""
        data = bytearray(frame.data)
        change = lib.pv_rewriter_from_guest if direction is Direction.TX else lib.pv_rewriter_to_guest
        changed = change(self._native, frame.header, ffi.from_buffer("uint8_t[]", data), len(data), now)
        return Frame(frame.header, bytes(data)) if changed else frame

    def checkpoint(self, now: int, records: bytes = b"") -> None:
        """The guest has the primary's state: no offsets but those of ``records``, the primary's own rewriter's.

        ChannelError if they are none, or more than are tracked here; nothing is changed then.
        """
        count = len(records) // RECORD
        if len(records) % RECORD or count > self.tunables.max_connections:
            raise ChannelError(f"{len(records)} bytes are no connections of a filter-rewriter")
        array = ffi.from_buffer("struct pv_rewriter_record[]", records) if count else ffi.NULL
        lib.pv_rewriter_checkpoint(self._native, array, count, now)

    def records(self) -> bytes:
        """Its connections with an offset, for the rewriter of a new secondary of this guest."""
        limit = self.tunables.max_connections
        array = ffi.new("struct pv_rewriter_record[]", limit)
        count = min(lib.pv_rewriter_records(self._native, array, limit), limit)
        return bytes(ffi.buffer(array))[: count * RECORD]

    def scan(self, now: int) -> None:
        """Forget old connections: every few seconds."""
        lib.pv_rewriter_scan(self._native, now)

    def counters(self) -> dict[str, int]:
        """All since the start, by the names of ``struct pv_rewriter_counters``; ``connections``: now."""
        native, connections = ffi.new("struct pv_rewriter_counters *"), ffi.new("uint32_t *")
        lib.pv_rewriter_read_counters(self._native, native, connections)
        names: Sequence[str] = (
            "to_guest", "from_guest", "rewritten", "quoted", "learned", "opaque", "forgotten", "refused",
            "timestamps_raised",
        )  # fmt: skip
        return {name: int(getattr(native, name)) for name in names} | {"connections": int(connections[0])}


SCAN_CYCLE = 5000
"""ms between two looks for connections that are over."""


class FilterRewriter(Filter):
    """A ``Rewriter`` in a card's chain. The machine's clock is its own business: offsets are all that it keeps."""

    def __init__(self, name: str = "filter-rewriter", tunables: RewriterTunables | None = None) -> None:
        super().__init__(name)
        self.rewriter = Rewriter(tunables)
        self._scanned = 0

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        """Never keeps one."""
        now = int(time.monotonic() * 1000)
        if now - self._scanned >= SCAN_CYCLE:
            self._scanned = now
            self.rewriter.scan(now)
        return self.rewriter.rewrite(direction, frame, now)
