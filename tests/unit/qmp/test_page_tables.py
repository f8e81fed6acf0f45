"""``info tlb`` and ``info mem`` against the walker that the fallback uses, and on tables that lead in circles."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.paging import walk
from pyvmm.host.probe_layout import CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME
from pyvmm.kvm.state import Sregs
from pyvmm.memory.guest_memory import GuestMemory, Region
from pyvmm.qmp.human.page_tables import LINES_MAX, memory_lines, tlb_lines
from tests.unit.gdb.test_session import real_mode

SIZE = 1 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    region = Region(0, SIZE, "tables")
    yield GuestMemory([region])
    region.close()


def paged(kind: str) -> Sregs:
    sregs = real_mode()
    sregs.cr0 = CR0_PE | CR0_PG
    sregs.cr3 = 0x1000
    sregs.cr4 = {"legacy": 1 << 4, "pae": CR4_PAE, "long": CR4_PAE}[kind]
    sregs.efer = EFER_LME | EFER_LMA if kind == "long" else 0
    return sregs


# (level, index of the entry there, which of 3 tables below or frame, low bits); small indices so that paths meet.
ENTRY = st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 255, 256, 511]), st.integers(0, 2),
                  st.sampled_from([1, 3, 5, 7, 0, 0x83, 0x87]))  # fmt: skip


@settings(max_examples=120)
@given(kind=st.sampled_from(["legacy", "pae", "long"]), entries=st.lists(ENTRY, max_size=14))
def test_every_line_is_what_the_cpu_would_find(
    memory: GuestMemory, kind: str, entries: list[tuple[int, int, int, int]]
) -> None:
    memory.zero(0, SIZE)
    size, levels = (4, 2) if kind == "legacy" else (8, 3 if kind == "pae" else 4)
    for drawn, slot, which, flags in entries:
        level = drawn % levels
        pointer = kind == "pae" and level == 0  # one of four, and its rights are reserved bits
        index, bits = (slot % 4, flags & 1) if pointer else (slot, flags)
        large = bool(bits & 0x80) and level < levels - 1
        if large and kind == "long" and level == 0:
            continue
        target = 0 if large or level == levels - 1 else 0x1000 + (level + 1) * 0x4000 + which * 0x1000
        table = 0x1000 + level * 0x4000 + (which * 0x1000 if level else 0)
        memory.write_uint(table + index * size, size, target | bits)
    sregs = paged(kind)
    lines = tlb_lines(memory, sregs)
    pages = [re.fullmatch(r"([0-9a-f]{16}): ([0-9a-f]{16}) [-XGPDACTUW]{9}", line) for line in lines]
    addresses = []
    for page in pages:
        assert page is not None, lines
        addresses.append(int(page[1], 16))
        assert walk(memory, sregs, addresses[-1]).gpa == int(page[2], 16)
    assert addresses == sorted(set(addresses))
    ranges = [(int(line[:16], 16), int(line[34:50], 16)) for line in memory_lines(memory, sregs)]
    for address in addresses:
        assert any(start <= address < start + length for start, length in ranges)


def test_tables_in_circles_end(memory: GuestMemory) -> None:
    memory.write(0x1000, (0x1000 | 7).to_bytes(8, "little") * 512)
    lines = tlb_lines(memory, paged("long"))
    assert len(lines) == LINES_MAX + 1 and lines[-1] == "(there is more; this is enough)"
    assert memory_lines(memory, paged("long"))[-1] == "(there is more; this is enough)"


def test_without_paging(memory: GuestMemory) -> None:
    assert tlb_lines(memory, real_mode()) == memory_lines(memory, real_mode()) == ["PG disabled"]
