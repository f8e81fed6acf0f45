"""A VM and one vCPU for micro guests: run a few bytes of code in a CPU mode and say how it ended.

Every piece of code is followed by ``hlt``. There is no in-kernel irqchip, so HLT at CPL 0 comes back as
KVM_EXIT_HLT; at CPL 3 it raises #GP, whose stub halts at CPL 0. Where RIP stands then says how it ended,
with no access left pending, so registers may be read. :mod:`pyvmm.host.probe_layout` has the memory map.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import Self

import msgspec

from pyvmm.arch.x86 import layout
from pyvmm.errors import HostError
from pyvmm.host.kvm_counters import KvmCounters
from pyvmm.host.probe_layout import (
    CODE_CPL0,
    CODE_CPL3,
    CR4_FSGSBASE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    FMASK,
    HLT,
    KERNEL_CS64,
    MEMORY_SIZE,
    MSR_FMASK,
    MSR_LSTAR,
    MSR_STAR,
    RFLAGS_ONE,
    STACK_CPL0,
    STACK_CPL3,
    STUBS,
    SYSCALL_STUB,
    USER_CS32,
    VECTORS,
    Mode,
    special_registers,
    write_idt,
    write_tables,
)
from pyvmm.kvm.run_deadline import kicked_after
from pyvmm.kvm.state import CpuidEntry, Regs, VcpuEvents
from pyvmm.kvm.system import System
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.memory.guest_memory import GuestMemory, Region
from pyvmm.native import lib


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
        self._cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT
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
                    write_tables(self.memory)
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
        final = self.load(mode, code)
        regs = regs or Regs()
        regs.rip = CODE_CPL3 if mode.cpl else CODE_CPL0
        regs.rsp = STACK_CPL3 if mode.cpl else STACK_CPL0
        if mode is Mode.REAL16:
            regs.rsp = 0xFFF0
        regs.rflags = RFLAGS_ONE
        return self.run_from(mode, regs, final)

    def enter(self, mode: Mode, regs: Regs, fs_base: int = 0, gs_base: int = 0) -> Vcpu:
        """The vCPU, with nothing pending, about to go on in ``mode`` with exactly ``regs``."""
        vcpu = self.vcpu
        write_idt(self.memory, mode)
        sregs = special_registers(mode, self._reset_sregs, self._cr4)
        if fs_base or gs_base:
            sregs.fs, sregs.gs = (msgspec.structs.replace(sregs.ds, base=base) for base in (fs_base, gs_base))
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)
        vcpu.set_events(VcpuEvents())
        return vcpu

    def run_from(self, mode: Mode, regs: Regs, final: int = -1, *, fs_base: int = 0, gs_base: int = 0) -> Ending:
        """Run what is in memory from ``regs.rip`` on; a HLT at ``final`` means that it is done."""
        vcpu = self.enter(mode, regs, fs_base, gs_base)
        kind, cpu_seconds = self._run_until_end(vcpu)
        ending = self._ending(mode, vcpu, kind, cpu_seconds, final)
        if ending.end not in (End.DONE, End.EXCEPTION, End.SYSCALL, End.EMULATION_FAILURE):
            self.close()
        return ending

    def _run_until_end(self, vcpu: Vcpu) -> tuple[int, float]:
        with kicked_after(vcpu, self._deadline) as late:
            start = time.thread_time()
            while True:
                kind = vcpu.run()
                if kind in (lib.PV_EXIT_IO, lib.PV_EXIT_MMIO):
                    vcpu.exit.data = 0
                elif kind != lib.PV_EXIT_KICKED or late.is_set():
                    return kind, time.thread_time() - start

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

    def statistics(self) -> dict[str, int]:
        """KVM's counters of the vCPU; empty where it has none."""
        if not self._system.check_extension("KVM_CAP_BINARY_STATS_FD"):
            return {}
        with KvmCounters(self.vcpu) as counters:
            return counters.read()
