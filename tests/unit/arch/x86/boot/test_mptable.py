"""MP tables, read back as the specification's chapter 4 says a kernel reads them."""

from __future__ import annotations

import struct

import pytest

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.mptable import build_mp_table, write_mp_table
from pyvmm.errors import ConfigError
from pyvmm.memory.guest_memory import GuestMemory

ENTRY_SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries_of(table: bytes) -> list[bytes]:
    count = struct.unpack_from("<H", table, 34)[0]
    found, at = [], 44
    for _ in range(count):
        size = ENTRY_SIZES[table[at]]
        found.append(table[at : at + size])
        at += size
    assert at == len(table) == struct.unpack_from("<H", table, 4)[0]
    return found


@pytest.mark.parametrize("cpus", [1, 2, 7, 39])
def test_table(memory: GuestMemory, cpus: int) -> None:
    write_mp_table(memory, cpus)
    assert memory.read_uint(0x40E, 2) << 4 == layout.EBDA
    assert memory.read_uint(0x413, 2) == 639
    pointer = memory.read(layout.EBDA, 16)
    assert pointer[:4] == b"_MP_" and pointer[8:10] == b"\x01\x04" and sum(pointer) & 0xFF == 0
    at = struct.unpack_from("<I", pointer, 4)[0]
    length = memory.read_uint(at + 4, 2)
    assert at + length <= layout.EBDA_END
    table = memory.read(at, length)
    assert table[:4] == b"PCMP" and table[6] == 4 and sum(table) & 0xFF == 0
    assert struct.unpack_from("<I", table, 36)[0] == 0xFEE00000
    entries = entries_of(table)
    processors = [e for e in entries if e[0] == 0]
    assert [e[1] for e in processors] == list(range(cpus))
    assert [e[3] for e in processors] == [3] + [1] * (cpus - 1), "all enabled, the first is the boot processor"
    assert [e[2:] for e in entries if e[0] == 1] == [b"ISA   "]
    (ioapic,) = (e for e in entries if e[0] == 2)
    assert ioapic[1] == cpus and ioapic[3] == 1 and struct.unpack_from("<I", ioapic, 4)[0] == 0xFEC00000
    wiring = {e[5]: (e[1], e[6], e[7]) for e in entries if e[0] == 3}
    assert wiring == {irq: (0, cpus, irq or 2) for irq in range(16) if irq != 2}
    assert [(e[1], e[6], e[7]) for e in entries if e[0] == 4] == [(3, 0xFF, 0), (1, 0xFF, 1)]


def test_more_cpus_than_fit_are_refused_with_the_number_that_does(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="holds at most 40 CPUs"):
        write_mp_table(memory, 41)
    with pytest.raises(ConfigError, match="holds at most 40 CPUs"):
        write_mp_table(memory, 200)
    write_mp_table(memory, 40)


def test_entry_types_ascend() -> None:
    kinds = [e[0] for e in entries_of(build_mp_table(3))]
    assert kinds == sorted(kinds), "4.3: entries are sorted by type"
