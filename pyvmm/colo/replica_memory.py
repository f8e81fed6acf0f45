"""The secondary's guest memory: the last checkpoint in the memfd, and the replica's own writes over it."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.errors import ChannelError
from pyvmm.machine.dirty_tracker import DirtyTracker
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory

HEAD = struct.Struct("<II")
ZERO = 1 << 31


class RollForward(NamedTuple):
    """Pages that the replica had written, and pages of the checkpoint."""

    dropped: int
    written: int


class ReplicaMemory:
    """Guest memory as a private mapping of its memfd."""

    def __init__(self, memory: GuestMemory, dirty: DirtyTracker) -> None:
        self._memory = memory
        self._dirty = dirty

    def protect(self) -> None:
        """From now on the memfd holds the checkpoint."""
        for region in self._memory.regions:
            region._remap(region.fd, 0, private=True)
        self._dirty.start()

    def check(self, region: int, batch: memoryview) -> int:
        """Pages of ``batch``; ChannelError if they do not fit."""
        if region >= len(self._memory.regions):
            raise ChannelError(f"pages of region {region}")
        limit, total, at = self._memory.regions[region].size // PAGE_SIZE, 0, 0
        while at < len(batch):
            if len(batch) - at < HEAD.size:
                raise ChannelError("half a head of a run of pages")
            first, count = HEAD.unpack_from(batch, at)
            number = count & ~ZERO
            at += HEAD.size + (0 if count & ZERO else number * PAGE_SIZE)
            if not number or first + number > limit or at > len(batch):
                raise ChannelError(f"a run of {number} pages from {first}")
            total += number
        return total

    def roll_forward(self, batches: Sequence[tuple[int, memoryview]]) -> RollForward:
        """Undo the replica's writes, then put the checkpoint's in place. Suspended."""
        dropped = written = 0
        for pages in self._dirty.harvest():
            dropped += pages.count
            for first, count in pages.ranges():
                pages.region.drop_private_pages(first * PAGE_SIZE, count * PAGE_SIZE)
        for index, batch in batches:
            fd, at = self._memory.regions[index].fd, 0
            while at < len(batch):
                first, count = HEAD.unpack_from(batch, at)
                number, at = count & ~ZERO, at + HEAD.size
                data = bytes(number * PAGE_SIZE) if count & ZERO else batch[at : at + number * PAGE_SIZE]
                at += 0 if count & ZERO else number * PAGE_SIZE
                os.pwrite(fd, data, first * PAGE_SIZE)
                written += number
        return RollForward(dropped, written)

    def release(self) -> None:
        """After a failover: the mapping is the truth."""
        self._dirty.stop()
