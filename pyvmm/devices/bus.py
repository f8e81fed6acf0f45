"""A bus: finds the device that has an address. One for I/O ports, one for MMIO.

An access wider than the device takes is split into consecutive offsets, lowest first, as an ISA bus does.
Whatever nobody claims reads as all ones (nothing pulls the data lines down) and is traced.

Threads: any number of vCPU threads read and write at once. The bus holds the *device's* lock (``Device.lock``)
around each call, so two vCPUs on two devices never wait for each other and a device is never entered twice. A
split access takes the lock once per piece, as separate bus cycles would. Ranges may be claimed and released at
any time: they live in one immutable table that is replaced as a whole; an access that found the old table may
still reach a released device once.

Repeats of string instructions (``rep outsb``: the same port, count times) are the caller's.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from pyvmm.devices.device import Device
from pyvmm.errors import BusError
from pyvmm.trace import trace_group

T = trace_group("devices")

PORT_SPACE = 0x10000
MMIO_SPACE = 1 << 52
CACHE_MAX = 1024
"""Remembered addresses. A guest that pokes more of them empties the cache, which costs it time, not us memory."""


class BusRange(NamedTuple):
    """``length`` addresses from ``base`` belong to ``device``; ``base`` is its ``offset``."""

    base: int
    length: int
    device: Device
    offset: int

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.base + self.length


class _Route(NamedTuple):
    """Where an address leads. ``room``: widest access that needs no splitting; 0: nobody has the address."""

    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    lock: AbstractContextManager[Any]
    offset: int
    room: int


class _Table:
    """The ranges at one moment, sorted, and the routes found among them so far."""

    __slots__ = ("bases", "ranges", "routes")

    def __init__(self, ranges: tuple[BusRange, ...]) -> None:
        self.ranges = ranges
        self.bases = [r.base for r in ranges]
        self.routes: dict[int, _Route] = {}

    def at_or_below(self, address: int) -> int:
        """Index of the last range that starts at or below ``address``, -1 if none does."""
        return bisect_right(self.bases, address) - 1

    def owner(self, address: int) -> BusRange | None:
        """The range that ``address`` lies in."""
        index = self.at_or_below(address)
        found = self.ranges[index] if index >= 0 else None
        return found if found is not None and address < found.end else None


_NOWHERE = Device()


class Bus:
    """``size_limit`` addresses (0 to ``size_limit - 1``) and who has them."""

    def __init__(self, name: str, size_limit: int) -> None:
        self.name = name
        self.size_limit = size_limit
        self._claim_lock = threading.Lock()
        self._table = _Table(())

    def claim(self, base: int, length: int, device: Device, offset: int = 0) -> None:
        """Give ``device`` the addresses ``[base, base + length)``; ``base`` becomes its offset ``offset``.

        Raises BusError for an empty range, one outside the bus, or one that overlaps another device's.
        """
        name = _name(device)
        if length < 1 or base < 0 or offset < 0 or base + length > self.size_limit:
            raise BusError(
                f"{self.name}: {name} cannot have {length} addresses from {base:#x} (offset {offset}): "
                f"the bus has addresses 0 to {self.size_limit - 1:#x}"
            )
        with self._claim_lock:
            for other in self._table.ranges:
                if base < other.end and other.base < base + length:
                    raise BusError(
                        f"{self.name}: {name} at {base:#x}-{base + length - 1:#x} overlaps "
                        f"{_name(other.device)} at {other.base:#x}-{other.end - 1:#x}"
                    )
            claimed = BusRange(base, length, device, offset)
            self._table = _Table(tuple(sorted((*self._table.ranges, claimed), key=lambda r: r.base)))
        T.bus_claim.on and T.bus_claim(self.name, base, length, name)

    def release(self, base: int) -> None:
        """Take the range that starts at ``base`` from its device. Raises BusError if none starts there."""
        with self._claim_lock:
            kept = tuple(r for r in self._table.ranges if r.base != base)
            if len(kept) == len(self._table.ranges):
                raise BusError(f"{self.name}: no device has a range that starts at {base:#x}")
            self._table = _Table(kept)

    def ranges(self) -> list[BusRange]:
        """All claimed ranges in the order of their addresses."""
        return list(self._table.ranges)

    def owner(self, address: int) -> BusRange | None:
        """The range that ``address`` lies in; ``None``: nobody has it."""
        return self._table.owner(address)

    def read(self, address: int, size: int) -> int:
        """Value of ``size`` bytes (little-endian) at ``address``."""
        table = self._table
        read, _, lock, offset, room = table.routes.get(address) or self._find(table, address)
        # A size that is not a power of two comes from an MMIO access that KVM cut at a page boundary.
        if size > room or size & (size - 1):
            return self._read_pieces(address, size)
        with lock:
            return read(offset, size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write ``size`` bytes of ``value`` (little-endian) at ``address``."""
        table = self._table
        _, write, lock, offset, room = table.routes.get(address) or self._find(table, address)
        if size > room or size & (size - 1):
            self._write_pieces(address, size, value)
            return
        with lock:
            write(offset, size, value)

    def _find(self, table: _Table, address: int) -> _Route:
        found = table.owner(address)
        if found is None:
            route = _Route(_NOWHERE.read, _NOWHERE.write, _NOWHERE.lock, 0, 0)
        else:
            device = found.device
            room = min(device.max_access, found.end - address)
            offset = found.offset + address - found.base
            route = _Route(device.read, device.write, device.lock, offset, room)
        # Stored in the table it was found in: a claim meanwhile has replaced table and routes together.
        if len(table.routes) >= CACHE_MAX:
            table.routes.clear()
        table.routes[address] = route
        return route

    def _pieces(self, start: int, size: int) -> Iterator[tuple[int, int, BusRange | None]]:
        """The access cut into (address, size, range): powers of two within ``max_access``, or unclaimed runs."""
        table = self._table
        address, end = start, start + size
        while address < end:
            index = table.at_or_below(address)
            found = table.ranges[index] if index >= 0 else None
            if found is not None and address < found.end:
                if not found.device.whole_access_only or (found.base <= start and end <= found.end):
                    widest = min(end - address, found.end - address, found.device.max_access)
                    count = 1 << (widest.bit_length() - 1)
                    yield address, count, found
                    address += count
                    continue
                stop = found.end
            else:
                stop = table.bases[index + 1] if index + 1 < len(table.bases) else end
            stop = min(stop, end)
            yield address, stop - address, None
            address = stop

    def _read_pieces(self, start: int, size: int) -> int:
        value = 0
        for address, count, found in self._pieces(start, size):
            ones = (1 << 8 * count) - 1
            if found is None:
                T.bus_unclaimed_read.on and T.bus_unclaimed_read(self.name, address, count)
                piece = ones
            else:
                with found.device.lock:
                    piece = found.device.read(found.offset + address - found.base, count) & ones
            value |= piece << 8 * (address - start)
        return value

    def _write_pieces(self, start: int, size: int, value: int) -> None:
        for address, count, found in self._pieces(start, size):
            piece = (value >> 8 * (address - start)) & ((1 << 8 * count) - 1)
            if found is None:
                T.bus_unclaimed_write.on and T.bus_unclaimed_write(self.name, address, count, piece)
            else:
                with found.device.lock:
                    found.device.write(found.offset + address - found.base, count, piece)


def _name(device: Device) -> str:
    return device.section_id or type(device).__name__
