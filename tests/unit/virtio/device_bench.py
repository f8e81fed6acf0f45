"""Any virtio device behind a transport, with a driver on each of its queues."""

from __future__ import annotations

from pyvmm.virtio import mmio
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.device import F_VERSION_1, VirtioDevice
from pyvmm.virtio.mmio import VirtioMmio
from pyvmm.virtio.mmio_registers import ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FEATURES_OK
from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC
from tests.unit.virtio.fake_device import Bench
from tests.unit.virtio.fake_driver import RING, FakeDriver, Ram

QUEUE_SIZE = 16


class DeviceBench(Bench):
    """``device`` is brought up, with the features it offers unless ``features`` says which, and all its queues."""

    def __init__(self, memory: Ram, device: VirtioDevice) -> None:
        super().__init__(memory)
        self.ram = memory
        self.served = device
        self.transport = VirtioMmio(device, self.signal.fd, self.rung.append)
        self.bus.release(0)
        self.bus.claim(0, mmio.WINDOW, self.transport)
        self.drivers: list[FakeDriver] = []

    def negotiate(self, features: int | None = None, queues: list[int] | None = None) -> None:
        """Initialize by the book; ``queues`` are set up, all of them unless given."""
        assert self.status(ACKNOWLEDGE, DRIVER) == ACKNOWLEDGE | DRIVER
        wanted = self.served.features if features is None else features
        self.features(wanted | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC)
        assert self.status(FEATURES_OK) & FEATURES_OK
        self.drivers = []
        for index in range(len(self.served.queues)):
            at = RING + 0x1000 * index
            self.ram.memory.write(at, bytes(0x1000))
            self.drivers.append(FakeDriver(self.ram.memory, QUEUE_SIZE, at, at + 0x400, at + 0x600, True))
            if queues is None or index in queues:
                self.queue(index, self.drivers[index])
        assert self.status(DRIVER_OK) & DRIVER_OK
        self.serve()

    def ring_bell(self, index: int) -> None:
        """The driver rings, the machine serves whatever was rung."""
        self.put(registers.QUEUE_NOTIFY, index)
        self.serve()

    def serve(self) -> None:
        """As the loop does: several rings of one bell are one."""
        while self.rung:
            for index in sorted(set(self.rung)):
                self.rung.remove(index)
                while index in self.rung:
                    self.rung.remove(index)
                self.transport.serve(index)

    @property
    def broken(self) -> bool:
        """Whether the device says that it needs a reset."""
        return bool(self.get(registers.STATUS) & DEVICE_NEEDS_RESET)
