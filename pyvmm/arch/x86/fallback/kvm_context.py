"""The instruction fallback's CPU, backed by a stopped KVM vCPU and the guest's memory.

Used in the vCPU's own thread right after KVM_EXIT_INTERNAL_ERROR (emulation): no access is pending then, and
RIP is at the instruction. Everything is written through at once; :func:`~pyvmm.arch.x86.fallback.emulate`
calls the setters only when nothing can fault any more.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import msgspec

from pyvmm.arch.x86.control_registers import CR4_PGE, FLAG_AC, code_bits, privilege_level
from pyvmm.arch.x86.fallback.context import CpuContext, Privilege
from pyvmm.arch.x86.faults import PageFault
from pyvmm.arch.x86.paging import Access, walk
from pyvmm.errors import HostError
from pyvmm.kvm.state import Regs, Sregs
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.memory.guest_memory import GuestMemory

_PAGE = 4096
_VALID_SHADOW = 1 << 2  # KVM_VCPUEVENT_VALID_SHADOW: set_events means the interrupt shadow, too
_DR6_BS = 1 << 14
_VECTOR_DB = 1
_XCR0 = 0
_LEAF_ADDRESS_SIZES = 0x8000_0008

CompareExchange = Callable[[int, bytes, bytes], bytes]
"""(GPA, old, new) to what was there; atomic against everything the guest does."""

_exchange_lock = threading.Lock()

Cpuid = dict[tuple[int, int], tuple[int, int, int, int]]
_cpuid_of: weakref.WeakKeyDictionary[Vcpu, Cpuid] = weakref.WeakKeyDictionary()
"""A vCPU's CPUID table is set before its first run and fixed from then on, so it is read once per vCPU."""


