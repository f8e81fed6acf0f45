"""A whole machine: run state, vCPU threads, reset, and how it ends.

Threads: the loop's thread (the one that calls :meth:`Machine.run`) changes the run state, parks and resumes
vCPUs, resets. vCPU threads, device callbacks and signal handlers only *ask* (``request_*``): they note what they
want, ask every vCPU to park, and leave the rest to the loop. Until it has seen to it, nothing lets a vCPU run: a
guest that has written to debug-exit must not execute what stands behind it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from pyvmm.arch.x86 import user_entry
from pyvmm.arch.x86.boot import LoadedImage
from pyvmm.devices.bus import Bus
from pyvmm.devices.debug_exit import debug_exit_status
from pyvmm.devices.device import Device
from pyvmm.errors import DeadlineError, PyvmmError, StateError
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.crash_report import crash_report
from pyvmm.machine.device_rest import DeviceRest
from pyvmm.machine.dirty_tracker import DirtyTracker
from pyvmm.machine.ending import Ending, crashed, timed_out, unclean
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.exit_handler import ExitHandler
from pyvmm.machine.halt_watch import HaltWatch, cannot_wake
from pyvmm.machine.observer import Observers
from pyvmm.machine.output_watch import OutputWatch
from pyvmm.machine.parking import Parking
from pyvmm.machine.power_on import PowerOnState, enter_image
from pyvmm.machine.run_state import RunState, RunStateTracker
from pyvmm.machine.serial_backend import SerialBackend
from pyvmm.machine.sinks import SinkCollector
from pyvmm.machine.vcpu_thread import VcpuThread
from pyvmm.memory.guest_memory import GuestMemory
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    from pyvmm.host.kvm_counters import KvmCounters
    from pyvmm.kvm.system import System
    from pyvmm.machine.debug_hook import DebugHook
    from pyvmm.net.leases import Lease

T = trace_group("machine")

ACPI_S5 = 5
_ENDS_FROM_OUTSIDE = frozenset({"quit", "timeout"})
"""These end the process, too, when ``no_shutdown`` keeps it after the guest's own end."""
_NOT_THE_GUESTS = _ENDS_FROM_OUTSIDE | {"incoming-failed", "vcpu-error"}


