"""Pages of a checkpoint as their changes since the last one, where that is smaller (native/page_delta.h).

The primary keeps what it sent last of the pages that it sends again and again, within a bound (:class:`PageDeltas`);
the secondary has all of the last checkpoint anyway. Coding happens while the guest runs, in the buffer that the pages
were copied to, and decides page by page: whole, the words that have changed, or these as an LZ4 block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pyvmm.errors import ChannelError
from pyvmm.memory.guest_memory import PAGE_SIZE, Region
from pyvmm.native import ffi, lib

FLAG_CODED = 1
"""Of a batch in a checkpoint: it may hold coded pages."""
DeltaKind = Literal["off", "xor", "lz4"]
"""``xor``: changed words. ``lz4``: and LZ4 where that is smaller, for links that are slower than packing (0.5 GB/s)."""

TOUCH = 1024
"""Pages that memory is found for at once: 30 ms on a host that is slow at it."""


class PageDeltas:
    """The primary's end, of one pair. ``limit``: bytes that it may take."""

    def __init__(self, regions: Sequence[Region], limit: int) -> None:
        self.counts: Any = ffi.new("struct pv_delta_counts *")
        """Of all checkpoints: pages coded and plain; of the coded ones those based on the last, and with LZ4; bytes
        saved.
        """
        self._pages = [region.size // PAGE_SIZE for region in regions]
        self._limit = limit
        self._native = self._new()

    def _new(self) -> Any:
        self._empty = True
        found = lib.pv_delta_new(self._pages, len(self._pages), self._limit)
        return ffi.gc(found, lib.pv_delta_free) if found else None

    def begin(self) -> None:
        """Another checkpoint."""
        if self._native is not None:
            lib.pv_delta_next(self._native)

    def prepare(self) -> None:
        """Between checkpoints: have memory for what the next one may want to keep."""
        if self._native is not None:
            lib.pv_delta_touch(self._native, TOUCH)

    def encode(self, region: int, batch: Any, size: int, *, lz4: bool) -> int:
        """Code ``batch`` (``uint8_t *``, pv_ram_pack's) in its place; its new size. It must be sent then, in order."""
        if self._native is None:
            return size
        self._empty = False
        return int(lib.pv_delta_encode(self._native, region, batch, size, lz4, self.counts))

    def forget(self) -> None:
        """Pages are going to be sent that this will not see."""
        if self._empty:
            return
        self._native = None  # a new one can be had only when the old one's memory is back
        self._native = self._new()

    def close(self) -> None:
        """Give the memory back."""
        self._native = None


def check_batch(region: Region, flags: int, batch: memoryview) -> int:
    """Pages in ``batch`` (hostile). ChannelError if anything of it is not as it has to be."""
    if flags & ~FLAG_CODED:
        raise ChannelError(f"a batch of pages with flags {flags:#x}")
    if not len(batch):
        return 0
    check = lib.pv_delta_check if flags & FLAG_CODED else lib.pv_ram_check
    count = int(check(ffi.from_buffer(batch), len(batch), region.size // PAGE_SIZE))
    if count < 0:
        raise ChannelError(f"a batch whose pages are not in region {region.name}, or not whole")
    return count
