"""The secondary's guest memory: one memfd holds the last checkpoint, and what the replica writes is a copy over it.

The regions are mapped MAP_PRIVATE, so the kernel copies each page at its first write, and the memfd stays what the
primary sent. Rolling forward is: drop those copies, then write the checkpoint's pages into the memfd. No second copy of
memory is needed, only the pages that were written since the last checkpoint are there twice.

Which pages were written is known from dirty logging: vCPUs' writes from KVM, devices' from their marks. A few more have
a copy: a vCPU that is stopped while KVM sees to its write may have got the copy already, but not the page, and nothing
is logged. Such a copy is still what the memfd has, until a checkpoint brings that page: so what it brings is dropped as
well. KVM follows the
mapping through its MMU notifier; a host whose KVM does not is found by the host profile (``private_memfd_works``).

After a failover the mapping, not the memfd, is the guest's memory. What it writes is there twice then, until
:meth:`Region.free_covered` gives the memfd's pages back, which a survivor does once it is protected again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.colo.delta import FLAG_CODED, check_batch
from pyvmm.errors import ChannelError, HostError
from pyvmm.machine.dirty_tracker import DirtyTracker
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory
from pyvmm.native import ffi, lib


class RollForward(NamedTuple):
    """Pages that the replica had written, and pages that the checkpoint brought."""

    dropped: int
    written: int


class ReplicaMemory:
    """Of one machine, which does not run during any of this, but for :meth:`check`."""

    def __init__(self, memory: GuestMemory, dirty: DirtyTracker) -> None:
        self._memory = memory
        self._dirty = dirty

    def protect(self) -> None:
        """What is in memory now is the checkpoint. HostError: the host does not let it be mapped so."""
        for region in self._memory.regions:
            region.keep_private()
        self._dirty.start()

    def check(self, batches: Sequence[tuple[int, int, memoryview]]) -> int:
        """Pages in ``batches``, (region, flags, batch), all hostile. ChannelError if one is not in its region, a run is
        not whole, or there are more than memory has: no page comes twice in a checkpoint, and each costs time.
        """
        regions, total = self._memory.regions, 0
        for region, flags, batch in batches:
            if region >= len(regions):
                raise ChannelError(f"pages of region {region}; there are {len(regions)}")
            total += check_batch(regions[region], flags, batch)
            if total > self._memory.size // PAGE_SIZE:
                raise ChannelError(f"{total} pages for a memory of {self._memory.size // PAGE_SIZE}")
        return total

    def roll_forward(self, batches: Sequence[tuple[int, int, memoryview]]) -> RollForward:
        """Undo what the replica wrote, then put checked ``batches``, (region, flags, batch), into place.

        HostError: memory is neither the one nor the other now, and the machine is good for nothing.
        """
        sets, written = self._dirty.harvest(), 0
        dropped = sum(pages.count for pages in sets)
        for index, flags, batch in batches:
            if len(batch):
                lib.pv_replica_mark(ffi.from_buffer(batch), len(batch), flags & FLAG_CODED, sets[index].bits)
        for pages in sets:
            pages.count = int(lib.pv_dirty_count(pages.bits, len(pages.bits)))
            runs, count = pages.native_runs()
            _check(lib.pv_replica_drop(ffi.cast("uint8_t *", pages.region.hva), runs, count), "forgotten")
        for index, flags, batch in batches:
            if len(batch):
                region = self._memory.regions[index]
                count = lib.pv_replica_write(region.fd, ffi.from_buffer(batch), len(batch), flags & FLAG_CODED)
                written += _check(count, "written")
        return RollForward(dropped, written)

    def release(self) -> None:
        """The replica is the guest now: its memory is what it sees."""
        self._dirty.stop()


def _check(result: int, what: str) -> int:
    if result < 0:
        raise HostError(f"pages of the replica cannot be {what}: {os.strerror(-result)}")
    return result
