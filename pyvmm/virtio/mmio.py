"""The virtio-mmio transport, version 2 (virtio 1.2, 4.2): a device's registers as a range of the memory bus.

The interrupt. InterruptStatus (4.2.2) is a level: it stays until acknowledged. It lives in the native core
(``virtio_interrupt.h``), for queues may be served by native threads, and leads to an event descriptor behind which is
an edge-triggered line: *every* notification is a pulse, and so is an acknowledgement that leaves a bit set.

The doorbell. ``doorbell(i)`` says that queue ``i`` is to be served soon and must not wait; whoever gets it calls
:meth:`VirtioMmio.serve`, on a thread of its choice. An ioeventfd on QueueNotify bypasses :meth:`write` and leads there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pyvmm.devices.state import StatefulDevice, decode_state
from pyvmm.errors import SectionError
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.device import F_VERSION_1, TRANSPORT_FEATURES, VirtioDevice
from pyvmm.virtio.mmio_registers import DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, STATUS_ORDER
from pyvmm.virtio.mmio_state import MmioState
from pyvmm.virtio.queue import NeedsReset, QueueState, VirtQueue

T = trace_group("virtio")

WINDOW = 0x1000
"""Bytes of a transport's range."""
MAGIC = 0x74726976  # "virt"
VERSION = 2
VENDOR = int.from_bytes(b"PYVM", "little")

_ADDRESSES = {
    registers.QUEUE_DESC_LOW: ("descriptors", 0), registers.QUEUE_DESC_HIGH: ("descriptors", 32),
    registers.QUEUE_DRIVER_LOW: ("driver_area", 0), registers.QUEUE_DRIVER_HIGH: ("driver_area", 32),
    registers.QUEUE_DEVICE_LOW: ("device_area", 0), registers.QUEUE_DEVICE_HIGH: ("device_area", 32),
}  # fmt: skip

USED_BUFFER, CONFIGURATION_CHANGE = lib.PV_INTERRUPT_USED_BUFFER, lib.PV_INTERRUPT_CONFIGURATION

_U32 = 0xFFFFFFFF


