"""The page-table walker over real tables in guest memory, in every paging mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.control_registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)
from pyvmm.arch.x86.faults import PF_FETCH, PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE, PageFault
from pyvmm.arch.x86.paging import (
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_LARGE,
    PTE_NX,
    PTE_PRESENT,
    PTE_USER,
    PTE_WRITE,
    Access,
    Translation,
    walk,
)
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.state import Sregs
from pyvmm.memory.guest_memory import GuestMemory, Region
from tests.unit.arch.x86.fallback.fake_cpu import sregs as user_sregs

ROOT = 0x10000
RW = PTE_PRESENT | PTE_WRITE
ALL = RW | PTE_USER
READ, WRITE, FETCH = Access(), Access(write=True), Access(fetch=True)
USER_READ, USER_WRITE, USER_FETCH = Access(user=True), Access(user=True, write=True), Access(user=True, fetch=True)
MODES = {"4-level": (4, 8), "5-level": (5, 8), "pae": (3, 8), "32-bit": (2, 4)}


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    opened = GuestMemory([Region(0, 1 << 20)])
    yield opened
    opened.close()


@dataclass
class Tables:
    """Builds tables from the top; remembers where each entry of a path lies."""

    memory: GuestMemory
    mode: str
    next_table: int = ROOT + 0x1000
    path: list[int] = field(default_factory=list)

    @property
    def sregs(self) -> Sregs:
        found = user_sregs()
        found.cr0, found.cr3, found.cr4, found.efer = CR0_PE | CR0_PG | CR0_WP, ROOT, 0, 0
        if self.mode in ("4-level", "5-level"):
            found.cr4, found.efer = CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE
            found.cr4 |= CR4_LA57 if self.mode == "5-level" else 0
        elif self.mode == "pae":
            found.cr4, found.efer = CR4_PAE, EFER_NXE
        else:
            found.cr4 = CR4_PSE
        return found

    def map(self, address: int, target: int, bits: list[int], *, leaf_level: int = 1) -> None:
        """Map ``address``; ``bits`` are the flags of each level's entry from the top down."""
        levels, size = MODES[self.mode]
        index_bits = 9 if size == 8 else 10
        table = ROOT
        self.path = []
        for level in range(levels, leaf_level - 1, -1):
            shift = 12 + index_bits * (level - 1)
            at = table + (address >> shift & (1 << index_bits) - 1) * size
            self.path.append(at)
            flags = bits[levels - level]
            if level == leaf_level:
                self.memory.write_uint(at, size, target | flags | (PTE_LARGE if level > 1 else 0))
                return
            old = self.memory.read_uint(at, size)
            if old & PTE_PRESENT:
                table = old & 0xFFFFF000
            else:
                table, self.next_table = self.next_table, self.next_table + 0x1000
            self.memory.write_uint(at, size, table | flags)

    def flags(self, *leaf: int) -> list[int]:
        """Full rights on the way, ``leaf`` on the last level. PAE's PDPTEs have none to give."""
        levels = MODES[self.mode][0]
        return [PTE_PRESENT if self.mode == "pae" and i == 0 else ALL for i in range(levels - 1)] + list(leaf)

    def try_(self, address: int, access: Access, **changes: int) -> int | Translation:
        """The error code of the fault, or the translation."""
        sregs = self.sregs
        for name, value in changes.items():
            setattr(sregs, name, getattr(sregs, name) | value)
        try:
            return walk(self.memory, sregs, address, access)
        except PageFault as fault:
            assert fault.address == address and fault.error_code is not None
            return fault.error_code


@pytest.fixture(params=MODES)
def tables(request: pytest.FixtureRequest, memory: GuestMemory) -> Tables:
    return Tables(memory, request.param)


def test_without_paging_addresses_are_physical(memory: GuestMemory) -> None:
    sregs = user_sregs()
    sregs.cr0 = CR0_PE
    assert walk(memory, sregs, 0x1_2345_6789, USER_WRITE) == Translation(0x23456789, 4096, True, True, True)


def test_small_page(tables: Tables) -> None:
    tables.map(0x40123000, 0x55000, tables.flags(ALL))
    assert tables.try_(0x40123ABC, USER_WRITE) == Translation(0x55ABC, 4096, True, True, True)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(mode=st.sampled_from(list(MODES)), address=st.integers(0, (1 << 48) - 1), target=st.integers(0, (1 << 20) - 1))
def test_any_address(mode: str, address: int, target: int) -> None:
    memory = GuestMemory([Region(0, 1 << 20)])
    try:
        tables = Tables(memory, mode)
        address &= (1 << 32) - 1 if mode in ("pae", "32-bit") else (1 << 48) - 1
        tables.map(address, target << 12, tables.flags(ALL))
        found = tables.try_(address, USER_WRITE)
        assert isinstance(found, Translation) and found.gpa == target << 12 | address & 0xFFF
        neighbour = address ^ 1 << 12
        assert tables.try_(neighbour, USER_WRITE) == PF_WRITE | PF_USER
        # Whatever the address's other bits are, another top-level entry maps nothing.
        assert not isinstance(tables.try_(address ^ 1 << 31, USER_READ), Translation)
    finally:
        memory.close()


