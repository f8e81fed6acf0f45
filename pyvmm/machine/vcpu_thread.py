"""One thread per vCPU: runs it, hands its exits to the buses, parks it when asked to.

A vCPU parks only after ``PV_EXIT_KICKED``: KVM_RUN has then returned EINTR because of immediate_exit, and
whatever access was pending is complete. So a parked vCPU is between two instructions and its state is whole.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from typing import Any

from pyvmm.devices.bus import Bus
from pyvmm.errors import DeadlineError
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.console_output import OutputGate
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group

T = trace_group("machine")

PARK_DEADLINE = 5.0
"""Seconds in which a kicked vCPU must have parked; it is microseconds unless a device blocks."""

_IO = lib.PV_EXIT_IO
_MMIO = lib.PV_EXIT_MMIO
_KICKED = lib.PV_EXIT_KICKED
_ERRNO = lib.PV_EXIT_ERRNO


class Command(enum.Enum):
    """What a vCPU thread is to do."""

    RUN = "run"
    PARK = "park"
    END = "end"


class VcpuThread:
    """Owns the thread, not the vCPU. ``on_exit`` gets every exit that is not an access to a bus."""

    def __init__(
        self,
        vcpu: Vcpu,
        ports: Bus,
        mmio: Bus,
        *,
        before_access: Callable[[], None],
        gate: OutputGate,
        on_exit: Callable[[VcpuThread, int], None],
        on_failure: Callable[[VcpuThread, BaseException], None],
    ) -> None:
        self.vcpu = vcpu
        self._ports = ports
        self._mmio = mmio
        self._before_access = before_access
        self._gate = gate
        self._on_exit = on_exit
        self._on_failure = on_failure
        self._command = Command.PARK
        self._parked = True
        self._ended = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.index}", daemon=True)

    @property
    def parked(self) -> bool:
        """Whether the vCPU stands still."""
        return self._parked

    @property
    def thread_id(self) -> int | None:
        """The kernel's number of the thread; ``None`` before :meth:`start`."""
        return self._thread.native_id

    def start(self) -> None:
        """Start the thread; the vCPU stays parked until :meth:`resume`."""
        self._thread.start()

    def cpu_seconds(self) -> float:
        """CPU time the thread has used; a halted vCPU's stands still."""
        ident = self._thread.ident
        # Locked: a thread that has not said that it ends is alive, and asking for a dead one's clock may crash.
        with self._condition:
            if ident is None or self._ended:
                return 0.0
            return time.clock_gettime(time.pthread_getcpuclockid(ident))

    def resume(self) -> None:
        """Let the vCPU run."""
        with self._condition:
            if self._command is Command.PARK:
                # _parked is the thread's own to clear: asked to park again before it wakes, it never left.
                self._command = Command.RUN
                self._condition.notify_all()

    def request_park(self) -> None:
        """Ask the vCPU to park; from any thread, its own included."""
        with self._condition:
            if self._command is Command.RUN:
                self._command = Command.PARK
            self.vcpu.kick()

    def wait_parked(self, deadline: float) -> None:
        """Wait until it stands still; DeadlineError after monotonic time ``deadline``."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._parked, deadline - time.monotonic()):
                raise DeadlineError(f"vCPU {self.vcpu.index} did not stop within its deadline")

    def end(self) -> None:
        """End the thread and wait for it. The vCPU may be closed afterwards."""
        with self._condition:
            self._command = Command.END
            self._condition.notify_all()
            self.vcpu.kick()
        if self._thread.ident is None:  # never started
            return
        deadline = time.monotonic() + PARK_DEADLINE
        while self._thread.is_alive():
            self._thread.join(0.1)
            if time.monotonic() > deadline:
                raise DeadlineError(f"vCPU {self.vcpu.index}'s thread did not end within {PARK_DEADLINE:g} s")
            # The signal can hit before the thread is in KVM_RUN the first time; once more is harmless.
            self.vcpu.kick()

    # -- in the thread --------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._wait_for_work():
                self._run()
        except BaseException as error:
            self._on_failure(self, error)
        finally:
            lib.pv_vcpu_release_ring(self.vcpu.native)
            with self._condition:
                self._parked = self._ended = True
                self._condition.notify_all()

    def _wait_for_work(self) -> bool:
        with self._condition:
            if self._command is Command.PARK:
                T.vcpu_park.on and T.vcpu_park(self.vcpu.index)
                self._parked = True
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._command is not Command.PARK)
            self._parked = False
            return self._command is Command.RUN

    def _run(self) -> None:
        """Exits until the vCPU is to park or end."""
        run = lib.pv_vcpu_run
        native = self.vcpu.native
        exit_ = self.vcpu.exit
        sinks = self.vcpu.sinks
        ports = self._ports
        gate = self._gate
        running = Command.RUN  # looked up once: an enum is slow at it, and this loop is what a Python exit costs
        if gate.full:
            # Parked while it waited here: being resumed is no reason to write more.
            gate.wait()
        while True:
            kind = run(native)
            if kind == _KICKED:
                if self._command is not running:
                    return
                continue
            # What sinks collected was written before this access.
            if sinks.sinks_pending:
                self._before_access()
            if kind == _IO:
                T.vcpu_io.on and T.vcpu_io(
                    self.vcpu.index, exit_.is_write, exit_.port, exit_.size, exit_.count, exit_.data
                )
                if exit_.count != 1:
                    self._string_io(exit_)
                elif exit_.is_write:
                    ports.write(exit_.port, exit_.size, exit_.data)
                else:
                    exit_.data = ports.read(exit_.port, exit_.size)
            elif kind == _MMIO:
                T.vcpu_mmio.on and T.vcpu_mmio(
                    self.vcpu.index, exit_.is_write, exit_.address, exit_.size, exit_.data
                )
                if exit_.is_write:
                    self._mmio.write(exit_.address, exit_.size, exit_.data)
                else:
                    exit_.data = self._mmio.read(exit_.address, exit_.size)
            else:
                T.vcpu_exit.on and T.vcpu_exit(self.vcpu.index, kind, exit_.reason)
                self._on_exit(self, kind)
                if kind == _ERRNO and self._command is not running:
                    # KVM_RUN itself fails, so there is no access to complete and it would only fail again.
                    return
            if gate.full:
                # Waiting with KVM's ring held would make everybody who wants it wait for the console, too.
                lib.pv_vcpu_release_ring(native)
                gate.wait()
            if self._command is not running:
                # One more KVM_RUN completes the access just served; immediate_exit makes it return at once.
                self.vcpu.kick()

    def _string_io(self, exit_: Any) -> None:
        """``rep ins``/``rep outs``: the same port ``count`` times, advancing data (api.rst, KVM_EXIT_IO)."""
        size, port, ports = exit_.size, exit_.port, self._ports
        data = ffi.buffer(exit_.bytes, size * exit_.count)
        for at in range(0, len(data), size):
            if exit_.is_write:
                ports.write(port, size, int.from_bytes(data[at : at + size], "little"))
            else:
                data[at : at + size] = ports.read(port, size).to_bytes(size, "little")
