"""What to do about the rare exits: everything that is not a port or memory access."""

from __future__ import annotations

import os
import threading
from collections import Counter
from typing import TYPE_CHECKING

from pyvmm.errors import UnknownInstructionError
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.machine.vcpu_thread import VcpuThread

T = trace_group("machine")

VECTOR_UD = 6


class ExitHandler:
    """Called in the vCPU's thread; ends the guest when it cannot go on."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.carried_out: Counter[str] = Counter()
        """How often the fallback carried out which instruction."""
        self._lock = threading.Lock()

    def handle(self, thread: VcpuThread, kind: int) -> None:
        """Deal with exit ``kind`` of ``thread``'s vCPU."""
        machine, exit_ = self._machine, thread.vcpu.exit
        if kind == lib.PV_EXIT_EMULATION and exit_.suberror == lib.KVM_INTERNAL_ERROR_EMULATION:
            self._emulation_failure(thread)
        elif kind == lib.PV_EXIT_SHUTDOWN:
            machine.crash(thread, "triple-fault", f"triple fault on vCPU {thread.vcpu.index}")
        elif kind == lib.PV_EXIT_MSR:
            # Nothing but the work-around filters MSRs, and it answers natively; the default answer is #GP.
            pass
        elif kind == lib.PV_EXIT_DIRTY_RING_FULL:
            machine.dirty.make_room(thread.vcpu)
        elif kind == lib.PV_EXIT_DEBUG and machine.debugger is not None:
            machine.debugger.debug_exit(thread)
        elif kind == lib.PV_EXIT_ERRNO:
            reason = f"KVM_RUN on vCPU {thread.vcpu.index}: {os.strerror(exit_.error)}"
            machine.crash(thread, "vcpu-error", reason)
        else:
            reason = f"vCPU {thread.vcpu.index}: KVM exit reason {exit_.reason}, suberror {exit_.suberror}"
            machine.crash(thread, "vcpu-error", reason)

    def _emulation_failure(self, thread: VcpuThread) -> None:
        machine, vcpu = self._machine, thread.vcpu
        debugger = machine.debugger
        if debugger is not None and debugger.breakpoint_met(thread):
            return
        code = bytes(ffi.buffer(vcpu.exit.insn))[: vcpu.exit.insn_size]
        T.emulation_failure.on and T.emulation_failure(vcpu.index, code.hex(" "))
        if "instruction-fallback" not in machine.quirks:
            machine.crash(thread, "unknown-instruction", "KVM cannot emulate an instruction (--quirks leaves it so)")
            return
        from pyvmm.arch.x86.fallback import emulate
        from pyvmm.arch.x86.fallback.kvm_context import KvmContext

        try:
            text = emulate(KvmContext(vcpu, machine.memory, exchange=machine.vm.compare_exchange))
        except UnknownInstructionError as error:
            if vcpu.get_sregs().ss.dpl == 3:
                # A program must not be able to end the machine; KVM itself would give it #UD, too.
                T.emulation_refused.on and T.emulation_refused(vcpu.index, error.text)
                events = vcpu.get_events()
                events.exception_injected, events.exception_nr = 1, VECTOR_UD
                events.exception_has_error_code = 0
                events.flags = 0  # nothing but the exception is meant
                vcpu.set_events(events)
                return
            machine.crash(thread, "unknown-instruction", str(error))
            return
        with self._lock:
            self.carried_out[text.partition(" ")[0]] += 1
        if debugger is not None:
            debugger.carried_out(thread)
