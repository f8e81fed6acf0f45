"""Finds out that a guest has ended by halting: every vCPU in HLT with interrupts off.

With the interrupt controllers in the kernel HLT makes no exit, so somebody has to look. A vCPU that cannot
wake uses no CPU time at all; only when all of them have stood still for a while are they parked and looked at,
and after each look that finds a guest merely idle the next comes later.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.event_loop import EventLoop, Timer
from pyvmm.machine.vcpu_thread import VcpuThread
from pyvmm.native import lib

TICK = 0.05
LONGEST = 2.0
_RFLAGS_IF = 1 << 9


class HaltWatch:
    """Calls ``look`` (which parks the vCPUs and asks :func:`cannot_wake`) when looking may pay."""

    def __init__(self, loop: EventLoop, threads: list[VcpuThread], look: Callable[[], None]) -> None:
        self._loop = loop
        self._threads = threads
        self._look = look
        self._last: list[float] = []
        self._still = 0.0
        self._next_look = TICK
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin watching."""
        self._timer = self._loop.call_later(TICK, self._tick)

    def stop(self) -> None:
        """No more looks."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        now = [thread.cpu_seconds() for thread in self._threads]
        if now != self._last:
            self._last = now
            self._still = 0.0
            # A little activity does not mean that looking became cheap again; halve the patience.
            self._next_look = max(TICK, self._next_look / 2)
        else:
            self._still += TICK
            if self._still >= self._next_look:
                self._still = 0.0
                self._next_look = min(LONGEST, self._next_look * 2)
                self._look()
                # Parking itself used CPU time; that is not the guest's doing.
                self._last = [thread.cpu_seconds() for thread in self._threads]
        if self._timer is not None:
            self._timer = self._loop.call_later(TICK, self._tick)


def cannot_wake(vcpus: list[Vcpu]) -> bool:
    """Whether no interrupt can start any of the parked vCPUs again.

    An AP that waits for INIT or SIPI counts: only another vCPU could send one. A pending or latched NMI does
    not wait for IF, so it counts as being awake.
    """
    for vcpu in vcpus:
        state = vcpu.get_mp_state()
        if state in (lib.KVM_MP_STATE_UNINITIALIZED, lib.KVM_MP_STATE_INIT_RECEIVED):
            continue
        if state != lib.KVM_MP_STATE_HALTED or vcpu.get_regs().rflags & _RFLAGS_IF:
            return False
        events = vcpu.get_events()
        if events.nmi_pending or events.nmi_injected or events.smi_pending:
            return False
    return True
