"""Who may let the vCPUs run: nobody, while somebody waits for the loop to see to what they asked for.

A request counts from the moment it is made, in whatever thread, until the loop carries it out. So a guest that has
written to debug-exit does not execute what stands behind it, whoever else lets the machine go on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from pyvmm.machine.console_output import OutputGate
from pyvmm.machine.device_rest import DeviceRest
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.run_state import RunState, RunStateTracker
from pyvmm.machine.vcpu_thread import PARK_DEADLINE, VcpuThread


class Parking:
    """Of one machine; ``threads`` may still grow. ``gate`` is opened for a vCPU that waits for its output's reader."""

    def __init__(
        self,
        threads: Sequence[VcpuThread],
        loop: EventLoop,
        gate: OutputGate,
        rest: DeviceRest,
        run_state: RunStateTracker,
    ) -> None:
        self._threads = threads
        self._loop = loop
        self._gate = gate
        self._rest = rest
        self._run_state = run_state
        self.requests = 0
        """Made, and not carried out yet; also how often the vCPUs are held."""
        self.held: frozenset[int] = frozenset()
        """vCPUs that do not run with the others: a debugger steps one at a time."""
        # Re-entrant: a signal handler may interrupt the loop's thread while that holds it.
        self._lock = threading.RLock()

    def park(self) -> None:
        """Stop every vCPU between two instructions. DeadlineError names the device that keeps one."""
        self._gate.hold_open(True)
        try:
            for thread in self._threads:
                thread.request_park()
            deadline = time.monotonic() + PARK_DEADLINE
            with self._rest.named():
                for thread in self._threads:
                    thread.wait_parked(deadline)
        finally:
            self._gate.hold_open(False)

    def let_run(self) -> None:
        """Resume the vCPUs of a machine that is running, unless somebody wants it to end or to reset."""
        with self._lock:
            if self._run_state.state is RunState.RUNNING and not self.requests:
                for thread in self._threads:
                    if thread.vcpu.index not in self.held:
                        thread.resume()

    def hold(self, held: bool) -> None:
        """From any thread: let no vCPU run for a while, or let them go on, at most as often as they were held."""
        with self._lock:
            self.requests += 1 if held else -1
            if held:
                for thread in self._threads:
                    thread.request_park()
        if not held:
            self.let_run()

    def request(self, carry_out: Callable[[], None]) -> None:
        """From any thread: ``carry_out`` in the loop's; until then no vCPU executes another instruction."""
        with self._lock:
            self.requests += 1
            for thread in self._threads:
                thread.request_park()

        def serve() -> None:
            with self._lock:
                self.requests -= 1
            carry_out()
            self.let_run()

        self._loop.post(serve)
