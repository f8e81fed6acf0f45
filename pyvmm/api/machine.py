"""A VM with memory and one vCPU and nothing else: whoever uses it is its devices.

>>> import pyvmm
>>> code = bytes.fromhex("b0 48 e6 e9 b0 69 e6 e9 f4")  # mov al,'H'; out 0xe9,al; mov al,'i'; out 0xe9,al; hlt
>>> with pyvmm.Machine() as vm:
...     vm.load(code)
...     for exit in vm.steps():
...         print(exit)
PortWrite(port=233, size=1, data=b'H')
PortWrite(port=233, size=1, data=b'i')
Halt()

A device answers what it is asked:

>>> with pyvmm.Machine() as vm:
...     vm.load(bytes.fromhex("e4 60 04 02 e6 61 f4"))  # in al,0x60; add al,2; out 0x61,al; hlt
...     for exit in vm.steps():
...         if isinstance(exit, pyvmm.PortRead):
...             exit.answer(40)
...         elif isinstance(exit, pyvmm.PortWrite):
...             print(f"the guest says {exit.value}")
the guest says 42

Registers and memory are there between steps, in 64-bit mode, too, and a moment can be kept:

>>> with pyvmm.Machine(mode="long64") as vm:
...     vm.load(bytes.fromhex("48 ff c0 f4 48 ff c0 f4"))  # inc rax; hlt; inc rax; hlt
...     vm.set_regs(rax=(1 << 40) - 1)
...     first = vm.step()
...     here = vm.save()
...     second = vm.step()
...     late = vm.regs.rax
...     vm.restore(here)
...     hex(vm.regs.rax), hex(late)
('0x10000000000', '0x10000000001')

For a machine with devices, images and Linux there is ``pyvmm run``; the fixture ``vm`` (README, "Test suites") has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pyvmm.api.exits import (
    EmulationFailure,
    Exit,
    Halt,
    MmioRead,
    MmioWrite,
    PortRead,
    PortWrite,
    Shutdown,
    Step,
)
from pyvmm.arch.x86 import layout
from pyvmm.errors import ConfigError, DeadlineError, HostError
from pyvmm.host import probe_layout
from pyvmm.host.probe_layout import CODE_CPL0, RFLAGS_ONE, STACK_CPL0, Mode, special_registers, write_idt, write_tables
from pyvmm.kvm.run_deadline import kicked_after
from pyvmm.kvm.state import DebugRegs, Regs, Sregs, VcpuEvents
from pyvmm.kvm.system import System
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.native import ffi, lib

MEMORY_MAX = 1 << 30
DEADLINE = 10.0
_DEBUG_ENABLE, _DEBUG_SINGLESTEP = 1, 2  # KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP (api.rst, 4.87)
_HLT = b"\xf4"
ModeName = Literal["real16", "prot32", "long64"]


class Moment(NamedTuple):
    """What :meth:`Machine.save` keeps: all that a vCPU without a local APIC has, but its MSRs; and memory."""

    regs: Regs
    sregs: Sregs
    xsave: bytes
    debugregs: DebugRegs
    events: VcpuEvents
    memory: bytes


class Machine:
    """``memory``: bytes, a whole number of pages, at GPA 0; ``deadline``: seconds that one step may take.

    ``mode`` is how the vCPU begins: ``real16`` as after a reset but at :meth:`load`'s address; ``prot32`` and
    ``long64`` at CPL 0 with tables of their own in the first 32 KiB (host/probe_layout.py draws them), flat and, in
    64-bit mode, the first 2 MiB mapped. A context manager. ConfigError; HostError: no usable KVM.
    """

    def __init__(self, memory: int = 2 << 20, *, mode: ModeName = "real16", deadline: float = DEADLINE) -> None:
        if memory % PAGE_SIZE or not probe_layout.MEMORY_SIZE <= memory <= MEMORY_MAX:
            least = probe_layout.MEMORY_SIZE >> 20
            raise ConfigError(f"memory={memory}: {least} MiB to {MEMORY_MAX >> 20} MiB, in pages of {PAGE_SIZE} bytes")
        if mode not in ("real16", "prot32", "long64"):
            raise ConfigError(f"mode={mode!r}: there is real16, prot32 and long64")
        if lib.pv_install_kick_signal() < 0:
            raise HostError("cannot install the signal that stops a vCPU")
        self._deadline, self._over = deadline, False
        self._pending: PortRead | MmioRead | None = None
        self._opened: list[Any] = []
        try:
            self._system: System = self._own(System())
            self._region: Region = self._own(Region(0, memory, "ram"))
            self.memory = GuestMemory([self._region])
            self._vm: Vm = self._own(self._system.create_vm())
            self._vm.set_identity_map_addr(layout.IDENTITY_MAP)
            self._vm.set_tss_addr(layout.TSS)
            if self._system.check_extension("KVM_CAP_EXIT_ON_EMULATION_FAILURE"):
                self._vm.enable_cap("KVM_CAP_EXIT_ON_EMULATION_FAILURE", 1)
            self._vm.set_memory_region(0, 0, memory, self._region.hva)
            self._vm.add_native_region(0, memory, self._region.hva)
            self._vcpu: Vcpu = self._own(self._vm.create_vcpu(0))
            self._vcpu.set_cpuid(self._system.supported_cpuid())
            self._begin(Mode(mode))
        except BaseException:
            self.close()
            raise

    def _own(self, one: Any) -> Any:
        self._opened.append(one)
        return one

    def _begin(self, mode: Mode) -> None:
        write_tables(self.memory)
        write_idt(self.memory, mode)
        cr4 = probe_layout.CR4_OSFXSR | probe_layout.CR4_OSXMMEXCPT
        self._vcpu.set_sregs(special_registers(mode, self._vcpu.get_sregs(), cr4))
        stack = 0xFFF0 if mode is Mode.REAL16 else STACK_CPL0
        self._vcpu.set_regs(Regs(rip=CODE_CPL0, rsp=stack, rflags=RFLAGS_ONE))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back; harmless twice."""
        self._over = True
        while self._opened:
            self._opened.pop().close()

    # -- between steps --------------------------------------------------------------------------

    def load(self, code: bytes | str | Path, at: int = CODE_CPL0) -> None:
        """Put ``code``, or what is in the file of that name, at GPA ``at``, and go on there."""
        if not isinstance(code, bytes):
            code = Path(code).read_bytes()
        if not self.memory.contains(at, max(len(code), 1)):
            raise ConfigError(f"{len(code)} bytes at {at:#x} are not in the machine's {self.memory.size:#x} bytes")
        self.memory.write(at, code)
        self.set_regs(rip=at)

    @property
    def regs(self) -> Regs:
        """The general registers, as they are now."""
        return self._vcpu.get_regs()

    def set_regs(self, **changes: int) -> None:
        """Change some: ``vm.set_regs(rax=1, rip=0x8000)``. ConfigError: there is none of that name, or 64 bits."""
        found = self._vcpu.get_regs()
        for name, value in changes.items():
            if name not in Regs.__struct_fields__ or not 0 <= value < 1 << 64:
                raise ConfigError(f"{name}={value:#x}: registers are {', '.join(Regs.__struct_fields__)}, of 64 bits")
            setattr(found, name, value)
        self._vcpu.set_regs(found)

    @property
    def sregs(self) -> Sregs:
        """Segments, descriptor tables and control registers; assign to change them. KvmError: KVM refuses it."""
        return self._vcpu.get_sregs()

    @sregs.setter
    def sregs(self, wanted: Sregs) -> None:
        self._vcpu.set_sregs(wanted)

    def translate(self, gva: int) -> int | None:
        """GPA behind a guest-virtual address; ``None``: not mapped."""
        return self._vcpu.translate(gva)

    def save(self) -> Moment:
        """vCPU and memory as they are. An access that was answered is complete first."""
        self._complete()
        vcpu, memory = self._vcpu, self.memory
        return Moment(
            vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_xsave(), vcpu.get_debugregs(), vcpu.get_events(),
            memory.read(0, memory.size),
        )  # fmt: skip

    def restore(self, moment: Moment) -> None:
        """Go back to ``moment``, of this machine or of one as large; also from a triple fault."""
        if not self._opened or len(moment.memory) != self.memory.size:
            raise ConfigError("restore() is for an open machine with as much memory as was saved")
        self._complete()
        vcpu = self._vcpu
        self.memory.write(0, moment.memory)
        vcpu.set_sregs(moment.sregs)
        vcpu.set_xsave(moment.xsave)
        vcpu.set_debugregs(moment.debugregs)
        vcpu.set_regs(moment.regs)
        vcpu.set_events(moment.events)
        self._over = False

    # -- running --------------------------------------------------------------------------------

    def steps(self, *, single: bool = False, limit: int | None = None) -> Iterator[Exit]:
        """Every exit until the guest halts or is over, ``limit`` of them at most; with ``single`` every instruction.

        DeadlineError: it runs and does not come back.
        """
        while limit is None or limit > 0:
            exit = self.step(single=single)
            yield exit
            if isinstance(exit, Halt | Shutdown | EmulationFailure):
                return
            limit = None if limit is None else limit - 1

    def step(self, *, single: bool = False) -> Exit:
        """Run to the next exit, or only one instruction. DeadlineError; ConfigError: it is over; HostError."""
        if self._over:
            raise ConfigError("this machine is over: a triple fault, an instruction KVM does not know, or close()")
        self._answer()
        self._vcpu.set_guest_debug(_DEBUG_ENABLE | _DEBUG_SINGLESTEP if single else 0)
        halts = single and self._at_hlt()
        exit = self._exit(self._run())
        return Halt() if halts and isinstance(exit, Step) else exit  # some KVMs tell of the step alone

    def _at_hlt(self) -> bool:
        gpa = self.translate((self.sregs.cs.base + self.regs.rip) & (1 << 64) - 1)
        return gpa is not None and self.memory.contains(gpa) and self.memory.read(gpa, 1) == _HLT

    def run(self) -> bytes:
        """Run to ``hlt`` or the end; what it wrote to ports, all of them. Reads are answered with all ones."""
        return b"".join(exit.data for exit in self.steps() if isinstance(exit, PortWrite))

    def _run(self) -> int:
        vcpu = self._vcpu
        with kicked_after(vcpu, self._deadline) as late:
            while (kind := vcpu.run()) == lib.PV_EXIT_KICKED:
                if late.is_set():
                    at = vcpu.get_regs().rip
                    raise DeadlineError(f"the guest did not exit within {self._deadline:g} s; it is at {at:#x}")
            return kind

    def _exit(self, kind: int) -> Exit:
        raw = self._vcpu.exit
        if kind == lib.PV_EXIT_IO:
            if raw.is_write:
                data = bytes(ffi.buffer(raw.bytes, raw.size * raw.count)) if raw.count != 1 else (
                    int(raw.data).to_bytes(8, "little")[: raw.size])  # fmt: skip
                return PortWrite(raw.port, raw.size, data)
            self._pending = PortRead(raw.port, raw.size, raw.count, b"\xff" * (raw.size * raw.count))
            return self._pending
        if kind == lib.PV_EXIT_MMIO:
            if raw.is_write:
                return MmioWrite(raw.address, int(raw.data).to_bytes(8, "little")[: raw.size])
            self._pending = MmioRead(raw.address, raw.size, b"\xff" * raw.size)
            return self._pending
        if kind == lib.PV_EXIT_HLT:
            return Halt()
        if kind == lib.PV_EXIT_DEBUG:
            return Step(self._vcpu.get_regs().rip)
        self._over = True
        if kind == lib.PV_EXIT_SHUTDOWN:
            return Shutdown()
        if kind == lib.PV_EXIT_EMULATION:
            return EmulationFailure(bytes(ffi.buffer(raw.insn))[: raw.insn_size])
        raise HostError(f"KVM_RUN: exit reason {raw.reason}, errno {raw.error}; see pyvmm doctor")

    def _answer(self) -> None:
        asked, self._pending = self._pending, None
        if asked is None:
            return
        raw = self._vcpu.exit
        if len(asked.data) != asked.size * (asked.count if isinstance(asked, PortRead) else 1):
            raise ConfigError(f"{asked}: its data must have as many bytes as were asked for")
        if isinstance(asked, PortRead) and asked.count != 1:
            ffi.buffer(raw.bytes, len(asked.data))[:] = asked.data
        else:
            raw.data = int.from_bytes(asked.data, "little")

    def _complete(self) -> None:
        """KVM carries an access out when it is entered again (api.rst, KVM_EXIT_IO): enter, and come back at once."""
        self._answer()
        if not self._over:
            self._vcpu.kick()
            try:
                self._vcpu.run()
            finally:
                lib.pv_vcpu_cancel_kick(self._vcpu.native)
