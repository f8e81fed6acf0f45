"""The bus: claims, routing, splitting, what nobody claims, and threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices.bus import CACHE_MAX, MMIO_SPACE, PORT_SPACE, Bus
from pyvmm.devices.device import Device
from pyvmm.errors import BusError
from pyvmm.trace.events import group_events, trace_group


class Bytes(Device):
    """Remembers its accesses; byte ``n`` of its registers reads as ``first + n``."""

    def __init__(self, name: str, max_access: int = 1, first: int = 0) -> None:
        super().__init__()
        self.section_id = name
        self.max_access = max_access
        self.first = first
        self.log: list[tuple[Any, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset, size))
        return int.from_bytes(bytes((self.first + offset + i) & 0xFF for i in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("w", offset, size, value))


def test_a_device_sees_offsets_and_never_its_base() -> None:
    bus, device = Bus("io", PORT_SPACE), Bytes("d", first=0x40)
    bus.claim(0x3F8, 8, device)
    assert bus.read(0x3FD, 1) == 0x45
    bus.write(0x3F9, 1, 7)
    assert device.log == [("r", 5, 1), ("w", 1, 1, 7)]


def test_offset_lets_one_device_have_two_separate_ports() -> None:
    bus, device = Bus("io", PORT_SPACE), Bytes("kbd")
    bus.claim(0x60, 1, device)
    bus.claim(0x64, 1, device, 4)
    bus.read(0x64, 1)
    assert device.log == [("r", 4, 1)]
    assert bus.read(0x61, 1) == 0xFF


@pytest.mark.parametrize("base", [0x3F1, 0x3F8, 0x3FF, 0x3FA])
def test_an_overlap_names_both_devices(base: int) -> None:
    bus = Bus("io", PORT_SPACE)
    bus.claim(0x3F8, 8, Bytes("first"))
    with pytest.raises(BusError, match=r"second.*first"):
        bus.claim(base, 8, Bytes("second"))
    assert [r.device.section_id for r in bus.ranges()] == ["first"]


@pytest.mark.parametrize(("base", "length"), [(0, 0), (-1, 2), (0xFFFF, 2), (0x10000, 1), (5, -1)])
def test_an_impossible_range_is_refused(base: int, length: int) -> None:
    with pytest.raises(BusError, match="d cannot have"):
        Bus("io", PORT_SPACE).claim(base, length, Bytes("d"))


def test_neighbours_do_not_overlap_and_ranges_are_sorted() -> None:
    bus = Bus("io", PORT_SPACE)
    for base in (0x20, 0x10, 0x18):
        bus.claim(base, 8, Bytes(hex(base)))
    assert [r.base for r in bus.ranges()] == [0x10, 0x18, 0x20]
    assert bus.ranges()[0].end == 0x18


def test_release_frees_the_range_even_if_it_was_used() -> None:
    bus, device = Bus("io", PORT_SPACE), Bytes("d")
    bus.claim(0x80, 1, device)
    assert bus.read(0x80, 1) == 0
    bus.release(0x80)
    assert bus.read(0x80, 1) == 0xFF
    bus.claim(0x80, 1, Bytes("e", first=9))
    assert bus.read(0x80, 1) == 9
    with pytest.raises(BusError, match="0x81"):
        bus.release(0x81)


def test_a_wide_access_is_split_and_the_unclaimed_part_is_ones() -> None:
    bus, device = Bus("io", PORT_SPACE), Bytes("d", first=0x10)
    bus.claim(0x100, 2, device)
    assert bus.read(0xFF, 4) == 0xFF_11_10_FF
    bus.write(0xFF, 4, 0x44332211)
    assert device.log == [("r", 0, 1), ("r", 1, 1), ("w", 0, 1, 0x22), ("w", 1, 1, 0x33)]


def test_a_wide_device_gets_wide_accesses_in_powers_of_two() -> None:
    bus, device = Bus("mem", MMIO_SPACE), Bytes("d", max_access=4)
    bus.claim(0xD0000000, 0x1000, device)
    assert bus.read(0xD0000000, 4) == 0x03020100
    assert bus.read(0xD0000000, 8) == 0x0706050403020100
    assert bus.read(0xD0000004, 3) == 0x060504
    assert bus.read(0xD0000FFE, 4) == 0xFFFFFFFE & 0xFFFF0000 | 0xFFFE
    assert device.log == [("r", 0, 4), ("r", 0, 4), ("r", 4, 4), ("r", 4, 2), ("r", 6, 1), ("r", 0xFFE, 2)]


def test_whole_access_only_ignores_a_wider_access_around_it() -> None:
    bus, device = Bus("io", PORT_SPACE), Bytes("reset")
    device.whole_access_only = True
    bus.claim(0xCF9, 1, device)
    bus.write(0xCF8, 4, 0x80000600)  # PCI CONFIG_ADDRESS: the byte at 0xCF9 is not meant
    bus.write(0xCF9, 2, 0x0606)
    assert bus.read(0xCF8, 4) == 0xFFFFFFFF
    assert device.log == []
    bus.write(0xCF9, 1, 6)
    assert device.log == [("w", 0, 1, 6)]


def test_unclaimed_accesses_are_traced_and_read_ones() -> None:
    seen: list[tuple[str, tuple[Any, ...]]] = []
    events = group_events(trace_group("devices"))
    bus = Bus("io", PORT_SPACE)
    for name in ("bus_unclaimed_read", "bus_unclaimed_write"):
        events[name].set_sinks((lambda event, values: seen.append((event.name, values)),))
    try:
        assert bus.read(0x2E8, 2) == 0xFFFF
        bus.write(0xFFFF, 4, 0x01020304)  # beyond the last port, too
    finally:
        for name in ("bus_unclaimed_read", "bus_unclaimed_write"):
            events[name].set_sinks(())
    assert seen == [
        ("bus_unclaimed_read", ("io", 0x2E8, 2)),
        ("bus_unclaimed_write", ("io", 0xFFFF, 4, 0x01020304)),
    ]


def test_a_guest_that_pokes_every_address_does_not_fill_memory() -> None:
    bus = Bus("mem", MMIO_SPACE)
    for address in range(0, 4096 * 3, 3):
        assert bus.read(address, 1) == 0xFF
    assert len(bus._table.routes) <= CACHE_MAX


@settings(max_examples=150, deadline=None)
@given(
    claims=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12), st.sampled_from([1, 2, 4, 8])), max_size=6),
    accesses=st.lists(st.tuples(st.integers(0, 64), st.integers(1, 8)), min_size=1, max_size=10),
)
def test_every_access_is_the_bytes_it_covers(
    claims: list[tuple[int, int, int]], accesses: list[tuple[int, int]]
) -> None:
    """Against a model with one byte per address: whatever is claimed and however it is split."""
    bus = Bus("io", 64)
    model: dict[int, int] = {}
    devices: dict[int, Bytes] = {}
    for number, (base, length, width) in enumerate(claims):
        device = Bytes(f"d{number}", width, first=37 * number)
        addresses = range(base, base + length)
        if base + length > 64 or any(a in model for a in addresses):
            with pytest.raises(BusError):
                bus.claim(base, length, device)
        else:
            bus.claim(base, length, device)
            model |= {a: (device.first + a - base) & 0xFF for a in addresses}
            devices[number] = device
    for address, size in accesses:
        expected = bytes(model.get(address + i, 0xFF) for i in range(size))
        assert bus.read(address, size).to_bytes(size, "little") == expected
    assert all(s <= d.max_access and s & (s - 1) == 0 for d in devices.values() for _, _, s in d.log)


class Counter(Device):
    """Loses counts unless somebody keeps threads out while it works."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0

    def write(self, offset: int, size: int, value: int) -> None:
        before = self.value
        for _ in range(20):
            pass
        self.value = before + 1


