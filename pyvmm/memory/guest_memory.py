"""Guest-physical memory: one memfd per region, mapped here, every access bounds-checked.

Nothing outside ``pyvmm/memory`` holds a raw buffer of guest memory; the native core gets the table of
regions (GPA, size, HVA) and checks bounds itself. Whatever the host writes into guest memory is marked
in the region's :class:`DirtyBitmap`, because KVM's dirty log only sees what vCPUs write.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pyvmm.errors import ConfigError, GuestMemoryError, HostError, StateError
from pyvmm.memory.dirty import DirtyBitmap
from pyvmm.native import address_of, fallocate_punch_hole, ffi, lib

PAGE_SIZE = 4096
Runs = Sequence[tuple[int, int]]
"""Pages of a region, (first, count), ascending."""
MAP_NORESERVE = 0x4000  # x86-64's value; Python names it only from 3.13 on


class Region:
    """``size`` bytes of guest RAM from guest-physical address ``gpa``, backed by a memfd.

    Owns the memfd and its mapping; :meth:`close` gives both back.
    """

    def __init__(self, gpa: int, size: int, name: str = "ram", *, private: bool = False) -> None:
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
            raise ConfigError(f"memory region {name}: {gpa:#x}+{size:#x} is not made of whole 4 KiB pages")
        self.gpa = gpa
        self.size = size
        self.name = name
        self.private = private
        self._made_private = private
        self._file_mapped = False
        self.fd = os.memfd_create(f"pyvmm-{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            sharing = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
            self._map = mmap.mmap(self.fd, size, flags=sharing | MAP_NORESERVE)
        except (OSError, ValueError, OverflowError) as error:
            os.close(self.fd)
            raise HostError(f"cannot map {size >> 20} MiB of guest memory: {error}; use a smaller --memory") from None
        self.hva = address_of(self._map)
        self.dirty = DirtyBitmap(size // PAGE_SIZE)

    @property
    def end(self) -> int:
        """First guest-physical address after the region."""
        return self.gpa + self.size

    def discard(self) -> None:
        """Give all pages back to the host; they read as zeros. KVM follows through its MMU notifier."""
        fallocate_punch_hole(self.fd, self.size)
        if self.private:  # copies of its own, or another file's pages, are still there
            self._remap(self.fd, 0, private=self._made_private)
            self._file_mapped = False
        self.dirty.mark(0, self.size // PAGE_SIZE)

    def present(self) -> list[tuple[int, int]]:
        """Runs of pages, (first, count), that may hold something else than zeros: where the memfd has data.

        Reading a page instead would make the host find memory for it. A private region's own copies do not show in
        the memfd, but among this process's pages; of one that shows another file all may.
        """
        if self._file_mapped:
            return [(0, self.size // PAGE_SIZE)]
        if self.private:
            return join_runs(self._in_file(), self.own_copies())
        return self._in_file()

    def own_copies(self) -> list[tuple[int, int]]:
        """Private regions: runs of pages that are copies of the memfd's, as the kernel made them for a write."""
        runs, found, _ = self._native_copies()
        return [(int(runs[i].first), int(runs[i].count)) for i in range(found)]

    def _native_copies(self) -> tuple[Any, int, int]:
        """(``struct pv_page_range[]``, its length, pages in it) of :meth:`own_copies`."""
        pages = self.size // PAGE_SIZE
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            told = os.pread(pagemap.fileno(), pages * 8, self.hva // PAGE_SIZE * 8)
        bits = ffi.new("uint64_t[]", (pages + 63) // 64)
        count = int(lib.pv_own_pages(ffi.from_buffer("uint64_t[]", told), len(told) // 8, bits))
        runs = ffi.new("struct pv_page_range[]", max(count, 1))
        return runs, int(lib.pv_dirty_ranges(bits, pages, 0, runs, count)) if count else 0, count

    def free_covered(self) -> int:
        """Private regions: give back the memfd's pages under which there are copies, and which nobody sees; how many.

        For when the mapping is the truth: the memfd's content is needed no more. vCPUs may run. OSError.
        """
        if not self.private or self._file_mapped:
            return 0
        runs, found, count = self._native_copies()
        result = lib.pv_free_covered(self.fd, runs, found)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return count

    def keep_private(self) -> None:
        """From now on the memfd stays as it is and what anybody here writes is a copy. No vCPU runs.

        StateError: something else than the memfd is mapped, whose content would be lost.
        """
        if self.private:
            raise StateError(f"memory region {self.name} is mapped privately already")
        self._remap(self.fd, 0, private=True)

    def _in_file(self) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        at = 0
        while at < self.size:
            try:
                first = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole behind here
            at = os.lseek(self.fd, first, os.SEEK_HOLE)
            start, end = first // PAGE_SIZE, -(-at // PAGE_SIZE)
            runs.append((start, end - start))
        return runs

    def map_file(self, fd: int, offset: int) -> None:
        """Have the region hold what the file ``fd`` holds from ``offset`` (whole pages) on, fetched page by page when
        it is used. The file is not written to, must not be shortened, and may be closed. No vCPU runs.
        """
        fallocate_punch_hole(self.fd, self.size)
        self._file_mapped = True
        self._remap(fd, offset, private=True)
        self.dirty.mark(0, self.size // PAGE_SIZE)

    def _remap(self, fd: int, offset: int, *, private: bool, at: int = 0, size: int | None = None) -> None:
        size = self.size if size is None else size
        result = lib.pv_remap(self.hva + at, size, fd, offset, private)
        if result < 0:
            raise HostError(f"cannot map {size >> 10} KiB of guest memory: {os.strerror(-result)}")
        self.private = private

    def map_pages(self, fd: int, offset: int, runs: Runs) -> None:
        """Over what :meth:`map_file` mapped: the pages of ``runs``, (first, count), come from ``fd``, page 0 at
        ``offset``.
        """
        for first, count in runs:
            at = first * PAGE_SIZE
            self._remap(fd, offset + at, private=True, at=at, size=count * PAGE_SIZE)

    def differences(self, base: Region | None, room: int) -> list[tuple[int, int]]:
        """Runs of pages, (first, count), that differ from ``base``'s, a region of this size, or from zeros.

        At most ``room``: were there more, close ones are joined, and hold pages that do not differ as well.
        """
        runs = ffi.new("uint64_t[]", 2 * room)
        used, gap = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        mine = ffi.cast("uint8_t *", self.hva)
        other = ffi.cast("uint8_t *", base.hva) if base is not None else ffi.NULL
        at, pages = 0, self.size // PAGE_SIZE
        for first, count in [*self.present(), (pages, 0)]:
            lib.pv_ram_differences(ffi.NULL, other, at, first - at, runs, room, used, gap)
            lib.pv_ram_differences(mine, other, first, count, runs, room, used, gap)
            at = first + count
        return [(int(runs[2 * i]), int(runs[2 * i + 1])) for i in range(int(used[0]))]

    def pages(self, first: int, count: int) -> bytes:
        """The content of whole pages. No vCPU and no device runs."""
        return self._map[first * PAGE_SIZE : (first + count) * PAGE_SIZE]

    def fill_pages(self, first: int, data: bytes) -> None:
        """Write whole pages of a region that no machine uses yet."""
        self._map[first * PAGE_SIZE : first * PAGE_SIZE + len(data)] = data

    def _present_in(self, runs: Runs | None) -> Iterator[tuple[int, int]]:
        """Those of :meth:`present` that are in ``runs``; both ascend."""
        if runs is None:
            yield from self.present()
            return
        present, i = self.present(), 0
        for first, count in runs:
            while i < len(present) and sum(present[i]) <= first:
                i += 1
            k = i
            while k < len(present) and present[k][0] < first + count:
                start, end = max(first, present[k][0]), min(first + count, sum(present[k]))
                yield start, end - start
                k += 1

    def write_to_file(self, fd: int, offset: int, runs: Runs | None = None) -> tuple[int, int]:
        """Write the pages (``None``: all; else those in ``runs``) that are not zero to ``fd``, page 0 at ``offset``;
        (CRC of them, their number).

        OSError. See native/ram_file.h for the CRC. No vCPU and no device runs.
        """
        crc, written = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        for first, count in self._present_in(runs):
            result = lib.pv_ram_write(fd, offset, ffi.cast("uint8_t *", self.hva), first, count, crc, written)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
        return int(crc[0]), int(written[0])

    def sum_pages(self, runs: Runs | None = None) -> tuple[int, int]:
        """(CRC, number) of the pages that are not zero, as :meth:`write_to_file` gives them."""
        crc, present = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        for first, count in self._present_in(runs):
            lib.pv_ram_sum(ffi.cast("uint8_t *", self.hva), first, count, crc, present)
        return int(crc[0]), int(present[0])

    def drop_private_pages(self, offset: int, size: int) -> None:
        """Private regions: forget the guest's own copies of whole pages, the memfd's content shows again."""
        self._map.madvise(mmap.MADV_DONTNEED, offset, size)

    def close(self) -> None:
        """Unmap and close the memfd; the KVM memslot over it must be gone."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1


def join_runs(one: Runs, other: Runs) -> list[tuple[int, int]]:
    """Runs of pages that are in either; all ascend."""
    joined: list[tuple[int, int]] = []
    for first, count in sorted([*one, *other]):
        if joined and first <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(joined[-1][1], first + count - joined[-1][0]))
        else:
            joined.append((first, count))
    return joined


class GuestMemory:
    """All of a guest's RAM. Accesses may cross adjacent regions; a hole raises GuestMemoryError."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = sorted(regions, key=lambda r: r.gpa)
        for before, after in zip(self.regions, self.regions[1:], strict=False):
            if before.end > after.gpa:
                raise ConfigError(f"memory regions {before.name} and {after.name} overlap")
        self._starts = [r.gpa for r in self.regions]

    @property
    def size(self) -> int:
        """Bytes of RAM, holes not counted."""
        return sum(r.size for r in self.regions)

    def _pieces(self, gpa: int, size: int, what: str) -> Iterator[tuple[Region, int, int]]:
        """(region, offset in it, length) covering ``[gpa, gpa+size)``; checks all before the first."""
        if gpa < 0 or size < 0:
            raise GuestMemoryError(gpa, size, what)
        pieces = []
        at, left = gpa, size
        while left:
            index = bisect.bisect_right(self._starts, at) - 1
            if index < 0 or at >= self.regions[index].end:
                raise GuestMemoryError(gpa, size, what)
            region = self.regions[index]
            length = min(left, region.end - at)
            pieces.append((region, at - region.gpa, length))
            at += length
            left -= length
        return iter(pieces)

    def contains(self, gpa: int, size: int = 1) -> bool:
        """Whether all of ``[gpa, gpa+size)`` is RAM."""
        try:
            self._pieces(gpa, size, "check")
        except GuestMemoryError:
            return False
        return True

    def gpa_of(self, hva: int) -> int:
        """The guest-physical address that is mapped at ``hva``; GuestMemoryError if that is no guest memory."""
        for region in self.regions:
            if region.hva <= hva < region.hva + region.size:
                return region.gpa + hva - region.hva
        raise GuestMemoryError(hva, 1, "host address")

    def read(self, gpa: int, size: int) -> bytes:
        """``size`` bytes from ``gpa``; GuestMemoryError if any of them is not RAM."""
        return b"".join(r._map[o : o + n] for r, o, n in self._pieces(gpa, size, "read"))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``gpa`` and mark its pages dirty; nothing is written if any byte is not RAM."""
        view = memoryview(data)
        done = 0
        for region, offset, length in self._pieces(gpa, len(view), "write"):
            region._map[offset : offset + length] = view[done : done + length]
            region.dirty.mark(offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE + 1)
            done += length

    def read_uint(self, gpa: int, size: int) -> int:
        """A little-endian unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.read(gpa, size), "little")

    def write_uint(self, gpa: int, size: int, value: int) -> None:
        """Write the low ``size`` bytes of ``value``, little-endian."""
        self.write(gpa, (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little"))

    def zero(self, gpa: int, size: int) -> None:
        """Write zeros. Whole pages go back to the host, so clearing a kernel's bss touches no fresh memory."""
        for region, offset, length in self._pieces(gpa, size, "zero"):
            end = offset + length
            first, last = -(-offset // PAGE_SIZE) * PAGE_SIZE, end // PAGE_SIZE * PAGE_SIZE
            if region.private or first >= last:  # punching the memfd would leave a private copy as it is
                for at in range(offset, end, 1 << 20):
                    region._map[at : min(at + (1 << 20), end)] = bytes(min(1 << 20, end - at))
            else:
                region._map[offset:first] = bytes(first - offset)
                region._map.madvise(mmap.MADV_REMOVE, first, last - first)
                region._map[last:end] = bytes(end - last)
            region.dirty.mark(offset // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1)

    def drop_mapping(self, gpa: int) -> None:
        """Let the host forget where the page at ``gpa`` is mapped; its content stays, the next access finds it again.

        Outside RAM, and for private regions (whose content is the mapping), nothing happens.
        """
        page = gpa & -PAGE_SIZE
        if not self.contains(page, PAGE_SIZE):
            return
        region, offset, _ = next(self._pieces(page, PAGE_SIZE, "flush"))
        if not region.private:
            region._map.madvise(mmap.MADV_DONTNEED, offset, PAGE_SIZE)

    def discard(self) -> None:
        """Zero all memory by giving it back to the host; vCPUs are parked."""
        for region in self.regions:
            region.discard()

    def close(self) -> None:
        """Give every region back."""
        for region in self.regions:
            region.close()
