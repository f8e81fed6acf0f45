"""Where the primary copies the pages of a checkpoint, so that its guest need not wait until they are sent.

One pass over the pages, while the guest stands still: copied, looked at, and left out if they are zeros. The buffer is
touched once, beforehand, and used again and again: finding memory for it would cost more than the copy. It is bounded;
what does not fit (:attr:`Staging.overflowed`) is sent with the guest standing still, buffer after buffer. When the
guest runs again, the copy is made smaller in its place (delta.py); what that has to remember counts in the bound.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

from pyvmm.colo.checkpoint import BATCH
from pyvmm.colo.delta import FLAG_CODED, DeltaKind, PageDeltas
from pyvmm.errors import HostError
from pyvmm.machine.dirty_tracker import PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, Region
from pyvmm.native import address_of, ffi, lib

SIZE_MIN = 1 << 20
FAULT_AHEAD = 2
"""As many times the last checkpoint's bytes are touched beforehand for the next one."""
DELTA_SHARE = 4
"""Of the bound, one part in so many is for what the pages' changes are told from."""


class _Region:
    """Packing the pages of one region, in as many goes as it takes."""

    def __init__(self, index: int, pages: PageSet) -> None:
        runs, count = pages.native_runs()
        self.index = index
        self.hva = ffi.cast("uint8_t *", pages.region.hva)
        self._runs = runs
        self.cursor = ffi.new("struct pv_ram_cursor *", {"ranges": runs, "range_count": count})

    def rewind(self) -> None:
        cursor = self.cursor
        cursor.range = cursor.page = cursor.packed = cursor.zero = 0


class Staging:
    """``limit`` bytes at most. One thread at a time."""

    def __init__(self, limit: int, memory: Sequence[Region]) -> None:
        self.deltas = PageDeltas(memory, limit // DELTA_SHARE)
        self.limit = max(limit - limit // DELTA_SHARE, SIZE_MIN)
        self.pages = self.zero_pages = self.delta_pages = self.saved = 0
        """Of the checkpoint staged last."""
        self.overflowed = False
        self.size = 0
        """Bytes of all its batches, with their heads."""
        self._map = mmap.mmap(-1, self.limit, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        self._start = ffi.cast("uint8_t *", address_of(self._map))
        self._view = memoryview(self._map)
        self._used = 0
        self._touched = 0
        self._pieces: list[tuple[int, int]] = []
        """(offset, bytes) of what is to be sent of the buffer."""
        self._regions: list[_Region] = []
        self.prepare(SIZE_MIN)

    def prepare(self, size: int | None = None) -> None:
        """Have memory for the next checkpoint: ``size`` bytes, or what the last ones suggest. While the guest runs."""
        self.deltas.prepare()
        wanted = min(self.limit, size if size is not None else self._used * FAULT_AHEAD)
        if wanted > self._touched:
            start = self._touched & -PAGE_SIZE
            try:
                self._map.madvise(MADV_POPULATE_WRITE, start, (wanted - start + PAGE_SIZE - 1) & -PAGE_SIZE)
            except OSError:  # Linux before 5.14
                for at in range(start, wanted, PAGE_SIZE):
                    self._map[at] = 0
            self._touched = wanted

    def stage(self, sets: Sequence[PageSet]) -> None:
        """Copy the pages of ``sets``, which are all of memory's regions in order. The guest stands still."""
        self._regions = [_Region(index, pages) for index, pages in enumerate(sets) if pages.count]
        self.size = self._used = self._fill(self._regions)
        self._pieces = [(0, self._used)]
        self.overflowed = any(not self._done(region) for region in self._regions)
        self._count()
        if self.overflowed:
            self._measure()

    def shrink(self, kind: DeltaKind) -> None:
        """Make what was staged smaller, in its place. It must be sent then. The guest may run, but if it overflowed."""
        self._pieces = [(0, self._used)]
        self.delta_pages = self.saved = 0
        if kind == "off" or self.overflowed:
            self.deltas.forget()
            return
        self.deltas.begin()
        coded_before, saved_before = int(self.deltas.counts.coded), int(self.deltas.counts.saved)
        self._pieces, at, self.size = [], 0, 0
        while at < self._used:
            region, _, size = BATCH.unpack_from(self._map, at)
            coded = self.deltas.encode(region, self._start + at + BATCH.size, size, lz4=kind == "lz4")
            BATCH.pack_into(self._map, at, region, FLAG_CODED if coded < size else 0, coded)
            self._pieces.append((at, BATCH.size + coded))
            self.size += BATCH.size + coded
            at += BATCH.size + size
        self.delta_pages = int(self.deltas.counts.coded) - coded_before
        self.saved = int(self.deltas.counts.saved) - saved_before

    def pieces(self) -> Iterator[memoryview]:
        """All batches, :attr:`size` bytes. What overflowed is packed now: the guest must stand still until the end."""
        for at, size in self._pieces:
            yield self._view[at : at + size]
        if not self.overflowed:
            return
        left = self.size - self._used
        while left:
            filled = self._fill(self._regions)
            if not filled or filled > left:
                raise HostError("guest memory changed while it was sent: is the guest really standing still?")
            left -= filled
            yield self._view[:filled]

    def close(self) -> None:
        """Give the buffer back."""
        self._view.release()
        self.deltas.close()
        self._regions = []
        self._start = ffi.NULL
        self._map.close()

    def _fill(self, regions: Sequence[_Region]) -> int:
        """Pack on where the cursors are, up to the buffer's size; bytes used."""
        at = 0
        for region in regions:
            if self._done(region):
                continue
            room = self.limit - at - BATCH.size
            if room <= 0:
                break
            used = int(lib.pv_ram_pack(region.cursor, region.hva, self._start + at + BATCH.size, room))
            if used:
                BATCH.pack_into(self._map, at, region.index, 0, used)
                at += BATCH.size + used
            if not self._done(region):
                break
        return at

    @staticmethod
    def _done(region: _Region) -> bool:
        return bool(region.cursor.range == region.cursor.range_count)

    def _count(self) -> None:
        self.pages = sum(int(region.cursor.packed) for region in self._regions)
        self.zero_pages = sum(int(region.cursor.zero) for region in self._regions)

    def _measure(self) -> None:
        """How long all of it is, packed piece by piece into the same buffer; then the first piece once more."""
        while filled := self._fill(self._regions):
            self.size += filled
        self._count()
        for region in self._regions:
            region.rewind()
        self._used = self._fill(self._regions)
        self._pieces = [(0, self._used)]


MADV_POPULATE_WRITE: Any = 23
"""Linux 5.14; Python has no name for it."""