def test_vcpu_threads_never_meet_inside_a_device() -> None:
    bus, device = Bus("io", PORT_SPACE), Counter()
    bus.claim(0x10, 4, device)
    inside = threading.Event()

    def vcpu() -> None:
        for _ in range(3000):
            bus.write(0x10, 1, 0)
            bus.write(0x11, 2, 0)  # split: two writes

    threads = [threading.Thread(target=vcpu) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert device.value == 4 * 3000 * 3

    # And the lock is the device's: with it held elsewhere an access waits, one to another device does not.
    other = Bytes("other")
    bus.claim(0x20, 1, other)

    def write_then_say() -> None:
        bus.write(0x10, 1, 0)
        inside.set()

    waiting = threading.Thread(target=write_then_say)
    with device.lock:
        waiting.start()
        assert bus.read(0x20, 1) == 0
        assert not inside.wait(0.05)
    assert inside.wait(10)
    waiting.join(10)


def test_accesses_during_claims_see_the_device_or_nobody() -> None:
    bus, stop = Bus("io", PORT_SPACE), threading.Event()
    seen: set[int] = set()
    failures: list[BaseException] = []

    def vcpu() -> None:
        try:
            while not stop.is_set():
                seen.add(bus.read(0x80, 2))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=vcpu) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        bus.claim(0x80, 2, Bytes("d", max_access=2, first=0x11))
        bus.release(0x80)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert seen <= {0x1211, 0xFFFF}
    assert bus.read(0x80, 2) == 0xFFFF, "no route outlives its claim"


def test_a_look_up_that_was_overtaken_by_a_release_leaves_no_stale_route() -> None:
    bus = Bus("io", PORT_SPACE)
    bus.claim(0x80, 1, Bytes("d", first=7))
    overtaken = bus._table
    bus.release(0x80)
    assert bus._find(overtaken, 0x80).room == 1
    assert bus.read(0x80, 1) == 0xFF
