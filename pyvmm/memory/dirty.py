"""Which pages the host wrote: one bit a page, as KVM_GET_DIRTY_LOG lays them out (LSB first)."""

from __future__ import annotations

from pyvmm.native import ffi, lib


class DirtyBitmap:
    """A bitmap of ``pages`` bits. Marking and harvesting, from any thread and from the native core, lose nothing."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._words = (pages + 63) // 64
        self.native = ffi.new("uint64_t[]", self._words)
        """The words, for the native core."""

    def mark(self, first: int, end: int) -> None:
        """Mark pages ``first`` to ``end - 1``."""
        if not 0 <= first <= end <= self.pages:
            raise IndexError(f"pages {first}..{end} outside a bitmap of {self.pages}")
        lib.pv_dirty_mark(self.native, first, end)

    def merge(self, bits: bytes | bytearray) -> None:
        """OR another bitmap of the same shape into this one (a failed round gives its bits back)."""
        if len(bits) != self._words * 8:
            raise ValueError(f"bitmap of {len(bits)} bytes merged into one of {self._words * 8}")
        lib.pv_dirty_merge(self.native, ffi.from_buffer("uint64_t[]", bits), self._words)

    def harvest(self) -> bytes:
        """The bits, cleared in the same step; 8 bytes for each 64 pages begun."""
        taken = ffi.new("uint64_t[]", self._words)
        lib.pv_dirty_harvest(self.native, taken, self._words)
        return bytes(ffi.buffer(taken))

    def test(self, page: int) -> bool:
        """Whether ``page`` is marked."""
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} outside a bitmap of {self.pages}")
        return bool(self.native[page >> 6] >> (page & 63) & 1)