class VirtioMmio(StatefulDevice[MmioState]):
    """One transport and the device behind it; a single section of saved state.

    ``signal`` is an eventfd, not owned: whatever is added to it is to become a pulse of the interrupt line.
    """

    max_access = 4
    registers = registers.TABLE

    def __init__(
        self, device: VirtioDevice, signal: int, doorbell: Callable[[int], None], *, section_id: str | None = None
    ) -> None:
        super().__init__(MmioState)
        self.lock = device.lock
        self.section_id = section_id or device.name
        self.device = device
        self.interrupt = ffi.new("struct pv_interrupt *")
        """For whoever serves queues without the interpreter; lives as long as the transport."""
        self.interrupt.fd = signal
        self._doorbell = doorbell
        self._offered = device.features | TRANSPORT_FEATURES
        device.transport = self

    # -- the device's side (device.Transport) ---------------------------------------------------

    def used_buffer_notification(self) -> None:
        """4.2.3.4."""
        self._interrupt(USED_BUFFER)

    def configuration_changed(self) -> None:
        """4.2.2.1: a new generation; the driver hears of it once it is ready (2.1.2)."""
        with self.lock:
            s = self.state
            s.config_generation = s.config_generation + 1 & _U32
            if s.status & DRIVER_OK:
                self._interrupt(CONFIGURATION_CHANGE)

    def device_needs_reset(self) -> None:
        """2.1.2: after DRIVER_OK this is a configuration change notification."""
        self._set_status(self.state.status | DEVICE_NEEDS_RESET)
        if self.state.status & DRIVER_OK:
            self._interrupt(CONFIGURATION_CHANGE)

    def ring(self, index: int) -> None:
        """The host's side wants queue ``index`` to be looked at."""
        self._doorbell(index)

    def _interrupt(self, bit: int) -> None:
        lib.pv_interrupt_raise(self.interrupt, bit)
        T.virtio_mmio_notify.on and T.virtio_mmio_notify(self.section_id, self._interrupt_status)

    @property
    def _interrupt_status(self) -> int:
        return int(lib.pv_interrupt_status(self.interrupt))

    # -- the host's side ------------------------------------------------------------------------

    def serve(self, index: int) -> None:
        """Work off queue ``index``; rings the doorbell again if that was too much for once."""
        with self.lock:
            if self.device.serve(index):
                self._doorbell(index)

    def kick(self) -> None:
        """Ring every queue's doorbell: after :meth:`load`, since signalled event descriptors are not in the state.

        Memory must be in place by then.
        """
        with self.lock:
            for queue in self.device.queues:
                self._doorbell(queue.index)

    def statistics(self) -> dict[str, int]:
        """The device's."""
        return self.device.statistics()

    def pause(self) -> None:
        """No queue is used until :meth:`resume`; what is in flight is finished first."""
        with self.lock:
            self.device.pause()

    def waits_for(self) -> str | None:
        """The device's affair."""
        return self.device.waits_for()

    def end_io(self, deadline: float) -> None:
        """The device's affair."""
        self.device.end_io(deadline)

    def release(self) -> None:
        """The device's affair."""
        self.device.release()

    def claim(self) -> None:
        """The device's affair."""
        self.device.claim()

    def arriving(self) -> None:
        """The device's affair."""
        self.device.arriving()

    def left(self) -> None:
        """The device's affair."""
        self.device.left()

    def moved(self) -> None:
        """The device's affair."""
        self.device.moved()

    def resume(self) -> None:
        """Go on; rung doorbells may have been lost on the way, so every queue is looked at."""
        with self.lock:
            self.device.unpause()
            self.kick()

    # -- the driver's side ----------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A register; whatever is not one reads as 0."""
        if offset >= registers.CONFIG:
            at = offset - registers.CONFIG
            # Bytes behind the configuration space read as 0.
            value = int.from_bytes(self.device.configuration()[at : at + size], "little")
        elif size != 4 or offset & 3:
            value = 0  # 4.2.2.2: registers are accessed 32 bits at a time, aligned
        else:
            value = self._read_register(offset)
        T.virtio_mmio_read.on and T.virtio_mmio_read(self.section_id, offset, size, value)
        return value

    def _read_register(self, offset: int) -> int:
        s = self.state
        queue = self._selected()
        if offset == registers.MAGIC_VALUE:
            return MAGIC
        if offset == registers.VERSION_REGISTER:
            return VERSION
        if offset == registers.DEVICE_ID:
            return self.device.device_id
        if offset == registers.VENDOR_ID:
            return VENDOR
        if offset == registers.DEVICE_FEATURES:
            return self._offered >> 32 * s.device_features_sel & _U32 if s.device_features_sel < 2 else 0
        if offset == registers.QUEUE_NUM_MAX:
            return queue.max_size if queue else 0  # 0: there is no such queue
        if offset == registers.QUEUE_READY:
            return int(queue.ready) if queue else 0
        if offset == registers.INTERRUPT_STATUS:
            return self._interrupt_status
        if offset == registers.STATUS:
            return s.status
        if registers.SHM_LEN_LOW <= offset <= registers.SHM_BASE_HIGH:
            return _U32  # a region of length -1: there is none
        return s.config_generation if offset == registers.CONFIG_GENERATION else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A register; what makes no sense is ignored and traced."""
        value &= (1 << 8 * size) - 1
        T.virtio_mmio_write.on and T.virtio_mmio_write(self.section_id, offset, size, value)
        if offset >= registers.CONFIG:
            at = offset - registers.CONFIG
            if at + size <= len(self.device.configuration()):
                self.device.write_configuration(at, value.to_bytes(size, "little"))
            return
        if size != 4 or offset & 3:
            self._ignored(offset, value, "not a 32-bit access")
            return
        s = self.state
        if offset == registers.DEVICE_FEATURES_SEL:
            s.device_features_sel = value
        elif offset == registers.DRIVER_FEATURES_SEL:
            s.driver_features_sel = value
        elif offset == registers.DRIVER_FEATURES:
            self._write_features(value)
        elif offset == registers.QUEUE_SEL:
            s.queue_sel = value
        elif offset == registers.QUEUE_NUM or offset in _ADDRESSES:
            self._configure_queue(offset, value)
        elif offset == registers.QUEUE_READY:
            self._write_ready(value)
        elif offset == registers.QUEUE_NOTIFY:
            if value < len(self.device.queues):
                self._doorbell(value)
            else:
                self._ignored(offset, value, "no such queue")
        elif offset == registers.INTERRUPT_ACK:
            lib.pv_interrupt_acknowledge(self.interrupt, value)
        elif offset == registers.STATUS:
            self._write_status(value)
        elif offset != registers.SHM_SEL:
            self._ignored(offset, value, "no register to write")

    def _ignored(self, offset: int, value: int, reason: str) -> None:
        T.virtio_mmio_ignored.on and T.virtio_mmio_ignored(self.section_id, offset, value, reason)

    # -- negotiation ----------------------------------------------------------------------------

    def _write_features(self, value: int) -> None:
        s = self.state
        # 3.1.1: between DRIVER and FEATURES_OK; no new features afterwards.
        if s.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER or s.driver_features_sel > 1:
            self._ignored(registers.DRIVER_FEATURES, value, "not the time for features, or there are none there")
            return
        shift = 32 * s.driver_features_sel
        s.driver_features = s.driver_features & ~(_U32 << shift) | value << shift

    def _write_status(self, value: int) -> None:
        """2.1 and 3.1.1: bits are added in order, never taken back; 0 resets."""
        s = self.state
        if value == 0:
            self.reset()
            return
        if s.status & FAILED or s.status & ~DEVICE_NEEDS_RESET & ~value:
            self._ignored(registers.STATUS, value, "only a reset takes a bit back or ends FAILED")
            return
        if value & FAILED:
            self._set_status(s.status | FAILED)
            self.device.halt()
            return
        for bit in STATUS_ORDER:
            if not value & bit:
                break
            if s.status & bit:
                continue
            if bit == FEATURES_OK and not self._accept_features():
                break  # 2.2.2: the driver reads status back and sees that it is not set
            self._set_status(s.status | bit)
            if bit == DRIVER_OK and not s.status & DEVICE_NEEDS_RESET:
                self.device.activate()

    def _set_status(self, status: int) -> None:
        self.state.status = status
        T.virtio_mmio_status.on and T.virtio_mmio_status(self.section_id, status)

    def _features_fit(self, features: int) -> bool:
        # 6.1: a device may refuse to go on without VERSION_1, and a modern-only one has to.
        return bool(features & F_VERSION_1) and not features & ~self._offered and self.device.acceptable(features)

    def _accept_features(self) -> bool:
        if not self._features_fit(self.state.driver_features):
            return False
        self.device.negotiated = self.state.driver_features
        return True

    # -- queues ---------------------------------------------------------------------------------

    def _selected(self) -> VirtQueue | None:
        index = self.state.queue_sel
        return self.device.queues[index] if index < len(self.device.queues) else None

    def _configurable(self) -> bool:
        return self.state.status & (FEATURES_OK | DEVICE_NEEDS_RESET | FAILED) == FEATURES_OK

    def _configure_queue(self, offset: int, value: int) -> None:
        queue = self._selected()
        # 4.2.2.2: not while the queue is ready; 3.1.1: queues come after FEATURES_OK.
        if queue is None or queue.ready or not self._configurable():
            self._ignored(offset, value, "no such queue, or not the time to configure it")
            return
        if offset == registers.QUEUE_NUM:
            queue.size = min(value, 0xFFFF)  # too large either way: QueueReady will say so
            return
        field, shift = _ADDRESSES[offset]
        setattr(queue, field, getattr(queue, field) & ~(_U32 << shift) | value << shift)

    def _write_ready(self, value: int) -> None:
        queue = self._selected()
        if queue is None or not self._configurable():
            self._ignored(registers.QUEUE_READY, value, "no such queue, or not the time to start it")
            return
        if bool(value & 1) == queue.ready:
            return
        try:
            # 4.2.2.2 wants queues started before DRIVER_OK, but a driver may do it, and stop them, at any time.
            with self.device.paused():
                if value & 1:
                    queue.start(self.device.negotiated)
                else:
                    queue.stop()
        except NeedsReset as problem:
            self.device.fail(str(problem))

    # -- reset and state ------------------------------------------------------------------------

    def reset(self) -> None:
        """2.4: everything at once, and no interrupt is left pending."""
        with self.lock:
            self.device.reset()
            super().reset()

    def state_replaced(self) -> None:
        """The interrupt follows; after a load the controller behind the line is another one."""
        lib.pv_interrupt_set(self.interrupt, self.state.interrupt_status)

    def save(self) -> dict[str, Any]:
        """Transport, queues and device. Nothing may be in flight."""
        with self.lock:
            self.state.interrupt_status = self._interrupt_status
            return {
                **super().save(),
                "queues": [msgspec.to_builtins(queue.save()) for queue in self.device.queues],
                "device": self.device.save_state(),
            }

    def prepare_load(self, state: dict[str, Any]) -> Callable[[], None]:
        """As :meth:`Device.prepare_load`; once it is applied, :meth:`kick`."""
        rest = dict(state) if isinstance(state, dict) else state
        parts: dict[str, object] = {}
        for name in ("queues", "device"):
            if isinstance(rest, dict):
                if name not in rest:
                    raise SectionError(self.section_id, name, "missing")
                parts[name] = rest.pop(name)
        decoded = decode_state(self.section_id, MmioState, rest)
        accepted = bool(decoded.status & FEATURES_OK)
        if accepted and not self._features_fit(decoded.driver_features):
            raise SectionError(self.section_id, "driver_features", f"{decoded.driver_features:#x} is not offered here")
        queues = self._decode_queues(parts["queues"], accepted)
        apply_device = self.device.decode(f"{self.section_id}/device", parts["device"])
        features = decoded.driver_features if accepted else 0

        def apply() -> None:
            with self.lock:
                self.device.reset()
                self.device.negotiated = features
                for queue, queue_state in zip(self.device.queues, queues, strict=True):
                    queue.load(queue_state, features)
                apply_device()
                self.state = decoded
                if decoded.status & (DRIVER_OK | DEVICE_NEEDS_RESET | FAILED) == DRIVER_OK:
                    self.device.activate()
                self.state_replaced()

        return apply

    def _decode_queues(self, data: object, accepted: bool) -> tuple[QueueState, ...]:
        try:
            states = msgspec.convert(data, tuple[QueueState, ...])
        except msgspec.ValidationError as error:
            raise SectionError(self.section_id, "queues", str(error)) from None
        if len(states) != len(self.device.queues):
            raise SectionError(
                self.section_id, "queues", f"{len(states)} queues, the device has {len(self.device.queues)}"
            )
        for queue, state in zip(self.device.queues, states, strict=True):
            problem = queue.problem(state)
            if problem is None and state.ready and not accepted:
                problem = "ready before FEATURES_OK"
            if problem is not None:
                raise SectionError(self.section_id, f"queues[{queue.index}]", problem)
        return states
