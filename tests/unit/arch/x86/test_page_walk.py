"""The told walk ends where the CPU's (arch/x86/paging.py) does, whatever is in the tables."""

from __future__ import annotations

import contextlib
import re

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.arch.x86.control_registers import CR0_PG
from pyvmm.arch.x86.faults import PageFault
from pyvmm.arch.x86.page_walk import levels
from pyvmm.arch.x86.paging import PTE_PRESENT, Access, walk
from pyvmm.errors import GuestMemoryError
from pyvmm.memory.guest_memory import GuestMemory, Region
from tests.unit.arch.x86.test_paging import ALL, MODES, ROOT, Tables

ANY = Access(smap_override=True)


@given(mode=st.sampled_from(list(MODES)), address=st.integers(0, (1 << 47) - 1), target=st.integers(0, (1 << 20) - 1))
def test_mapped_addresses(mode: str, address: int, target: int) -> None:
    with contextlib.closing(GuestMemory([Region(0, 1 << 20)])) as memory:
        tables = Tables(memory, mode)
        if mode in ("pae", "32-bit"):
            address &= 0xFFFFFFFF
        tables.map(address, target << 12, tables.flags(ALL))
        way = list(levels(memory, tables.sregs, address))
        found = walk(memory, tables.sregs, address, ANY)
        assert way[-1].endswith(f"is physical {found.gpa:#x}")
        assert len(way) == MODES[mode][0] + 2
        assert [re.sub(r"\[.*", "", line) for line in way[1:-1]][-1] == "table"


@given(
    mode=st.sampled_from(list(MODES)),
    content=st.lists(st.integers(0, (1 << 64) - 1), min_size=16, max_size=16),
    address=st.integers(0, (1 << 48) - 1),
)
def test_hostile_tables_end_the_walk(mode: str, content: list[int], address: int) -> None:
    with contextlib.closing(GuestMemory([Region(0, 1 << 20)])) as memory:
        tables = Tables(memory, mode)
        for at, value in enumerate(content):
            # Half of them lead to tables that are there, the others anywhere.
            kept = value if at % 2 else value & 0xF7FFF | PTE_PRESENT
            memory.write_uint(ROOT + 8 * (address >> 12 + 9 * (at % 4) & 0x1FF), 8, kept)
        way = list(levels(memory, tables.sregs, address))
        assert 2 <= len(way) <= 7
        try:
            walk(memory, tables.sregs, address, ANY)
        except PageFault as fault:
            if not (fault.error_code or 0) & PTE_PRESENT:
                assert "not present" in way[-1]
        except GuestMemoryError:
            assert "not in memory" in way[-1]


def test_without_paging() -> None:
    with contextlib.closing(GuestMemory([Region(0, 1 << 20)])) as memory:
        sregs = Tables(memory, "pae").sregs
        sregs.cr0 &= ~CR0_PG
        assert list(levels(memory, sregs, 0x1234)) == ["paging is off: linear 0x1234 is physical 0x1234"]
