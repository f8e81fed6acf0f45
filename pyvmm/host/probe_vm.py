"""A VM of 2 MiB and one vCPU for micro guests: run a few bytes of code in a CPU mode and say how it ended.

::

    0x0000_0000  real-mode interrupt table
    0x0000_1000  GDT                      0x0000_1800  64-bit TSS
    0x0000_2000  IDT (32- or 64-bit gates, whichever the mode needs)
    0x0000_3000  one stub per vector: ``hlt`` at 0x3000 + 16 * vector; SYSCALL_STUB behind them
    0x0000_4000  PML4, PDPT, page directory, page table (4 KiB pages; 0x9000-0x4_0000 is open to CPL 3)
    0x0000_8000  CPL 0 code               0x0000_9000  CPL 3 code
    0x0000_a000  operands                 0x0000_b000  a second page of them
    0x0001_0000  CPL 0 stack (grows down) 0x0002_0000  CPL 3 stack (grows down)

Every piece of code is followed by ``hlt``. There is no in-kernel irqchip, so HLT at CPL 0 comes back as
KVM_EXIT_HLT; at CPL 3 it raises #GP, whose stub halts at CPL 0. Where RIP stands then says how it ended,
with no access left pending, so registers may be read.

Sources: Intel SDM volume 3, chapters 3 (descriptors), 4.5 (4-level paging), 6.10-6.14 (IDT), 8.7 (64-bit TSS);
AMD APM volume 2, section 6.1.1 (SYSCALL).
"""

from __future__ import annotations

import enum
import struct
import threading
import time
from dataclasses import dataclass
from typing import Self

from pyvmm.arch.x86 import layout
from pyvmm.errors import HostError, KvmError
from pyvmm.kvm.state import CpuidEntry, Dtable, Regs, Segment, Sregs, VcpuEvents
from pyvmm.kvm.system import System
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.memory.guest_memory import GuestMemory, Region
from pyvmm.native import lib

MEMORY_SIZE = 2 << 20
GDT, TSS, IDT, STUBS, PAGE_TABLES = 0x1000, 0x1800, 0x2000, 0x3000, 0x4000
SYSCALL_STUB = STUBS + 0xE00
CODE_CPL0, CODE_CPL3 = 0x8000, 0x9000
DATA, DATA_2 = 0xA000, 0xB000
STACK_CPL0, STACK_CPL3 = 0x10000, 0x20000
OPEN_TO_CPL3 = range(0x9000, 0x40000)
VECTORS = 0x81
USER_VECTOR = 0x80
"""The one gate that CPL 3 may call with INT."""
HLT = b"\xf4"

KERNEL_CS64, KERNEL_DS, KERNEL_CS32 = 0x08, 0x10, 0x18
USER_CS32, USER_DS, USER_CS64, TASK = 0x23, 0x2B, 0x33, 0x38
_GDT = (
    0,
    0x00AF9B000000FFFF,  # 0x08 CPL 0, 64-bit code
    0x00CF93000000FFFF,  # 0x10 CPL 0, data
    0x00CF9B000000FFFF,  # 0x18 CPL 0, 32-bit code
    0x00CFFB000000FFFF,  # 0x20 CPL 3, 32-bit code     SYSRET wants these three in this order
    0x00CFF3000000FFFF,  # 0x28 CPL 3, data
    0x00AFFB000000FFFF,  # 0x30 CPL 3, 64-bit code
    0x67 | TSS << 16 | 0x8B << 40,  # 0x38 busy 64-bit TSS; its upper half is zero
    0,
)

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_FSGSBASE, CR4_OSXSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 16, 1 << 18
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
MSR_STAR, MSR_LSTAR, MSR_FMASK = 0xC0000081, 0xC0000082, 0xC0000084
RFLAGS_ONE = 1 << 1
FMASK = 0x47700
"""As Linux sets it: TF, IF, DF, IOPL, NT and AC are cleared by SYSCALL."""


class Mode(enum.Enum):
    """CPU mode and privilege a micro guest runs in."""

    REAL16 = "real16"
    PROT32 = "prot32"
    LONG64 = "long64"
    USER32 = "user32"
    """CPL 3, compatibility mode of a 64-bit kernel."""
    USER64 = "user64"

    @property
    def cpl(self) -> int:
        """Privilege level: 0 or 3."""
        return 3 if self in (Mode.USER32, Mode.USER64) else 0


class End(enum.Enum):
    """How a micro guest ended."""

    DONE = "done"
    """Reached the HLT behind its last byte."""
    EXCEPTION = "exception"
    SYSCALL = "syscall"
    """Arrived at LSTAR at CPL 0."""
    EMULATION_FAILURE = "emulation-failure"
    """KVM's instruction emulator gave up (KVM_EXIT_INTERNAL_ERROR)."""
    SHUTDOWN = "shutdown"
    DEADLINE = "deadline"
    KVM_ERROR = "kvm-error"
    OTHER = "other"