def test_large_pages(tables: Tables) -> None:
    size = 1 << (22 if tables.mode == "32-bit" else 21)
    tables.map(0x40000000, 3 * size, [*tables.flags(ALL)[:-2], ALL], leaf_level=2)
    assert tables.try_(0x40000000 + size - 1, READ) == Translation(4 * size - 1, size, True, True, True)


@pytest.mark.parametrize("mode", ["4-level", "5-level"])
def test_huge_pages(memory: GuestMemory, mode: str) -> None:
    tables = Tables(memory, mode)
    tables.map(0x40000000, 7 << 30, [*tables.flags(ALL)[:-3], ALL], leaf_level=3)
    assert tables.try_(0x40000123, READ) == Translation((7 << 30) + 0x123, 1 << 30, True, True, True)


def test_pse_36(memory: GuestMemory) -> None:
    tables = Tables(memory, "32-bit")
    tables.map(0x400000, 0x00C00000 | 0x5 << 13, [ALL], leaf_level=2)
    found = tables.try_(0x400010, READ)
    assert isinstance(found, Translation) and found.gpa == 0x5_00C0_0010


def test_without_pse_the_large_bit_means_nothing(memory: GuestMemory) -> None:
    tables = Tables(memory, "32-bit")
    tables.map(0x400000, 0x55000, [ALL | PTE_LARGE, ALL])
    sregs = tables.sregs
    sregs.cr4 = 0
    assert walk(memory, sregs, 0x400010).gpa == 0x55010


def test_absent_at_every_level(tables: Tables) -> None:
    tables.map(0x40123000, 0x55000, tables.flags(ALL))
    size = MODES[tables.mode][1]
    for at in tables.path:
        entry = tables.memory.read_uint(at, size)
        tables.memory.write_uint(at, size, entry & ~PTE_PRESENT)
        assert tables.try_(0x40123000, USER_WRITE) == PF_WRITE | PF_USER
        assert tables.try_(0x40123000, READ) == 0
        tables.memory.write_uint(at, size, entry)
    assert isinstance(tables.try_(0x40123000, READ), Translation)


def test_rights_are_those_of_every_level(tables: Tables) -> None:
    levels = MODES[tables.mode][0]
    for level in range(1 if tables.mode == "pae" else 0, levels):
        for missing, access, error in (
            (PTE_WRITE, USER_WRITE, PF_PRESENT | PF_WRITE | PF_USER),
            (PTE_WRITE, WRITE, PF_PRESENT | PF_WRITE),
            (PTE_USER, USER_READ, PF_PRESENT | PF_USER),
        ):
            flags = tables.flags(ALL)
            flags[level] &= ~missing
            tables.map(0x40123000, 0x55000, flags)
            assert tables.try_(0x40123000, access) == error
            assert isinstance(tables.try_(0x40123000, READ), Translation)


def test_write_protect_can_be_off_for_supervisors(tables: Tables) -> None:
    tables.map(0x40123000, 0x55000, tables.flags(PTE_PRESENT | PTE_USER))
    sregs = tables.sregs
    sregs.cr0 &= ~CR0_WP
    assert walk(tables.memory, sregs, 0x40123000, WRITE).writable is False
    with pytest.raises(PageFault):
        walk(tables.memory, sregs, 0x40123000, USER_WRITE)


@pytest.mark.parametrize("mode", ["4-level", "5-level", "pae"])
def test_no_execute(memory: GuestMemory, mode: str) -> None:
    tables = Tables(memory, mode)
    tables.map(0x40123000, 0x55000, tables.flags(ALL | PTE_NX))
    assert tables.try_(0x40123000, USER_FETCH) == PF_PRESENT | PF_USER | PF_FETCH
    assert tables.try_(0x40123000, FETCH) == PF_PRESENT | PF_FETCH
    found = tables.try_(0x40123000, USER_READ)
    assert isinstance(found, Translation) and not found.executable
    sregs = tables.sregs
    sregs.efer &= ~EFER_NXE  # then bit 63 is reserved, and fetches are not told apart
    with pytest.raises(PageFault) as caught:
        walk(memory, sregs, 0x40123000, FETCH)
    assert caught.value.error_code == PF_PRESENT | PF_RESERVED


def test_smep_and_smap(tables: Tables) -> None:
    tables.map(0x40123000, 0x55000, tables.flags(ALL))
    assert isinstance(tables.try_(0x40123000, FETCH), Translation)
    assert tables.try_(0x40123000, FETCH, cr4=CR4_SMEP) == PF_PRESENT | PF_FETCH
    assert isinstance(tables.try_(0x40123000, USER_FETCH, cr4=CR4_SMEP), Translation)
    assert tables.try_(0x40123000, READ, cr4=CR4_SMAP) == PF_PRESENT
    assert tables.try_(0x40123000, WRITE, cr4=CR4_SMAP) == PF_PRESENT | PF_WRITE
    assert isinstance(tables.try_(0x40123000, Access(smap_override=True), cr4=CR4_SMAP), Translation)
    assert isinstance(tables.try_(0x40123000, USER_READ, cr4=CR4_SMAP), Translation)


