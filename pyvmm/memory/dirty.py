"""Which pages were written: one bit a page, as KVM_GET_DIRTY_LOG lays them out (LSB first)."""

from __future__ import annotations

import threading


class DirtyBitmap:
    """A thread-safe bitmap of ``pages`` bits. Marking and harvesting never lose a mark to each other."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._bits = bytearray((pages + 63) // 64 * 8)
        self._lock = threading.Lock()

    def mark(self, first: int, end: int) -> None:
        """Mark pages ``first`` to ``end - 1``."""
        if not 0 <= first <= end <= self.pages:
            raise IndexError(f"pages {first}..{end} outside a bitmap of {self.pages}")
        with self._lock:
            while first < end and first & 7:
                self._bits[first >> 3] |= 1 << (first & 7)
                first += 1
            whole = (end - first) >> 3
            if whole > 0:
                self._bits[first >> 3 : (first >> 3) + whole] = b"\xff" * whole
                first += whole << 3
            while first < end:
                self._bits[first >> 3] |= 1 << (first & 7)
                first += 1

    def merge(self, bits: bytes | bytearray) -> None:
        """OR another bitmap of the same shape into this one (a failed round gives its bits back)."""
        if len(bits) != len(self._bits):
            raise ValueError(f"bitmap of {len(bits)} bytes merged into one of {len(self._bits)}")
        with self._lock:
            merged = int.from_bytes(self._bits, "little") | int.from_bytes(bits, "little")
            self._bits[:] = merged.to_bytes(len(self._bits), "little")

    def harvest(self) -> bytes:
        """The bits, cleared in the same step."""
        with self._lock:
            bits = bytes(self._bits)
            self._bits[:] = bytes(len(bits))
        return bits

    def test(self, page: int) -> bool:
        """Whether ``page`` is marked."""
        return bool(self._bits[page >> 3] >> (page & 7) & 1)