class Machine:
    """Made by :func:`pyvmm.machine.builder.build_machine`; a context manager that gives everything back."""

    def __init__(
        self,
        config: MachineConfig,
        quirks: frozenset[str],
        *,
        system: System,
        vm: Vm,
        memory: GuestMemory,
        dirty: DirtyTracker,
        loop: EventLoop,
        ports: Bus,
        mmio: Bus,
        collector: SinkCollector,
        backend: SerialBackend,
    ) -> None:
        self.config = config
        self.quirks = quirks
        self.system = system
        self.vm = vm
        self.memory = memory
        self.dirty = dirty
        self.loop = loop
        self.ports = ports
        self.mmio = mmio
        self.collector = collector
        self.backend = backend
        self.devices: list[Device] = []
        self.leases: dict[str, Lease] = {}
        """Places in named networks, by their taps' names. Devices use and close the taps."""
        self.threads: list[VcpuThread] = []
        self.counters: list[KvmCounters] = []
        """KVM's, of each vCPU."""
        self.vm_counters: KvmCounters
        self.image: LoadedImage | None = None
        self.ending: Ending | None = None
        self.owned = contextlib.ExitStack()
        self.observers = Observers()
        self.power_button: Callable[[], None] = lambda: None
        self.image_loaded: Callable[[], None] = lambda: None
        self.shadow: Callable[[Callable[[], None]], None] | None = None
        """Set while the guest lives elsewhere and this is its replica: given what would end or reset the machine.
        What the replica does is not what the guest did, so it only stands still then, until it is put right.
        """
        self.debugger: DebugHook | None = None
        self.resets = 0
        self.started_at = 0.0
        self.power_on_state: PowerOnState
        self._run_state = RunStateTracker()
        self.rest = DeviceRest(self.devices)
        self.parking = Parking(self.threads, loop, backend.gate, self.rest, self._run_state)
        self.exits = ExitHandler(self)
        self._halt_watch = HaltWatch(loop, self.threads, self._look_for_halt)

    # -- building -------------------------------------------------------------------------------

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """Take ``vcpu`` in, as KVM made it plus its CPUID."""
        user_entry.prepare_vcpu(vcpu, self.quirks)
        self.threads.append(
            VcpuThread(
                vcpu,
                self.ports,
                self.mmio,
                before_access=self.collector.drain,
                gate=self.backend.gate,
                on_exit=self.exits.handle,
                on_failure=self._vcpu_failed,
            )
        )

    @property
    def vcpus(self) -> list[Vcpu]:
        """All vCPUs, the boot vCPU first."""
        return [thread.vcpu for thread in self.threads]

    def power_on(self, *, load_image: bool = True) -> None:
        """Remember what power-on looks like, load the image, put the boot vCPU at its entry.

        ``load_image=False`` leaves the machine empty, for a saved state (migration/machine_state.py); the image is
        loaded only if the guest resets.
        """
        self.power_on_state = PowerOnState(self.system, self.vm, self.vcpus)
        if load_image:
            self._load()

    def _load(self) -> None:
        self.image = enter_image(self.config, self.memory, self.vcpus[0])
        self.image_loaded()

    # -- run state ------------------------------------------------------------------------------

    @property
    def run_state(self) -> RunState:
        """What the machine is doing."""
        return self._run_state.state

    def start(self) -> None:
        """prelaunch -> running, unless the configuration says that somebody else will resume it."""
        self.started_at = time.monotonic()
        for thread in self.threads:
            thread.start()
        OutputWatch(self.loop, self.collector, self.backend.gate).start()
        self._halt_watch.start()
        if self.config.timeout is not None:
            seconds = self.config.timeout
            self.loop.call_later(seconds, lambda: self.request_end(timed_out(seconds)))
        if self.config.incoming:
            self._run_state.change(RunState.INMIGRATE)
        elif not self.config.start_paused:
            self.resume()

    def pause(self, new_state: RunState = RunState.PAUSED) -> None:
        """Park every vCPU between two instructions, devices at rest. DeadlineError, and all go on, if one does not."""
        running = self.run_state is RunState.RUNNING
        if running:
            try:
                self.parking.park()
                for vcpu in self.vcpus:
                    vcpu.settle_user_entry()
                self.rest.pause()
            except DeadlineError:
                self.parking.let_run()
                raise
        self._run_state.change(new_state)
        if running:
            self.observers.stopped()

    def resume(self) -> None:
        """Let all vCPUs run."""
        if self.ending is not None:
            raise StateError("the guest has ended; only a reset brings it back")
        self._go_on()
        self.observers.resumed()

    def _go_on(self) -> None:
        self._run_state.change(RunState.RUNNING)
        if self.debugger is not None:
            self.debugger.about_to_run()
        self.rest.resume()
        self.parking.let_run()

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """For a moment no vCPU runs and each one's state may be read, whatever the run state, which does not change."""
        try:
            self.parking.park()
            for vcpu in self.vcpus:
                vcpu.settle_user_entry()
            yield
        finally:
            self.parking.let_run()

    def hold_vcpus(self, held: bool) -> None:
        """From any thread: let no vCPU run for a while, or let them go on, at most as often as they were held."""
        self.parking.hold(held)

    # -- requests, from any thread --------------------------------------------------------------

    def request_end(self, ending: Ending) -> None:
        """End the guest with ``ending``; the first one counts."""
        self.parking.request(lambda: self._end(ending))

    def request_reset(self, source: str, *, by_guest: bool = True) -> None:
        """Reset the machine, or end it with ``--no-reboot``. Several at once are one."""
        life = self.resets
        self.parking.request(lambda: self._reset(source, life, by_guest))

    def request_call(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the loop's thread; until then no vCPU executes another instruction."""
        self.parking.request(function)

    def debug_exit_written(self, value: int) -> None:
        """The guest wrote ``value`` to the debug-exit port."""
        status = debug_exit_status(value)
        self.request_end(Ending(kind="debug-exit", status=status, value=value, reason=f"debug-exit {value:#x}"))

    def shutdown_spelled(self) -> None:
        """The guest wrote "Shutdown" to the port that is for it."""
        self.request_end(Ending(kind="poweroff", reason="shutdown port"))

    def sleep_requested(self, sleep_type: int) -> None:
        """The guest entered an ACPI sleep state; S5 is the only one offered."""
        if sleep_type == ACPI_S5:
            self.request_end(Ending(kind="poweroff", reason="ACPI S5"))

    def _vcpu_failed(self, thread: VcpuThread, error: BaseException) -> None:
        """A vCPU thread died of ``error``: a defect or a host fault, never the guest's doing."""

        def surface() -> None:
            if self.ending is None:
                raise error

        self.loop.post(surface)

    # -- in the loop's thread -------------------------------------------------------------------

    def run(self) -> Ending:
        """Start, serve until the guest ends, and say how it ended."""
        self.start()
        self.loop.run()
        if self.ending is None:
            raise StateError("the machine's loop was stopped before the guest ended")
        return self.ending

    @property
    def requests_pending(self) -> bool:
        """Whether something the guest asked for is still to be carried out by the loop: it is in no state yet."""
        return self.parking.requests > 0

    def _put_off(self, what: Callable[[], None]) -> bool:
        """Whether this is a replica, which neither ends nor resets by itself."""
        if self.shadow is None:
            return False
        if self.run_state is RunState.RUNNING:
            self.pause(RunState.COLO)
        self.shadow(what)
        return True

    def _end(self, ending: Ending) -> None:
        if ending.kind not in _NOT_THE_GUESTS and self._put_off(lambda: self.request_end(ending)):
            return
        if self.ending is not None:
            if self.config.no_shutdown and ending.kind in _ENDS_FROM_OUTSIDE:
                self.observers.ended(ending)  # the guest's own end stays what counts
                self.loop.stop()
            return
        self._halt_watch.stop()
        try:
            self.parking.park()
            self.rest.pause()  # what the guest gave to a disk gets there
        except DeadlineError as error:
            ending = unclean(ending, str(error))
        self.collector.drain_ring()
        if ending.kind == "timeout" and ending.problem is None:
            # Where a guest hangs is what its owner will want to know.
            ending = msgspec.structs.replace(ending, crash=crash_report(self.vcpus[0], self.memory))
        self.ending = ending
        state = {
            "triple-fault": RunState.GUEST_PANICKED,
            "unknown-instruction": RunState.INTERNAL_ERROR,
            "vcpu-error": RunState.INTERNAL_ERROR,
        }
        self._run_state.change(state.get(ending.kind, RunState.SHUTDOWN))
        T.machine_ended.on and T.machine_ended(ending.kind, ending.status)
        self.observers.ended(ending)
        if not self.config.no_shutdown or ending.kind in _ENDS_FROM_OUTSIDE:
            self.loop.stop()

    def _reset(self, source: str, life: int, by_guest: bool) -> None:
        revived = self.ending is not None
        if self._put_off(lambda: self.request_reset(source, by_guest=by_guest)):
            return
        if life != self.resets or (revived and (by_guest or not self.config.no_shutdown)):
            return
        if self.config.no_reboot and not revived:
            self._end(Ending(kind="reset", reason=f"the guest reset the machine ({source})"))
            return
        T.machine_reset.on and T.machine_reset(source)
        running = self.run_state is RunState.RUNNING
        self.parking.park()
        if running:
            self._run_state.change(RunState.PAUSED)
        self.collector.drain_ring()
        self.rest.reset()
        self.power_on_state.restore_chips()
        # Loaders rely on zeroed memory, as a first boot has it.
        self.memory.discard()
        self.power_on_state.restore_cpus()
        for vcpu in self.vcpus:
            user_entry.prepare_vcpu(vcpu, self.quirks)
        self._load()
        self.resets += 1
        self.observers.was_reset(source, by_guest)
        if revived:
            self.ending = None
            self._halt_watch.start()
        if running or revived:
            self._run_state.change(RunState.PRELAUNCH)
        if running:  # one that was paused stays so, one that had ended waits to be resumed
            self._go_on()

    def _look_for_halt(self) -> None:
        if self.run_state is not RunState.RUNNING or self.parking.requests:
            return
        self.parking.park()
        self.end_if_halted()
        self.parking.let_run()

    def end_if_halted(self) -> None:
        """All vCPUs are parked. Who parks them often has to ask: they never look idle for long enough then."""
        if self.ending is None and cannot_wake(self.vcpus):
            self._end(Ending(kind="halt", reason="every vCPU halted with interrupts off"))

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """End all vCPU threads, then give everything back.

        DeadlineError if a thread does not end, a vCPU's or a device's: nothing is given back then, because the
        thread still uses it. Calling again tries again.
        """
        self._halt_watch.stop()
        self.backend.gate.hold_open(True)
        with self.rest.named():
            for thread in self.threads:
                thread.end()
        self.rest.end_io()
        self.owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def crash(self, thread: VcpuThread, kind: str, reason: str) -> None:
        """End the guest because ``thread``'s vCPU cannot go on; called in that thread."""
        try:
            facts = crash_report(thread.vcpu, self.memory)
        except PyvmmError as error:
            facts = {"cpu": thread.vcpu.index, "problem": str(error)}
        self.request_end(crashed(kind, reason, facts))