@dataclass(frozen=True)
class Ending:
    """How a micro guest ended, and with what."""

    end: End
    regs: Regs
    cpu_seconds: float
    """CPU time of this thread inside KVM_RUN (host kernel and guest together)."""
    vector: int = -1
    error_code: int = 0
    """Only for vectors that have one."""
    frame_rip: int = 0
    frame_cs: int = 0
    cr2: int = 0
    detail: str = ""

    @property
    def text(self) -> str:
        """One phrase for notes and reports."""
        if self.end is End.EXCEPTION:
            return f"exception {self.vector} at {self.frame_rip:#x}"
        return f"{self.end.value} {self.detail}".rstrip()


_HAS_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})


class ProbeVm:
    """Owns VM, vCPU and memory. After an ending that may leave the vCPU odd, the next run gets a fresh VM.

    ``cpuid`` is what the guest's CPUID answers (default: all that KVM supports). KvmError or HostError when the
    host cannot even make the VM.
    """

    def __init__(
        self, system: System, *, cpuid: list[CpuidEntry] | None = None, private: bool = False, deadline: float = 0.5
    ) -> None:
        self._system = system
        self._cpuid = system.supported_cpuid() if cpuid is None else cpuid
        self._private = private
        self._deadline = deadline
        self._opened: tuple[Vm, Vcpu, Region] | None = None
        features = {(e.function, e.index): e for e in self._cpuid}
        leaf_1, leaf_7 = features.get((1, 0)), features.get((7, 0))
        self._cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
        self._xsave = leaf_1 is not None and bool(leaf_1.ecx >> 26 & 1)
        if self._xsave:
            self._cr4 |= CR4_OSXSAVE
        if leaf_7 is not None and leaf_7.ebx & 1:
            self._cr4 |= CR4_FSGSBASE
        if lib.pv_install_kick_signal() < 0:
            raise HostError("cannot install the signal that stops a vCPU")
        self._reopen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give vCPU, VM and memory back, in this order; harmless when repeated."""
        if self._opened:
            vm, vcpu, region = self._opened
            self._opened = None
            vcpu.close()
            vm.close()
            region.close()

    def _reopen(self) -> tuple[Vm, Vcpu, Region]:
        self.close()
        region = Region(0, MEMORY_SIZE, "probe", private=self._private)
        try:
            vm = self._system.create_vm()
            try:
                vm.set_identity_map_addr(layout.IDENTITY_MAP)
                vm.set_tss_addr(layout.TSS)
                if self._system.check_extension("KVM_CAP_EXIT_ON_EMULATION_FAILURE"):
                    vm.enable_cap("KVM_CAP_EXIT_ON_EMULATION_FAILURE", 1)
                vm.set_memory_region(0, 0, MEMORY_SIZE, region.hva)
                vm.add_native_region(0, MEMORY_SIZE, region.hva)
                vcpu = vm.create_vcpu(0)
                try:
                    vcpu.set_cpuid(self._cpuid)
                    if self._xsave:
                        vcpu.set_xcrs({0: 0x3})
                    vcpu.set_msrs(
                        {
                            MSR_STAR: (USER_CS32 << 16 | KERNEL_CS64) << 32,
                            MSR_LSTAR: SYSCALL_STUB,
                            MSR_FMASK: FMASK,
                        }
                    )
                    self._reset_sregs = vcpu.get_sregs()
                    self._opened = (vm, vcpu, region)
                    self._write_tables()
                    return self._opened
                except BaseException:
                    self._opened = None
                    vcpu.close()
                    raise
            except BaseException:
                vm.close()
                raise
        except BaseException:
            region.close()
            raise

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory, for operands."""
        return GuestMemory([self._parts()[2]])

    @property
    def region(self) -> Region:
        """The one region behind :attr:`memory`."""
        return self._parts()[2]

    @property
    def vcpu(self) -> Vcpu:
        """The vCPU, for state probes between runs."""
        return self._parts()[1]

    @property
    def vm(self) -> Vm:
        """The VM."""
        return self._parts()[0]

    def _parts(self) -> tuple[Vm, Vcpu, Region]:
        return self._opened or self._reopen()

    # -- tables ---------------------------------------------------------------------------------

    def _write_tables(self) -> None:
        memory = self.memory
        memory.write(0, b"".join(struct.pack("<HH", STUBS + 16 * v, 0) for v in range(VECTORS)))
        memory.write(GDT, struct.pack(f"<{len(_GDT)}Q", *_GDT))
        memory.write(TSS, struct.pack("<IQ", 0, STACK_CPL0).ljust(0x68, b"\0"))  # RSP0 at offset 4
        for vector in range(VECTORS):
            memory.write(STUBS + 16 * vector, HLT)
        memory.write(SYSCALL_STUB, HLT)
        present, user = 0x63, 0x04  # present, writable, accessed, dirty
        for level in range(3):
            table = PAGE_TABLES + level * 0x1000
            memory.write_uint(table, 8, table + 0x1000 | present | user)
        pages = [at | present | (user if at in OPEN_TO_CPL3 else 0) for at in range(0, MEMORY_SIZE, 0x1000)]
        memory.write(PAGE_TABLES + 0x3000, struct.pack(f"<{len(pages)}Q", *pages))

    def _write_idt(self, mode: Mode) -> None:
        gates = bytearray()
        for vector in range(VECTORS):
            stub = STUBS + 16 * vector
            access = 0xEE00 if vector == USER_VECTOR else 0x8E00
            if mode is Mode.PROT32:
                gates += struct.pack("<HHHH", stub, KERNEL_CS32, access, 0)
            else:
                gates += struct.pack("<HHHHQ", stub, KERNEL_CS64, access, 0, 0)
        self.memory.write(IDT, gates)

    def _sregs(self, mode: Mode) -> Sregs:
        sregs = self._reset_sregs
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer = CR0_ET | CR0_NE | CR0_MP, 0, 0, 0, 0
        sregs.cr4 = self._cr4 & ~CR4_PAE
        sregs.gdt = Dtable(base=GDT, limit=8 * len(_GDT) - 1)
        sregs.ldt = Segment(limit=0, type=2, unusable=1)
        if mode is Mode.REAL16:
            sregs.cs = Segment(type=0xB, s=1, present=1)
            data = Segment(type=0x3, s=1, present=1)
            sregs.idt = Dtable(base=0, limit=4 * VECTORS - 1)
            sregs.tr = Segment(limit=0xFFFF, type=0xB, present=1)
        else:
            sregs.cr0 |= CR0_PE
            long = mode is not Mode.PROT32
            sregs.idt = Dtable(base=IDT, limit=(16 if long else 8) * VECTORS - 1)
            sregs.tr = _segment(TASK)
            if long:
                sregs.cr0 |= CR0_PG | CR0_WP
                sregs.cr4, sregs.cr3 = self._cr4, PAGE_TABLES
                # NXE as every kernel has it: only then does a page fault's error code tell a fetch from a read.
                sregs.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
            code = {Mode.PROT32: KERNEL_CS32, Mode.LONG64: KERNEL_CS64, Mode.USER32: USER_CS32}.get(mode, USER_CS64)
            sregs.cs = _segment(code)
            data = _segment(USER_DS if mode.cpl else KERNEL_DS)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        return sregs

    # -- running --------------------------------------------------------------------------------

    def load(self, mode: Mode, code: bytes) -> int:
        """Put ``code`` and a HLT where code of that privilege lives; the address of the HLT."""
        at = CODE_CPL3 if mode.cpl else CODE_CPL0
        if len(code) >= 0x1000:
            raise ValueError("a micro guest is less than a page")
        self.memory.write(at, code + HLT)
        return at + len(code)

    def run(self, mode: Mode, code: bytes, regs: Regs | None = None) -> Ending:
        """Run ``code`` in ``mode`` from clean special registers until it ends or the deadline passes.

        ``regs`` gives the general registers; RIP, RSP and RFLAGS are set here. Reads of ports answer zero.
        """
        _, vcpu, _ = self._parts()
        final = self.load(mode, code)
        self._write_idt(mode)
        regs = regs or Regs()
        regs.rip = CODE_CPL3 if mode.cpl else CODE_CPL0
        regs.rsp = STACK_CPL3 if mode.cpl else STACK_CPL0
        if mode is Mode.REAL16:
            regs.rsp = 0xFFF0
        regs.rflags = RFLAGS_ONE
        vcpu.set_sregs(self._sregs(mode))
        vcpu.set_regs(regs)
        vcpu.set_events(VcpuEvents())
        kind, cpu_seconds = self._run_until_end(vcpu)
        ending = self._ending(mode, vcpu, kind, cpu_seconds, final)
        if ending.end not in (End.DONE, End.EXCEPTION, End.SYSCALL, End.EMULATION_FAILURE):
            self.close()
        return ending

    def _run_until_end(self, vcpu: Vcpu) -> tuple[int, float]:
        late = threading.Event()

        def stop() -> None:
            late.set()
            vcpu.kick()

        timer = threading.Timer(self._deadline, stop)
        timer.daemon = True
        timer.start()
        try:
            start = time.thread_time()
            while True:
                kind = vcpu.run()
                if kind in (lib.PV_EXIT_IO, lib.PV_EXIT_MMIO):
                    vcpu.exit.data = 0
                elif kind != lib.PV_EXIT_KICKED or late.is_set():  # any signal ends KVM_RUN, not only the deadline's
                    return kind, time.thread_time() - start
        finally:
            timer.cancel()
            timer.join()
            lib.pv_vcpu_cancel_kick(vcpu.native)

    def _ending(self, mode: Mode, vcpu: Vcpu, kind: int, cpu_seconds: float, final: int) -> Ending:
        regs = vcpu.get_regs()
        if kind == lib.PV_EXIT_KICKED:
            return Ending(End.DEADLINE, regs, cpu_seconds, detail=f"at {regs.rip:#x}")
        if kind == lib.PV_EXIT_EMULATION:
            code = bytes(vcpu.exit.insn[0 : vcpu.exit.insn_size])
            return Ending(End.EMULATION_FAILURE, regs, cpu_seconds, detail=code.hex(" "))
        if kind == lib.PV_EXIT_SHUTDOWN:
            return Ending(End.SHUTDOWN, regs, cpu_seconds)
        if kind == lib.PV_EXIT_ERRNO:
            return Ending(End.KVM_ERROR, regs, cpu_seconds, detail=f"errno {vcpu.exit.error}")
        if kind != lib.PV_EXIT_HLT:
            return Ending(End.OTHER, regs, cpu_seconds, detail=f"exit reason {vcpu.exit.reason}")
        halted_at = regs.rip - 1
        if halted_at == final:
            return Ending(End.DONE, regs, cpu_seconds)
        if halted_at == SYSCALL_STUB:
            return Ending(End.SYSCALL, regs, cpu_seconds)
        vector, rest = divmod(halted_at - STUBS, 16)
        if rest or not 0 <= vector < VECTORS:
            return Ending(End.OTHER, regs, cpu_seconds, detail=f"halted at {halted_at:#x}")
        return self._exception(mode, vcpu, regs, cpu_seconds, vector, final)

    def _exception(self, mode: Mode, vcpu: Vcpu, regs: Regs, cpu_seconds: float, vector: int, final: int) -> Ending:
        word = {Mode.REAL16: 2, Mode.PROT32: 4}.get(mode, 8)
        at, error_code = regs.rsp, 0
        if vector in _HAS_ERROR_CODE and mode is not Mode.REAL16:
            error_code = self.memory.read_uint(at, word)
            at += word
        rip, cs = self.memory.read_uint(at, word), self.memory.read_uint(at + word, word)
        if mode.cpl and vector == 13 and rip == final:
            return Ending(End.DONE, regs, cpu_seconds, frame_rip=rip, frame_cs=cs)
        return Ending(
            End.EXCEPTION,
            regs,
            cpu_seconds,
            vector=vector,
            error_code=error_code,
            frame_rip=rip,
            frame_cs=cs,
            cr2=vcpu.get_sregs().cr2,
        )

    # -- statistics -----------------------------------------------------------------------------

    def statistics(self) -> dict[str, int]:
        """The vCPU's counters by name, as far as they are single numbers; empty when KVM has no such file.

        Source: Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD.
        """
        if not self._system.check_extension("KVM_CAP_BINARY_STATS_FD"):
            return {}
        import os

        try:
            fd = self.vcpu.ioctl("KVM_GET_STATS_FD")
        except KvmError:
            return {}
        try:
            _, name_size, count, _, descriptors, data = struct.unpack("<6I", os.pread(fd, 24, 0))
            if name_size > 256 or count > 4096:
                return {}
            size = 16 + name_size
            raw = os.pread(fd, size * count, descriptors)
            result = {}
            for i in range(count):
                _, _, values, offset, _ = struct.unpack_from("<IhHII", raw, i * size)
                if values != 1:
                    continue
                name = raw[i * size + 16 : (i + 1) * size].split(b"\0")[0].decode("ascii", "replace")
                (result[name],) = struct.unpack("<Q", os.pread(fd, 8, data + offset))
            return result
        finally:
            os.close(fd)


def _segment(selector: int) -> Segment:
    """The hidden part the CPU would load for ``selector`` of :data:`_GDT`."""
    entry = _GDT[selector >> 3]
    limit = entry & 0xFFFF | entry >> 32 & 0xF0000
    granular = entry >> 55 & 1
    return Segment(
        base=entry >> 16 & 0xFFFFFF,
        limit=limit << 12 | 0xFFF if granular else limit,
        selector=selector,
        type=entry >> 40 & 0xF,
        s=entry >> 44 & 1,
        dpl=entry >> 45 & 3,
        present=1,
        l=entry >> 53 & 1,
        db=entry >> 54 & 1,
        g=granular,
    )
