"""A small virtio device, and a transport on a bus in front of it as a driver sees it."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from pyvmm.devices.bus import MMIO_SPACE, Bus
from pyvmm.devices.state import DeviceState
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.device import F_VERSION_1, VirtioDevice
from pyvmm.virtio.mmio import WINDOW, VirtioMmio
from pyvmm.virtio.mmio_registers import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, VirtQueue
from tests.unit.virtio.fake_driver import FakeDriver, FakeSignal, Ram, driver_on

F_ODD, F_NEEDS_ODD = 1 << 0, 1 << 1


class EchoState(DeviceState):
    """The configuration space."""

    space: Annotated[bytes, Meta(min_length=10, max_length=10)] = b"configured"


class Echo(VirtioDevice):
    """Two queues; a chain comes back with its readable bytes copied to its writable ones."""

    name = "echo"
    device_id = 42
    features = F_ODD | F_NEEDS_ODD
    queue_sizes = (8, 2)
    state_type = EchoState

    def __init__(self, table: Any) -> None:
        super().__init__(table)
        self.events: list[str] = []

    def acceptable(self, features: int) -> bool:
        return bool(features & F_ODD) or not features & F_NEEDS_ODD

    def configuration(self) -> bytes:
        return bytes(self.state.space)

    def write_configuration(self, offset: int, data: bytes) -> None:
        space = self.state.space
        self.state.space = space[:offset] + data + space[offset + len(data) :]

    def serve_queue(self, queue: VirtQueue) -> bool:
        chain = queue.new_chain()
        for _ in range(2):
            if not queue.pop(chain):
                return queue.enable_kicks()
            queue.push(chain, chain.write(0, chain.read(0, chain.readable)))
        return True

    def activated(self) -> None:
        self.events.append("activated")

    def deactivated(self) -> None:
        self.events.append("deactivated")


class Bench:
    """A transport on a bus, as a driver sees it."""

    def __init__(self, memory: Ram) -> None:
        self.signal = FakeSignal()
        self.rung: list[int] = []
        self.device = Echo(memory.table)
        self.transport = VirtioMmio(self.device, self.signal.fd, self.rung.append)
        self.bus = Bus("memory", MMIO_SPACE)
        self.bus.claim(0, WINDOW, self.transport)

    def get(self, offset: int) -> int:
        return self.bus.read(offset, 4)

    def put(self, offset: int, value: int) -> None:
        self.bus.write(offset, 4, value)

    def status(self, *bits: int) -> int:
        """Add status bits one after the other; what status says then."""
        for bit in bits:
            self.put(registers.STATUS, self.get(registers.STATUS) | bit)
        return self.get(registers.STATUS)

    def features(self, features: int) -> None:
        for select in (0, 1):
            self.put(registers.DRIVER_FEATURES_SEL, select)
            self.put(registers.DRIVER_FEATURES, features >> 32 * select & 0xFFFFFFFF)

    def queue(self, index: int, driver: FakeDriver) -> None:
        self.put(registers.QUEUE_SEL, index)
        self.put(registers.QUEUE_NUM, driver.size)
        for register, gpa in (
            (registers.QUEUE_DESC_LOW, driver.descriptors), (registers.QUEUE_DRIVER_LOW, driver.available),
            (registers.QUEUE_DEVICE_LOW, driver.used),
        ):  # fmt: skip
            self.put(register, gpa & 0xFFFFFFFF)
            self.put(register + 4, gpa >> 32)
        self.put(registers.QUEUE_READY, 1)

    def bring_up(self, memory: Ram, features: int = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC) -> FakeDriver:
        """Initialize by the book (3.1.1); the driver of queue 0."""
        assert self.status(ACKNOWLEDGE, DRIVER) == ACKNOWLEDGE | DRIVER
        self.features(features)
        assert self.status(FEATURES_OK) & FEATURES_OK
        driver = driver_on(memory.memory, 8, event_idx=bool(features & F_EVENT_IDX))
        self.queue(0, driver)
        assert self.get(registers.QUEUE_READY) == 1
        assert self.status(DRIVER_OK) == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        return driver

    def serve(self) -> None:
        """What the machine does with rung doorbells."""
        while self.rung:
            self.transport.serve(self.rung.pop(0))
