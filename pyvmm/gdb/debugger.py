"""The machine's side of the debugger: stopping, going on, stepping, and what a vCPU's debug exits mean.

Everything public runs in the machine's loop, but for the hook's three methods, which vCPU threads call. A vCPU that
stops asks for it as it would ask for a reset: until the loop has seen to it no vCPU executes another instruction.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING

from pyvmm.errors import DeadlineError, KvmError, PyvmmError, StateError
from pyvmm.gdb.breakpoints import Breakpoints, Key
from pyvmm.gdb.guest_traps import VECTOR_BP, VECTOR_DB, read_frame, take_back
from pyvmm.gdb.registers import linear_pc
from pyvmm.gdb.stops import SIGABRT, SIGINT, Exited, Stop
from pyvmm.host.debug_facilities import debug_facilities
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.ending import Ending
from pyvmm.machine.observer import MachineObserver
from pyvmm.machine.run_state import RunState
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.machine.vcpu_thread import VcpuThread

T = trace_group("gdb")

AGAIN = 0.2
"""Seconds until it is tried again to stop a vCPU that a device kept."""
_DR6_HITS, _DR6_STEP = 15, 1 << 14


class Motion(Enum):
    """What a vCPU is to do."""

    RUN = "run"
    STEP = "step"
    HOLD = "hold"


class Debugger(MachineObserver):
    """One debugger's hold on a machine, from :meth:`attach` to :meth:`detach`. ``tell`` gets what it waits for."""

    def __init__(self, machine: Machine, tell: Callable[[Stop | Exited], None]) -> None:
        self._machine = machine
        self._tell = tell
        self.breakpoints = Breakpoints(machine.memory, machine.quirks, debug_facilities())
        self.attached = False
        self.running = False
        """Whether the debugger believes the guest to run: it then waits for a stop."""
        self.block_interrupts = bool(
            machine.vm.check_extension("KVM_CAP_SET_GUEST_DEBUG2") & lib.KVM_GUESTDBG_BLOCKIRQ
        )
        """While stepping; else each step of a guest with a timer would lead into its interrupt handler."""
        self.last_stop = Stop(0)
        self._motions: dict[int, Motion] = {}
        self._stops: list[Stop] = []
        self._lock = threading.Lock()
        self._own_doing = False

    # -- coming and going -----------------------------------------------------------------------

    def attach(self) -> None:
        """Stop the guest. StateError: it is not here, or another debugger is."""
        if self._machine.debugger is not None:
            raise StateError("another debugger is attached")
        self._machine.debugger = self
        self._machine.observers.add(self)
        self.attached = True
        try:
            self._pause()
        except PyvmmError:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every trace of the debugger out, and let the guest go on. Harmless when repeated."""
        if not self.attached:
            return
        self.attached = self.running = False
        self._let_go()

    def _let_go(self) -> None:
        machine = self._machine
        machine.parking.held = frozenset()
        try:
            with machine.standing_still():
                self.breakpoints.clear()
                for vcpu in machine.vcpus:
                    _set_debug(vcpu, ffi.new("struct pv_guest_debug *"))
                machine.debugger = None
        except DeadlineError:  # a device keeps a vCPU; until it lets go of it, an INT3 must find its debugger
            machine.loop.call_later(AGAIN, self._let_go)
            return
        self._motions = {}
        machine.observers.remove(self)
        if machine.ending is None and machine.run_state in (RunState.PAUSED, RunState.PRELAUNCH):
            machine.resume()

    # -- running --------------------------------------------------------------------------------

    def go(self, motions: Mapping[int, Motion]) -> None:
        """Let vCPUs move; those not in ``motions`` are held. StateError: the guest cannot run now."""
        machine = self._machine
        if machine.ending is not None:
            raise StateError("the guest has ended; only a reset brings it back")
        if machine.run_state not in (RunState.PAUSED, RunState.PRELAUNCH, RunState.RUNNING):
            raise StateError(f"the machine is {machine.run_state.value}: the guest cannot go on now")
        self._pause()
        with self._lock:
            stop = next((stop for stop in self._stops if stop.lasting), None)
            self._stops = []
        if stop is not None:
            self._told(stop)
            return
        self._motions = {vcpu.index: motions.get(vcpu.index, Motion.HOLD) for vcpu in machine.vcpus}
        machine.parking.held = frozenset(cpu for cpu, motion in self._motions.items() if motion is Motion.HOLD)
        self.running = True
        for vcpu in machine.vcpus:
            self._arm(vcpu)
        machine.resume()

    def interrupt(self) -> None:
        """Ctrl-C."""
        if self.running:
            self._pause()
            self._told(Stop(self.last_stop.cpu, SIGINT))

    def kill(self) -> None:
        """End the machine."""
        self._machine.request_end(Ending(kind="quit", reason="killed by the debugger", asked_by="gdb"))

    def insert(self, key: Key, cpu: int) -> None:
        """Set a breakpoint where ``cpu``'s page tables say; NotAvailable."""
        with self._machine.standing_still():
            self.breakpoints.insert(key, self._machine.vcpus[cpu].get_sregs())

    def remove(self, key: Key) -> None:
        """Take it out."""
        with self._machine.standing_still():
            self.breakpoints.remove(key)

    def _pause(self) -> None:
        if self._machine.run_state is RunState.RUNNING:
            self._own_doing = True
            try:
                self._machine.pause()
            finally:
                self._own_doing = False

    def _arm(self, vcpu: Vcpu) -> None:
        motion = self._motions.get(vcpu.index, Motion.RUN)
        points = self.breakpoints
        wanted = ffi.new("struct pv_guest_debug *")
        wanted.on = True
        wanted.step = motion is Motion.STEP
        wanted.block_irq = self.block_interrupts
        for number, register in points.registers.items():
            wanted.address[number] = register.address
        wanted.dr7 = points.dr7
        for number, watched in enumerate(points.watched):
            wanted.watches[number].gpa, wanted.watches[number].size = watched.gpa, watched.size
        if points.traps_to_guest:
            if wanted.step or points.watched:
                wanted.trap_vector = VECTOR_DB
            elif points.software:
                wanted.trap_vector = VECTOR_BP
        _set_debug(vcpu, wanted)

    def _told(self, stop: Stop) -> None:
        self.running = False
        self._machine.parking.held = frozenset()
        self.last_stop = stop
        T.gdb_stop.on and T.gdb_stop(stop.cpu, stop.signal, stop.why)
        self._tell(stop)

    def _take_stop(self) -> None:
        """A vCPU has asked for this."""
        with self._lock:
            if not self.running or not self._stops:
                return  # another vCPU's stop was told meanwhile, or the debugger has gone
            stop = self._stops.pop(0)
        try:
            self._pause()
        except DeadlineError:  # the others go on; this one meets the breakpoint again, or is told of later
            if stop.lasting:
                self._stops.append(stop)
            self._machine.loop.call_later(AGAIN, self._take_stop)
            return
        self._told(stop)

    # -- what else happens to the machine ---------------------------------------------------------

    def stopped(self) -> None:
        """Memory is nobody's but the guest's while it stands still, whoever stopped it."""
        self.breakpoints.lift()
        if self.running and not self._own_doing and self._machine.run_state is RunState.PAUSED:
            self._told(Stop(self.last_stop.cpu, SIGINT))

    def about_to_run(self) -> None:
        """Of the hook, in the loop: put the breakpoints into memory, whoever lets the guest go on."""
        if self.running:
            self.breakpoints.plant()

    def was_reset(self, source: str, by_guest: bool) -> None:
        """Memory is new, the breakpoints are meant still."""
        self.breakpoints.forget_planted()

    def ended(self, ending: Ending) -> None:
        """Tell; with --no-shutdown the dead can be looked at."""
        self.breakpoints.lift()
        if self._machine.config.no_shutdown:
            if self.running:
                self._told(Stop(self.last_stop.cpu, SIGABRT))
        else:
            self.running = False
            self._tell(Exited(ending.status))

    # -- in vCPU threads --------------------------------------------------------------------------

    def debug_exit(self, thread: VcpuThread) -> None:
        """Of the hook. Breakpoint, watchpoint, end of a step, or the guest's own."""
        vcpu, exit_ = thread.vcpu, thread.vcpu.exit
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        pc, dr6 = linear_pc(regs, sregs), exit_.raw[1]
        trap = vcpu.native.debug.trap_handler
        if exit_.raw[0] == VECTOR_BP:
            if not self._stop_at_software(thread, pc):
                self._inject(vcpu, lib.KVM_GUESTDBG_INJECT_BP)
        elif trap != lib.PV_NOWHERE and pc == trap:
            self._at_trap_handler(thread)
        elif hits := [n for n in self.breakpoints.registers if dr6 & _DR6_HITS & 1 << n]:
            register = self.breakpoints.registers[hits[0]]
            if register.code:
                name = {2: "watch", 3: "rwatch", 4: "awatch"}[register.key.kind]
                self._ask_to_stop(thread, Stop(vcpu.index, why=f"{name}:{register.key.address:x};", lasting=True))
            else:
                self._ask_to_stop(thread, Stop(vcpu.index, why=_break(register.key)))
        elif dr6 & _DR6_STEP:
            self.carried_out(thread)
        elif not self.breakpoints.traps_to_guest:
            self._inject(vcpu, lib.KVM_GUESTDBG_INJECT_DB)

    def breakpoint_met(self, thread: VcpuThread) -> bool:
        """Of the hook."""
        return self._stop_at_software(thread, linear_pc(thread.vcpu.get_regs(), thread.vcpu.get_sregs()))

    def carried_out(self, thread: VcpuThread) -> None:
        """Of the hook: one more instruction is done."""
        index = thread.vcpu.index
        watches = thread.vcpu.native.debug.watches
        for number, watched in enumerate(self.breakpoints.watched):
            old = bytes(ffi.buffer(watches[number].old))[: watched.size]
            if self._machine.memory.read(watched.gpa, watched.size) != old:
                self._ask_to_stop(thread, Stop(index, why=f"watch:{watched.key.address:x};"))
                return
        if self._motions.get(index) is Motion.STEP:
            self._ask_to_stop(thread, Stop(index))

    def _stop_at_software(self, thread: VcpuThread, pc: int) -> bool:
        if not self.breakpoints.is_planted(pc):
            return False
        self._ask_to_stop(thread, Stop(thread.vcpu.index, why="swbreak:;"))
        return True

    def _at_trap_handler(self, thread: VcpuThread) -> None:
        """See guest_traps.py; in the vCPU's own mode only what the debugger caused is taken back."""
        vcpu, memory = thread.vcpu, self._machine.memory
        frame = read_frame(memory, vcpu.get_regs(), vcpu.get_sregs())
        if frame is not None and vcpu.native.debug.trap_vector == VECTOR_DB:
            take_back(vcpu, memory, frame, 0)
            self.carried_out(thread)
        elif frame is not None and self.breakpoints.is_planted(frame.pc - 1):
            take_back(vcpu, memory, frame, 1)
            self._ask_to_stop(thread, Stop(vcpu.index, why="swbreak:;"))
        elif lib.pv_vcpu_step_past_trap(vcpu.native) < 0:
            raise KvmError("KVM_SET_GUEST_DEBUG", ffi.errno)

    def _inject(self, vcpu: Vcpu, what: int) -> None:
        """The exception was the guest's own."""
        wanted = ffi.new("struct pv_guest_debug *", vcpu.native.debug)
        wanted.inject = what
        _set_debug(vcpu, wanted)

    def _ask_to_stop(self, thread: VcpuThread, stop: Stop) -> None:
        with self._lock:
            self._stops.append(stop)
        self._machine.request_call(self._take_stop)


def _break(key: Key) -> str:
    return "swbreak:;" if key.kind == 0 else "hwbreak:;"


def _set_debug(vcpu: Vcpu, wanted: object) -> None:
    if lib.pv_vcpu_set_debug(vcpu.native, wanted) < 0:
        raise KvmError("KVM_SET_GUEST_DEBUG", ffi.errno)