def test_fetch_bit_needs_nx_or_smep(memory: GuestMemory) -> None:
    tables = Tables(memory, "32-bit")
    assert tables.try_(0x5000, FETCH) == 0
    assert tables.try_(0x5000, FETCH, cr4=CR4_SMEP) == PF_FETCH


@pytest.mark.parametrize(
    ("mode", "leaf_level", "bits"),
    [
        ("4-level", 4, 0),  # no 512 GiB pages
        ("5-level", 5, 0),
        ("4-level", 3, 1 << 13),
        ("4-level", 2, 1 << 20),
        ("pae", 2, 1 << 13),
        ("pae", 1, 1 << 52),
        ("pae", 1, 1 << 62),
        ("32-bit", 2, 1 << 21),
    ],
)
def test_reserved_bits(memory: GuestMemory, mode: str, leaf_level: int, bits: int) -> None:
    tables = Tables(memory, mode)
    levels = MODES[mode][0]
    tables.map(0x40000000, bits, [*tables.flags(ALL)[: levels - leaf_level], ALL], leaf_level=leaf_level)
    assert tables.try_(0x40000000, WRITE) == PF_PRESENT | PF_RESERVED | PF_WRITE


def test_reserved_bits_of_a_pae_pdpte(memory: GuestMemory) -> None:
    tables = Tables(memory, "pae")
    tables.map(0x40000000, 0x55000, [PTE_PRESENT | PTE_WRITE, ALL, ALL])
    assert tables.try_(0x40000000, READ) == PF_PRESENT | PF_RESERVED


def test_address_bits_beyond_the_guest_are_reserved(memory: GuestMemory) -> None:
    tables = Tables(memory, "4-level")
    tables.map(0x40000000, 1 << 40, tables.flags(ALL))
    assert walk(memory, tables.sregs, 0x40000000, physical_bits=41).gpa == 1 << 40
    with pytest.raises(PageFault) as caught:
        walk(memory, tables.sregs, 0x40000000, physical_bits=40)
    assert caught.value.error_code == PF_PRESENT | PF_RESERVED


def test_high_bits_that_long_mode_ignores(memory: GuestMemory) -> None:
    tables = Tables(memory, "4-level")
    tables.map(0x40000000, 0x55000 | 0x7FF << 52, tables.flags(ALL))
    assert isinstance(tables.try_(0x40000000, USER_READ), Translation)


def test_accessed_and_dirty_only_when_asked(tables: Tables) -> None:
    size = MODES[tables.mode][1]
    tables.map(0x40123000, 0x55000, tables.flags(ALL))
    skipped = 1 if tables.mode == "pae" else 0  # PDPTEs have no such flags

    def marks() -> list[int]:
        return [tables.memory.read_uint(at, size) & (PTE_ACCESSED | PTE_DIRTY) for at in tables.path[skipped:]]

    walk(tables.memory, tables.sregs, 0x40123000, WRITE)
    assert not any(marks())
    walk(tables.memory, tables.sregs, 0x40123000, READ, update=True)
    assert marks() == [PTE_ACCESSED] * len(marks())
    walk(tables.memory, tables.sregs, 0x40123000, WRITE, update=True)
    assert marks() == [PTE_ACCESSED] * (len(marks()) - 1) + [PTE_ACCESSED | PTE_DIRTY]


def test_a_fault_sets_no_flags(tables: Tables) -> None:
    size = MODES[tables.mode][1]
    tables.map(0x40123000, 0x55000, tables.flags(PTE_PRESENT))
    before = [tables.memory.read_uint(at, size) for at in tables.path]
    with pytest.raises(PageFault):
        walk(tables.memory, tables.sregs, 0x40123000, USER_READ, update=True)
    assert [tables.memory.read_uint(at, size) for at in tables.path] == before


def test_tables_outside_memory(tables: Tables) -> None:
    sregs = tables.sregs
    sregs.cr3 = 0x4000_0000
    with pytest.raises(GuestMemoryError):
        walk(tables.memory, sregs, 0x1000)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mode=st.sampled_from(list(MODES)),
    content=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=8),
    address=st.integers(0, (1 << 64) - 1),
    user=st.booleans(),
    write=st.booleans(),
)
def test_hostile_tables_only_fault(mode: str, content: list[int], address: int, user: bool, write: bool) -> None:
    memory = GuestMemory([Region(0, 1 << 20)])
    try:
        tables = Tables(memory, mode)
        pattern = b"".join(word.to_bytes(8, "little") for word in content)
        memory.write(ROOT, (pattern * 512)[:4096])
        try:
            found = walk(memory, tables.sregs, address, Access(user=user, write=write), update=True)
        except PageFault as fault:
            assert fault.error_code is not None and bool(fault.error_code & PF_USER) is user
        except GuestMemoryError:
            pass
        else:
            assert (found.user or not user) and (found.writable or not write)
    finally:
        memory.close()
