"""Guest memory in rounds of frames: packed and unpacked by the native core, paced and counted here.

A RAM frame is ``u32 region | u32 flags | u32 unpacked size`` and then a batch (native/ram_stream.h), as it is or
compressed with LZ4. Zero pages are a few bytes; pages that the source never touched are not even looked at.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

from pyvmm.errors import ChannelError
from pyvmm.machine.dirty_tracker import PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.migration.channel import Channel
from pyvmm.migration.protocol import Message
from pyvmm.native import ffi, lib

HEAD = struct.Struct("<III")
FLAG_LZ4 = 1
BATCH = 256 << 10
"""Bytes packed before they are sent: large enough that what Python does for each does not count."""
PACE = 0.05
"""Seconds over which a bandwidth limit is kept: what may be sent ahead."""


class RamCounters:
    """What was sent, in pages and bytes; written by the migration's thread, read by anybody."""

    def __init__(self) -> None:
        self.pages = 0
        self.zero_pages = 0
        self.bytes = 0
        """On the wire, with frames' heads."""
        self.rounds = 0


class RamSender:
    """Sends sets of pages. ``limit`` gives the bandwidth allowed in bytes a second, 0 for none; asked often."""

    def __init__(self, channel: Channel, counters: RamCounters, limit: Callable[[], int], *, compress: bool) -> None:
        self._channel = channel
        self._counters = counters
        self._limit = limit
        self._compress = compress
        self._buffer = ffi.new("uint8_t[]", HEAD.size + BATCH)
        self._bytes = ffi.buffer(self._buffer)
        self._due = 0.0

    def send_present(self, memory: GuestMemory) -> None:
        """The first round: whatever is there."""
        for index, region in enumerate(memory.regions):
            runs = region.present()
            self._send_runs(index, region, ffi.new("struct pv_page_range[]", runs or [(0, 0)]), len(runs))

    def send_dirty(self, sets: Iterable[PageSet]) -> None:
        """A further round: what was harvested, region by region as DirtyTracker.harvest gives it."""
        for index, page_set in enumerate(sets):
            if page_set.count:
                self._send_runs(index, page_set.region, *page_set.native_runs())

    def end_round(self) -> None:
        """Tell the other side that a round is complete."""
        self._counters.rounds += 1
        self._channel.send(Message.PASS, struct.pack("<I", self._counters.rounds))

    def _send_runs(self, index: int, region: Region, runs: Any, count: int) -> None:
        cursor = ffi.new("struct pv_ram_cursor *", {"ranges": runs, "range_count": count})
        hva, batch = ffi.cast("uint8_t *", region.hva), self._buffer + HEAD.size
        pages = zero = 0
        while used := lib.pv_ram_pack(cursor, hva, batch, BATCH):
            before = self._channel.bytes_sent
            self._send_batch(index, used)
            counters = self._counters
            counters.bytes += self._channel.bytes_sent - before
            counters.pages += cursor.packed - pages
            counters.zero_pages += cursor.zero - zero
            pages, zero = cursor.packed, cursor.zero
            self._keep_pace(self._channel.bytes_sent - before)

    def _send_batch(self, index: int, used: int) -> None:
        if self._compress:
            import lz4.block

            packed = lz4.block.compress(self._bytes[HEAD.size : HEAD.size + used], store_size=False)
            if len(packed) < used:
                self._channel.send(Message.RAM, HEAD.pack(index, FLAG_LZ4, used) + packed)
                return
        HEAD.pack_into(self._bytes, 0, index, 0, used)
        self._channel.send(Message.RAM, memoryview(self._bytes)[: HEAD.size + used])

    def _keep_pace(self, sent: int) -> None:
        limit = self._limit()
        now = time.monotonic()
        if not limit:
            self._due = now
            return
        self._due = max(self._due, now - PACE) + sent / limit
        if self._due > now:
            time.sleep(min(self._due - now, 1.0))


class RamReceiver:
    """Puts frames into memory, which begins as zeros."""

    def __init__(self, memory: GuestMemory) -> None:
        self._regions = memory.regions
        self._received = [ffi.new("uint64_t[]", (r.size // PAGE_SIZE + 63) // 64) for r in self._regions]
        self.pages = 0

    def take(self, payload: memoryview) -> None:
        """One RAM frame. ChannelError if it does not fit this machine; then nothing of it is written."""
        if len(payload) < HEAD.size:
            raise ChannelError("a RAM frame without its head")
        index, flags, size = HEAD.unpack_from(payload)
        if index >= len(self._regions) or flags & ~FLAG_LZ4 or size > BATCH:
            raise ChannelError(f"a RAM frame for region {index} with flags {flags:#x} and {size} bytes")
        batch: Any = payload[HEAD.size :]
        if flags & FLAG_LZ4:
            batch = _decompress(batch, size)
        if len(batch) != size:
            raise ChannelError(f"a RAM frame of {len(batch)} bytes that says {size}")
        region = self._regions[index]
        count = lib.pv_ram_unpack(
            ffi.from_buffer(batch), size, ffi.cast("uint8_t *", region.hva), region.size // PAGE_SIZE,
            self._received[index],
        )  # fmt: skip
        if count < 0:
            raise ChannelError(f"a RAM frame whose pages are not in region {region.name}")
        self.pages += count


def _decompress(batch: memoryview, size: int) -> bytes:
    import lz4.block

    try:
        return bytes(lz4.block.decompress(batch, uncompressed_size=size))
    except (lz4.block.LZ4BlockError, ValueError):
        raise ChannelError("a RAM frame that does not unpack") from None
