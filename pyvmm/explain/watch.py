"""Where the narrator sits in a machine: buses that tell of every access, and the place where a debugger would be."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyvmm.devices.bus import PORT_SPACE, Bus
from pyvmm.explain.narrator import Narrator
from pyvmm.machine.statistics import machine_statistics
from pyvmm.native import ffi, lib

if TYPE_CHECKING:
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.machine.machine import Machine
    from pyvmm.machine.vcpu_thread import VcpuThread

Watcher = Callable[[Bus, bool, int, int, int], None]
"""(bus, whether it is a write, address, size, value)"""


class WatchedBus(Bus):
    """A bus whose every access is told of: a write before it is carried out (it may end the machine)."""

    watcher: Watcher | None = None

    def read(self, address: int, size: int) -> int:
        """As ever, and then tell."""
        value = super().read(address, size)
        if self.watcher is not None:
            self.watcher(self, False, address, size, value)
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """Tell, and then as ever."""
        if self.watcher is not None:
            self.watcher(self, True, address, size, value)
        super().write(address, size, value)


class Watch:
    """The narrator's hook (machine/debug_hook.py) and the buses' watcher. ``machine`` was built with WatchedBus."""

    def __init__(self, machine: Machine, narrator: Narrator) -> None:
        self._machine = machine
        self._narrator = narrator
        for bus in (machine.ports, machine.mmio):
            assert isinstance(bus, WatchedBus)
            bus.watcher = self._accessed

    def install(self) -> None:
        """Be told of the rare exits, too."""
        self._machine.debugger = self

    def _accessed(self, bus: Bus, write: bool, address: int, size: int, value: int) -> None:
        vcpu = self._vcpu()
        if vcpu is not None:
            self._narrator.accessed(vcpu, bus, bus.size_limit == PORT_SPACE, write, address, size, value)

    def _vcpu(self) -> Vcpu | None:
        own = threading.get_native_id()
        return next((thread.vcpu for thread in self._machine.threads if thread.thread_id == own), None)

    # -- DebugHook ------------------------------------------------------------------------------

    def about_to_run(self) -> None:
        """Nothing to do."""

    def debug_exit(self, thread: VcpuThread) -> None:
        """Nobody asked for any."""

    def breakpoint_met(self, thread: VcpuThread) -> bool:
        """There are none."""
        return False

    def carried_out(self, thread: VcpuThread) -> None:
        """The fallback did an instruction in KVM's stead."""
        tell_work_around(self._narrator, thread)


def unseen(machine: Machine) -> Counter[str]:
    """What no exit shows, by KVM's counters and the native loop's: interrupts, and work-arounds without Python."""
    found: Counter[str] = Counter()
    for file, native in zip(machine.counters, machine_statistics(machine)["cpus"], strict=True):
        counters = file.read()
        found["interrupt, of KVM's controllers"] += counters.get("irq_injections", 0)
        found["halt, until an interrupt (no exit to pyvmm)"] += counters.get("halt_exits", 0)
        found["work-around: SYSCALL"] += native["syscalls_completed"]
        found["work-around: INT n"] += native["interrupts_completed"]
        found["work-around: #UD of a hypercall"] += native["hypercalls_answered"]
    return found


def tell_work_around(narrator: Narrator, thread: VcpuThread) -> None:
    """The fallback has done the instruction that ``thread``'s last exit holds."""
    exit_ = thread.vcpu.exit
    if exit_.reason == lib.KVM_EXIT_INTERNAL_ERROR:  # and not the end of a step
        code = bytes(ffi.buffer(exit_.insn))[: exit_.insn_size]
        narrator.worked_around(thread.vcpu, narrator.reader.text(code, thread.vcpu.get_sregs()))
