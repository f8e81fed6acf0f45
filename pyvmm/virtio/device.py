"""What every virtio device shares: features, queues, configuration space, its end in DEVICE_NEEDS_RESET.

A device is used by a transport (``mmio.py``), which owns the driver's side of it: status, negotiation, interrupts.
Section numbers are those of virtio 1.2.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import msgspec

from pyvmm.devices.state import DeviceState, decode_state
from pyvmm.trace import trace_group
from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, NeedsReset, VirtQueue

T = trace_group("virtio")

F_VERSION_1 = 1 << 32  # 6: reserved feature bits
TRANSPORT_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1


class Transport(Protocol):
    """What a device may ask of its transport; the device's lock is held."""

    def used_buffer_notification(self) -> None:
        """Tell the driver that buffers were used."""

    def configuration_changed(self) -> None:
        """Tell the driver that the configuration space changed (2.5.1: a new generation)."""

    def device_needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET and tell the driver."""

    def ring(self, index: int) -> None:
        """Have queue ``index`` served soon, as if the driver had rung; from any thread, with or without the lock."""


class NoState(DeviceState):
    """The state of a device that has none besides features and queues."""


class VirtioDevice:
    """Base of a virtio device: subclasses say what they are and serve their queues.

    ``lock`` is also the transport's, so one lock covers registers, queues and the device's own state.

    A device is served in one of two ways. By default the machine's loop waits for doorbells and calls :meth:`serve`.
    One whose data path is in the native core takes the doorbells itself (:meth:`take_doorbells`) and serves its
    queues on threads of its own, without ``lock``; between :meth:`suspend_io` and :meth:`resume_io` these keep off.
    """

    name = ""
    """For traces and section ids."""
    device_id = 0
    """Chapter 5's number."""
    features = 0
    """Device-specific features offered; the transport's own come on top."""
    queue_sizes: tuple[int, ...] = ()
    """Largest size of each queue."""
    state_type: ClassVar[type[DeviceState]] = NoState

    def __init__(self, memory_table: Any) -> None:
        self.lock = threading.RLock()
        self.queues = [VirtQueue(memory_table, i, size, self.name) for i, size in enumerate(self.queue_sizes)]
        self.negotiated = 0
        """The features both sides have agreed on; 0 until then."""
        self.active = False
        """Between DRIVER_OK and reset, unless broken: only then may queues be used (2.1.2)."""
        self.state: Any = self.state_type()
        self.transport: Transport | None = None
        self._pauses = 0
        self._io_runs = False

    # -- for subclasses -------------------------------------------------------------------------

    def acceptable(self, features: int) -> bool:
        """Whether a subset of the offered features makes sense (2.2.2, dependencies between features)."""
        return True

    def configuration(self) -> bytes:
        """The configuration space as it is now."""
        return b""

    def write_configuration(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration space; ignored unless a device has something to set there."""

    def serve_queue(self, queue: VirtQueue) -> bool:
        """Work off what is available, but no more than about a queue's worth; ``True`` if there may be more.

        The bound is why a driver that refills its queue all the time cannot keep the caller's thread to itself.
        """
        raise NotImplementedError(f"serve_queue is not implemented for {type(self).__name__}")

    def activated(self) -> None:
        """The driver is ready (DRIVER_OK)."""

    def deactivated(self) -> None:
        """The driver has reset the device, or it broke: use no chain of a queue any more."""

    def take_doorbells(self, doorbells: list[int], interrupt: Any) -> bool:
        """``True``: the device waits for these eventfds itself, one for each queue, and raises ``interrupt``
        (``struct pv_interrupt *``) itself. They outlive it. Called once, before the machine runs.
        """
        return False

    def resume_io(self) -> None:
        """The device is active: threads of its own may use queues that are ready."""

    def suspend_io(self) -> None:
        """Return when no thread of the device's own uses a queue, and none will until :meth:`resume_io`.

        What is in flight is finished, or put back, first: a suspended queue has no chain out. DeadlineError if that
        cannot be had in time; the device has to go on then as if it had not been asked.
        """

    def statistics(self) -> dict[str, int]:
        """Counters for reports, by name."""
        return {}

    def waits_for(self) -> str | None:
        """See Device.waits_for."""
        return None

    def end_io(self, deadline: float) -> None:
        """See Device.end_io; :meth:`close` follows."""

    def release(self) -> None:
        """See Device.release."""

    def claim(self) -> None:
        """See Device.claim."""

    def arriving(self) -> None:
        """See Device.arriving."""

    def left(self) -> None:
        """See Device.left."""

    def moved(self) -> None:
        """See Device.moved."""

    def close(self) -> None:
        """End the device's threads, if any, and give back what it owns. Called once, nothing else after it."""

    # -- for transports -------------------------------------------------------------------------

    def activate(self) -> None:
        """DRIVER_OK."""
        self.active = True
        self.activated()
        self._let_io_run()

    def halt(self) -> None:
        """No queue is used any more until the next reset: FAILED, or DEVICE_NEEDS_RESET."""
        was_active, self.active = self.active, False
        self._let_io_run()
        if was_active:
            self.deactivated()
        for queue in self.queues:
            queue.stop()

    def pause(self) -> None:
        """Use no queue until :meth:`unpause`, whatever the driver does. Calls nest.

        DeadlineError, and the device goes on, if what is in flight does not end.
        """
        self._pauses += 1
        try:
            self._let_io_run()
        except BaseException:
            self._pauses -= 1
            raise

    def unpause(self) -> None:
        """Undo one :meth:`pause`; the caller rings the doorbells, since some may have gone unheard."""
        self._pauses -= 1
        self._let_io_run()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No queue is used inside."""
        self.pause()
        try:
            yield
        finally:
            self.unpause()

    def _let_io_run(self) -> None:
        wanted = self.active and not self._pauses
        if wanted != self._io_runs:
            if wanted:
                self.resume_io()
            else:
                self.suspend_io()
            self._io_runs = wanted

    def reset(self) -> None:
        """Back to power-on (2.4): nothing negotiated, no queue, the device's state as at first."""
        self.halt()
        self.negotiated = 0
        for queue in self.queues:
            queue.reset()
        self.state = self.state_type()

    def serve(self, index: int) -> bool:
        """Doorbell of queue ``index``; ``True`` if it wants to be called again soon. Raises nothing for the guest."""
        if not self.active or self._pauses or not 0 <= index < len(self.queues):
            return False
        queue = self.queues[index]
        if not queue.ready:
            return False
        try:
            more = self.serve_queue(queue)
        except NeedsReset as problem:
            self.fail(str(problem))
            return False
        if queue.wants_interrupt() and self.transport is not None:
            self.transport.used_buffer_notification()
        return more

    def fail(self, reason: str) -> None:
        """Stop until the driver resets the device (2.1.2: DEVICE_NEEDS_RESET)."""
        T.virtio_needs_reset.on and T.virtio_needs_reset(self.name, reason)
        self.halt()
        if self.transport is not None:
            self.transport.device_needs_reset()

    def save_state(self) -> dict[str, Any]:
        """The device's own registers."""
        return msgspec.structs.asdict(self.state)

    def decode(self, section: str, data: object) -> Callable[[], None]:
        """Check ``data`` (SectionError) and return what takes it over."""
        decoded = decode_state(section, self.state_type, data)

        def apply() -> None:
            self.state = decoded

        return apply