class KvmContext(CpuContext):
    """One vCPU for one call of ``emulate``.

    ``exchange`` makes CMPXCHG8B/16B atomic. Without it they are atomic against each other (one lock for the
    process), but not against a plain store or another locked instruction of a vCPU that runs meanwhile: such
    a store between our load and our store is lost.
    """

    def __init__(self, vcpu: Vcpu, memory: GuestMemory, *, exchange: CompareExchange | None = None) -> None:
        self._vcpu = vcpu
        self._memory = memory
        self._exchange = exchange
        self._regs = vcpu.get_regs()
        self._sregs = vcpu.get_sregs()
        self._xsave: bytes | None = None

    # -- registers ------------------------------------------------------------------------------

    @property
    def regs(self) -> Regs:
        """General registers."""
        return self._regs

    @regs.setter
    def regs(self, regs: Regs) -> None:
        self._vcpu.set_regs(regs)
        self._regs = regs

    @property
    def sregs(self) -> Sregs:
        """Segments and control registers; set only if they changed, since that is dear on some hosts."""
        return self._sregs

    @sregs.setter
    def sregs(self, sregs: Sregs) -> None:
        if sregs is not self._sregs and sregs != self._sregs:
            self._vcpu.set_sregs(sregs)
        self._sregs = sregs

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE, once."""
        if self._xsave is None:
            self._xsave = self._vcpu.get_xsave()
        return self._xsave

    def set_xsave(self, state: bytes) -> None:
        """KVM_SET_XSAVE."""
        self._vcpu.set_xsave(state)
        self._xsave = state

    def get_xcr0(self) -> int:
        """XCR0."""
        return self._vcpu.get_xcrs()[_XCR0]

    def set_xcr0(self, value: int) -> None:
        """KVM_SET_XCRS, read back: a host may accept a value and ignore it."""
        self._vcpu.set_xcrs({_XCR0: value})
        if self.get_xcr0() != value:
            raise HostError(f"this host's KVM ignores XCR0 = {value:#x}; vector registers cannot be kept apart on it")

    def get_msr(self, index: int) -> int:
        """KVM_GET_MSRS of one register."""
        return self._vcpu.get_msrs([index])[index]

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """From the vCPU's CPUID table; zeros for what it does not have."""
        table = _cpuid_of.get(self._vcpu)
        if table is None:
            table = {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in self._vcpu.get_cpuid()}
            _cpuid_of[self._vcpu] = table
        return table.get((leaf, subleaf), (0, 0, 0, 0))

    # -- memory ---------------------------------------------------------------------------------

    def _access(self, privilege: Privilege, *, write: bool = False, fetch: bool = False) -> Access:
        override = privilege is Privilege.SUPERVISOR and bool(self._regs.rflags & FLAG_AC)
        return Access(write=write, user=privilege is Privilege.USER, fetch=fetch, smap_override=override)

    def _pieces(self, gva: int, size: int, access: Access) -> list[tuple[int, int]]:
        """(GPA, length) of each page touched. All are translated before the caller touches the first."""
        pieces = []
        bits = self.cpuid(_LEAF_ADDRESS_SIZES, 0)[0] & 0xFF or 52
        wrap = (1 << 64) - 1 if code_bits(self._sregs) == 64 else (1 << 32) - 1
        while size:
            length = min(size, _PAGE - gva % _PAGE)
            found = walk(self._memory, self._sregs, gva & wrap, access, physical_bits=bits, update=True)
            pieces.append((found.gpa, length))
            gva += length
            size -= length
        return pieces

    def read(self, gva: int, size: int, privilege: Privilege) -> bytes:
        """Through the guest's page tables, accessed flags set."""
        return b"".join(self._memory.read(gpa, n) for gpa, n in self._pieces(gva, size, self._access(privilege)))

    def fetch(self, gva: int, size: int) -> bytes:
        """Code bytes; those on an unmapped second page are left out."""
        user = privilege_level(self._sregs, self._regs.rflags) == 3
        access = self._access(Privilege.USER if user else Privilege.SUPERVISOR, fetch=True)
        first = min(size, _PAGE - gva % _PAGE)
        code = b"".join(self._memory.read(gpa, n) for gpa, n in self._pieces(gva, first, access))
        try:
            rest = self._pieces(gva + first, size - first, access)
        except PageFault:
            return code
        # A second page that is no RAM ends the bytes, too: whether they are needed is the decoder's to say.
        return code + b"".join(self._memory.read(gpa, n) for gpa, n in rest if self._memory.contains(gpa, n))

    def check_write(self, gva: int, size: int, privilege: Privilege) -> None:
        """All pages are mapped, writable with this privilege, and RAM."""
        for gpa, length in self._pieces(gva, size, self._access(privilege, write=True)):
            self._memory.read(gpa, length)

    def write(self, gva: int, data: bytes, privilege: Privilege) -> None:
        """Through the guest's page tables, dirty flags set."""
        done = 0
        for gpa, length in self._pieces(gva, len(data), self._access(privilege, write=True)):
            self._memory.write(gpa, data[done : done + length])
            done += length

    def compare_exchange(self, gva: int, old: bytes, new: bytes, privilege: Privilege) -> bytes:
        """See the class about atomicity. A misaligned operand (CMPXCHG8B only) never is atomic."""
        pieces = self._pieces(gva, len(old), self._access(privilege, write=True))
        if self._exchange is not None and pieces[0][0] % len(old) == 0:
            return self._exchange(pieces[0][0], old, new)
        with _exchange_lock:
            found = self.read(gva, len(old), privilege)
            if found == old:
                self.write(gva, new, privilege)
        return found

    # -- events ---------------------------------------------------------------------------------

    def inject(self, vector: int, error_code: int | None) -> None:
        """Queue the exception as already injected, so KVM delivers it on the next entry."""
        events = self._vcpu.get_events()
        events.exception_injected, events.exception_nr = 1, vector
        events.exception_has_error_code = int(error_code is not None)
        events.exception_error_code = error_code or 0
        events.flags = 0  # nothing optional is meant
        self._vcpu.set_events(events)

    def instruction_done(self, *, single_stepped: bool) -> None:
        """End the shadow of STI or MOV SS; after a single step queue #DB."""
        events = self._vcpu.get_events()
        if events.interrupt_shadow:
            events.interrupt_shadow, events.flags = 0, _VALID_SHADOW
            self._vcpu.set_events(events)
        if single_stepped:
            debug = self._vcpu.get_debugregs()
            self._vcpu.set_debugregs(msgspec.structs.replace(debug, dr6=debug.dr6 | _DR6_BS))
            self.inject(_VECTOR_DB, None)

    def flush_tlb(self) -> None:
        """KVM flushes when CR4.PGE changes, as the CPU does (SDM volume 3, section 4.10.4.1)."""
        self._vcpu.set_sregs(msgspec.structs.replace(self._sregs, cr4=self._sregs.cr4 ^ CR4_PGE))
        self._vcpu.set_sregs(self._sregs)
