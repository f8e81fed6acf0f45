"""``--step``: every instruction of the boot vCPU, one after the other, by the debugger's own means.

Where the CPU runs CPL 0, an interrupt or exception turns stepping off until its handler has returned (RFLAGS.TF is
saved and cleared, SDM volume 3, 17.3.1.4): handlers are then seen only where KVM emulates CPL 0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import FlowControl, Mnemonic

from pyvmm.arch.x86.control_registers import FLAG_TF, code_bits
from pyvmm.errors import PyvmmError
from pyvmm.explain.instructions import Found
from pyvmm.explain.interrupts import taken
from pyvmm.explain.watch import tell_work_around
from pyvmm.gdb.breakpoints import Key
from pyvmm.gdb.debugger import Debugger, Motion
from pyvmm.gdb.linear_memory import read_memory, write_memory
from pyvmm.gdb.stops import Exited, Stop
from pyvmm.kvm.state import Regs

if TYPE_CHECKING:
    from pyvmm.explain.narrator import Narrator
    from pyvmm.machine.machine import Machine
    from pyvmm.machine.vcpu_thread import VcpuThread


_PUSHES_FLAGS = (Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ)


class _Debugger(Debugger):
    """Also tells of what the instruction fallback does."""

    narrator: Narrator

    def carried_out(self, thread: VcpuThread) -> None:
        tell_work_around(self.narrator, thread)
        super().carried_out(thread)


class Stepper:
    """In the machine's loop. After ``limit`` instructions it lets go, and the guest runs; ``done`` is called then."""

    def __init__(self, machine: Machine, narrator: Narrator, limit: int, done: Callable[[str], None]) -> None:
        self._machine = machine
        self._narrator = narrator
        self._left = limit
        self._limit = limit
        self._done = done
        self._debugger = _Debugger(machine, self._stopped)
        self._debugger.narrator = narrator
        self._debugger.block_interrupts = False  # here they are what one wants to see
        self._next: Found | None = None
        self._regs = Regs()
        self._planted: Key | None = None

    def begin(self) -> None:
        """The machine has started, and stands still."""
        self._debugger.attach()
        self._look()
        self._go()

    def _go(self) -> None:
        motions = {vcpu.index: Motion.RUN for vcpu in self._machine.vcpus}
        way_down = self._way_down() if self._debugger.breakpoints.traps_to_guest else None
        if way_down is not None:
            # Here a step does not survive the way to a CPL 3 that runs natively: a breakpoint waits at its end.
            self._planted = Key(0, way_down, 1)
            self._debugger.insert(self._planted, 0)
            self._debugger.go(motions)
        else:
            self._debugger.go(motions | {0: Motion.STEP})

    def _way_down(self) -> int | None:
        """Where in CPL 3 the next instruction leads, if it does."""
        mnemonic = self._next.instruction.mnemonic if self._next is not None else None
        if mnemonic in (Mnemonic.SYSRETQ, Mnemonic.SYSRET):
            return self._regs.rcx
        if mnemonic == Mnemonic.IRETQ:
            frame = read_memory(self._machine.memory, self._machine.vcpus[0].get_sregs(), self._regs.rsp, 16)
            rip, cs = struct.unpack("<2Q", frame) if len(frame) == 16 else (0, 0)
            return rip if cs & 3 == 3 else None
        return None

    def _look(self) -> None:
        vcpu = self._machine.vcpus[0]
        self._regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        self._narrator.looked(vcpu, self._regs, sregs, interrupts=False)
        self._narrator.current = self._next = self._narrator.reader.next(self._regs, sregs)

    def _stopped(self, stop: Stop | Exited) -> None:
        if isinstance(stop, Exited):
            return
        if self._planted is not None:
            self._debugger.remove(self._planted)
            self._planted = None
        vcpu, done, before = self._machine.vcpus[0], self._next, self._regs
        if done is not None:
            self._take_our_flag_out(done)
            regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
            vector = taken(self._narrator.reader, before, regs, sregs, self._natural(done, regs))
            self._narrator.stepped(vcpu, done, before, regs, sregs, vector)
        self._look()
        self._left -= 1
        if not self._left:
            self._narrator.current = None
            self._debugger.detach()
            self._done(f"{self._limit} instructions were stepped through: from here on the guest runs")
            return
        try:
            self._go()
        except PyvmmError as error:
            self._narrator.current = None
            self._debugger.detach()
            self._done(str(error))

    def _take_our_flag_out(self, done: Found) -> None:
        """Where the CPU itself steps, an instruction that saves RFLAGS saves the TF that steps it; the guest would be
        trapped by it when nobody steps any more.
        """
        vcpu, memory, mnemonic = self._machine.vcpus[0], self._machine.memory, done.instruction.mnemonic
        if self._regs.rflags & FLAG_TF or mnemonic not in (Mnemonic.SYSCALL, *_PUSHES_FLAGS):
            return
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        if mnemonic == Mnemonic.SYSCALL:
            if regs.r11 & FLAG_TF:
                regs.r11 &= ~FLAG_TF
                vcpu.set_regs(regs)
            return
        at = (sregs.ss.base + regs.rsp + 1) & ((1 << 64) - 1 if code_bits(sregs) == 64 else 0xFFFFFFFF)
        high = read_memory(memory, sregs, at, 1)
        if high and high[0] & FLAG_TF >> 8:
            write_memory(memory, sregs, at, bytes((high[0] & ~(FLAG_TF >> 8),)))

    def _natural(self, done: Found, regs: Regs) -> int:
        """Where RIP is if nothing was taken: what it is now, if the instruction may lead there."""
        instruction = done.instruction
        if instruction.flow_control == FlowControl.NEXT:
            return int(instruction.next_ip)
        if regs.rip in (instruction.next_ip, instruction.near_branch_target):
            return regs.rip
        return -1
