"""Breakpoints by themselves: what each is made of on which host, and that memory gets back what it had."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.gdb.breakpoints import Breakpoints, Key, NotAvailable
from pyvmm.host.debug_facilities import DebugFacilities
from pyvmm.memory.guest_memory import GuestMemory, Region
from tests.unit.gdb.test_session import real_mode

SIZE = 1 << 13
HARDWARE = DebugFacilities(execute=True, data=True, int3=True)
EMULATED = DebugFacilities(execute=True, data=False, int3=True)
STEPS_ONLY = DebugFacilities(execute=False, data=False, int3=False)
QUIRKS = frozenset({"syscall-entry", "int-entry"})


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    region = Region(0, SIZE, "breakpoints")
    yield GuestMemory([region])
    region.close()


KEYS = st.builds(Key, st.integers(0, 4), st.integers(0, SIZE + 20), st.sampled_from([1, 2, 4, 8, 3, 40, 1 << 40]))
DEEDS = st.lists(st.tuples(st.sampled_from(["insert", "remove", "plant", "lift"]), KEYS), max_size=25)


@settings(max_examples=100)
@given(deeds=DEEDS, emulated=st.booleans(), content=st.binary(min_size=64, max_size=64))
def test_whatever_was_done_memory_gets_back_what_it_had(
    memory: GuestMemory, deeds: list[tuple[str, Key]], emulated: bool, content: bytes
) -> None:
    memory.write(0, content * (SIZE // 64))
    points = Breakpoints(memory, QUIRKS if emulated else frozenset(), EMULATED if emulated else HARDWARE)
    for deed, key in deeds:
        if deed == "insert":
            try:
                points.insert(key, real_mode())
            except NotAvailable as error:
                assert "\n" not in str(error)
        elif deed == "remove":
            points.remove(key)
        elif deed == "plant":
            points.plant()
            assert all(memory.read(planted.gpa, 1) == b"\xcc" for planted in points.software.values())
        else:
            points.lift()
        assert len(points.registers) <= (1 if emulated else 4)
        assert len(points.watched) <= 4
    points.clear()
    assert memory.read(0, SIZE) == content * (SIZE // 64)
    assert not points.registers and not points.watched and not points.software and points.dr7 == 0


def test_registers_run_out_with_a_reason(memory: GuestMemory) -> None:
    points = Breakpoints(memory, frozenset(), HARDWARE)
    for at in range(4):
        points.insert(Key(1, at, 1), real_mode())
    assert points.dr7 == 0xAA
    with pytest.raises(NotAvailable, match="not enough of the four"):
        points.insert(Key(2, 0, 4), real_mode())
    emulated = Breakpoints(memory, QUIRKS, EMULATED)
    emulated.insert(Key(1, 0, 1), real_mode())
    with pytest.raises(NotAvailable, match="the others make system calls work"):
        emulated.insert(Key(1, 1, 1), real_mode())
    with pytest.raises(NotAvailable, match="only changes can be watched"):
        emulated.insert(Key(4, 0, 4), real_mode())


def test_an_address_where_nothing_is_takes_a_register(memory: GuestMemory) -> None:
    points = Breakpoints(memory, QUIRKS, EMULATED)
    points.insert(Key(0, SIZE + 4, 1), real_mode())
    assert points.registers[0].address == SIZE + 4 and not points.software
    with pytest.raises(NotAvailable, match="nothing is mapped there now"):
        points.insert(Key(0, SIZE + 8, 1), real_mode())


def test_a_watchpoints_bits_are_the_cpus(memory: GuestMemory) -> None:
    points = Breakpoints(memory, frozenset(), HARDWARE)
    points.insert(Key(2, 0x10, 4), real_mode())
    points.insert(Key(4, 0x1001, 3), real_mode())  # as 1 and 2 bytes
    assert points.dr7 == (0b1101 << 16 | 2) | (0b0011 << 20 | 8) | (0b0111 << 24 | 0x20)
    assert [points.registers[n].address for n in range(3)] == [0x10, 0x1001, 0x1002]


def test_a_host_that_reports_none_says_so(memory: GuestMemory) -> None:
    points = Breakpoints(memory, frozenset(), STEPS_ONLY)
    for kind in (0, 1):
        with pytest.raises(NotAvailable, match="does not report breakpoints"):
            points.insert(Key(kind, 0, 1), real_mode())
    points.insert(Key(2, 0, 4), real_mode())
    assert points.watched, "a watchpoint is stepped there"
