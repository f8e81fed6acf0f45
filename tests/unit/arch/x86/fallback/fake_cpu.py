"""A CPU without KVM for the instruction fallback: flat memory of a few mapped ranges, registers in Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyvmm.arch.x86.control_registers import (
    CR0_AM,
    CR0_ET,
    CR0_MP,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_FSGSBASE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
)
from pyvmm.arch.x86.fallback import CpuContext, Privilege, emulate
from pyvmm.arch.x86.faults import PF_FETCH, PF_PRESENT, PF_USER, PF_WRITE, PageFault
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.state import Dtable, Regs, Segment, Sregs

CODE = 0x1000_0000
DATA = 0x2000_0000
DATA_SIZE = 0x4000
PAGE = 0x1000

def sregs(bits: int = 64, cpl: int = 3) -> Sregs:
    """Special registers as Linux has them in user space, in the given code size; flat segments."""
    code = Segment(limit=0xFFFFFFFF, selector=0x10 | cpl, type=0xB, present=1, dpl=cpl, s=1, g=1)
    code.l, code.db = int(bits == 64), int(bits == 32)
    data = Segment(limit=0xFFFFFFFF, selector=0x18 | cpl, type=3, present=1, dpl=cpl, s=1, g=1, db=int(bits != 16))
    return Sregs(
        cs=code,
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(type=0xB, present=1, selector=0x40, limit=0x67),
        ldt=Segment(unusable=1, limit=0),
        gdt=Dtable(limit=0),
        idt=Dtable(limit=0),
        cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG,
        cr2=0,
        cr3=0x1000,
        cr4=CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE,
        cr8=0,
        efer=EFER_LMA | EFER_LME if bits == 64 else 0,
        apic_base=0xFEE00900,
    )


def no_cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """A CPU with x87, SSE and AVX state only."""
    if leaf == 0xD:
        return {0: (7, 832, 832, 0), 2: (256, 576, 0, 0)}.get(subleaf, (0, 0, 0, 0))
    return 0, 0, 0, 0


@dataclass
class Mapping:
    base: int
    data: bytearray
    writable: bool = True
    ram: bool = True


class FakeCpu(CpuContext):
    """Implements every method without KVM and remembers what was injected."""

    def __init__(self, code: bytes, *, bits: int = 64, cpl: int = 3, rip: int = CODE, data: bytes = b"") -> None:
        self.regs = Regs(rip=rip)
        self.sregs = sregs(bits, cpl)
        self.mappings = [Mapping(CODE, bytearray(PAGE), writable=False), Mapping(DATA, bytearray(DATA_SIZE))]
        self.mappings[0].data[rip - CODE : rip - CODE + len(code)] = code
        self.mappings[1].data[: len(data)] = data
        self.xsave = bytes(4096)
        self.xcr0 = 7
        self.msrs: dict[int, int] = {}
        self.injected: list[tuple[int, int | None]] = []
        self.flushes = 0
        self.done: list[bool] = []
        self.cpuid_source: Callable[[int, int], tuple[int, int, int, int]] = no_cpuid

    @property
    def data(self) -> bytearray:
        return self.mappings[1].data

    def run(self) -> str:
        """One instruction; its text."""
        return emulate(self)

    def _find(self, gva: int, error: int, write: bool) -> Mapping:
        for mapping in self.mappings:
            if mapping.base <= gva < mapping.base + len(mapping.data):
                if write and not mapping.writable:
                    raise PageFault(gva, error | PF_PRESENT)
                if not mapping.ram:
                    raise GuestMemoryError(gva, 1)
                return mapping
        raise PageFault(gva, error)

    def _bytes(self, gva: int, size: int, error: int, write: bool) -> list[tuple[Mapping, int]]:
        places = []
        for at in range(gva, gva + size):
            mapping = self._find(at, error, write)
            places.append((mapping, at - mapping.base))
        return places

    def read(self, gva: int, size: int, privilege: Privilege) -> bytes:
        error = PF_USER if privilege is Privilege.USER else 0
        return bytes(mapping.data[at] for mapping, at in self._bytes(gva, size, error, False))

    def fetch(self, gva: int, size: int) -> bytes:
        self._find(gva, PF_USER | PF_FETCH, False)
        mapping = self._find(gva, 0, False)
        return bytes(mapping.data[gva - mapping.base : gva - mapping.base + size])

    def check_write(self, gva: int, size: int, privilege: Privilege) -> None:
        self._bytes(gva, size, PF_WRITE | (PF_USER if privilege is Privilege.USER else 0), True)

    def write(self, gva: int, data: bytes, privilege: Privilege) -> None:
        self.check_write(gva, len(data), privilege)
        for (mapping, at), byte in zip(self._bytes(gva, len(data), 0, True), data, strict=True):
            mapping.data[at] = byte

    def compare_exchange(self, gva: int, old: bytes, new: bytes, privilege: Privilege) -> bytes:
        self.check_write(gva, len(old), privilege)
        found = self.read(gva, len(old), privilege)
        if found == old:
            self.write(gva, new, privilege)
        return found

    def get_xsave(self) -> bytes:
        return self.xsave

    def set_xsave(self, state: bytes) -> None:
        self.xsave = state

    def get_xcr0(self) -> int:
        return self.xcr0

    def set_xcr0(self, value: int) -> None:
        self.xcr0 = value

    def get_msr(self, index: int) -> int:
        return self.msrs.get(index, 0)

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self.cpuid_source(leaf, subleaf)

    def inject(self, vector: int, error_code: int | None) -> None:
        self.injected.append((vector, error_code))

    def instruction_done(self, *, single_stepped: bool) -> None:
        self.done.append(single_stepped)

    def flush_tlb(self) -> None:
        self.flushes += 1
