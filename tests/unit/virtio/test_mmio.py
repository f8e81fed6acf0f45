"""The transport: registers, negotiation by the book, interrupts."""

from __future__ import annotations

import pytest

from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.device import F_VERSION_1
from pyvmm.virtio.mmio_registers import ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK
from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, NeedsReset, VirtQueue
from tests.unit.virtio.fake_device import F_NEEDS_ODD, F_ODD, Bench
from tests.unit.virtio.fake_driver import DATA_REGION, REGIONS, Buffer, FakeDriver, driver_on, ram


def test_a_driver_that_goes_by_the_book_gets_its_answer() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        assert bench.get(registers.MAGIC_VALUE).to_bytes(4, "little") == b"virt"
        assert (bench.get(registers.VERSION_REGISTER), bench.get(registers.DEVICE_ID)) == (2, 42)
        offered = []
        for select in (0, 1, 2, 0xFFFFFFFF):
            bench.put(registers.DEVICE_FEATURES_SEL, select)
            offered.append(bench.get(registers.DEVICE_FEATURES))
        assert offered == [F_INDIRECT_DESC | F_EVENT_IDX | 3, F_VERSION_1 >> 32, 0, 0]
        driver = bench.bring_up(memory)
        assert bench.device.events == ["activated"]
        data = DATA_REGION[0]
        memory.memory.write(data, b"hello")
        driver.want_interrupts(True)
        head = driver.offer([Buffer(data, 5, False), Buffer(data + 100, 9, True)])
        bench.put(registers.QUEUE_NOTIFY, 0)
        assert bench.rung == [0] and not bench.signal.pulses()  # served by whom the doorbell wakes, not by the vCPU
        bench.serve()
        assert driver.collect() == [(head, 5)]
        assert memory.memory.read(data + 100, 5) == b"hello"
        assert bench.get(registers.INTERRUPT_STATUS) == 1 and bench.signal.pulses() == 1
        bench.put(registers.INTERRUPT_ACK, 1)
        assert bench.get(registers.INTERRUPT_STATUS) == 0 and not bench.signal.pulses()


def test_more_than_a_device_does_at_once_rings_again() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        driver = bench.bring_up(memory)
        heads = [driver.offer([Buffer(DATA_REGION[0], 1, True)]) for _ in range(5)]
        bench.transport.serve(0)
        assert bench.rung == [0]
        bench.serve()
        assert [head for head, _ in driver.collect()] == heads


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (F_VERSION_1, True),
        (F_VERSION_1 | F_EVENT_IDX, True),
        (0, False),
        (F_EVENT_IDX | F_INDIRECT_DESC, False),
        (F_VERSION_1 | 1 << 5, False),
        (F_VERSION_1 | 1 << 63, False),
        (F_VERSION_1 | F_NEEDS_ODD, False),
        (F_VERSION_1 | F_NEEDS_ODD | F_ODD, True),
    ],
)
def test_features_ok_stays_off_for_what_was_not_offered_or_does_not_fit(features: int, accepted: bool) -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        bench.status(ACKNOWLEDGE, DRIVER)
        bench.features(features)
        assert bool(bench.status(FEATURES_OK) & FEATURES_OK) == accepted
        assert bench.device.negotiated == (features if accepted else 0)
        bench.status(DRIVER_OK)
        assert bench.device.active == accepted  # never without FEATURES_OK
        bench.features(F_VERSION_1 | F_ODD)
        assert bench.device.negotiated == (features if accepted else 0)  # too late, or not accepted yet


def test_status_bits_come_in_order_and_are_not_taken_back() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        assert bench.status(DRIVER) == 0
        assert bench.status(DRIVER_OK | FEATURES_OK) == 0
        bench.features(F_VERSION_1)  # before DRIVER: not heard
        assert bench.status(ACKNOWLEDGE | DRIVER) == 3
        assert bench.status(FEATURES_OK) == 3
        bench.features(F_VERSION_1)
        assert bench.status(FEATURES_OK | DRIVER_OK) == 15
        bench.put(registers.STATUS, 3)
        assert bench.get(registers.STATUS) == 15
        bench.put(registers.STATUS, 15 | DEVICE_NEEDS_RESET)
        assert bench.get(registers.STATUS) == 15
        assert bench.status(FAILED) == 15 | FAILED
        assert bench.device.events == ["activated", "deactivated"]
        bench.put(registers.STATUS, 0)
        assert bench.get(registers.STATUS) == 0 and bench.device.negotiated == 0


def test_queues_are_set_up_after_features_ok_and_before_they_are_ready() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        driver = driver_on(memory.memory, 8)
        bench.status(ACKNOWLEDGE, DRIVER)
        bench.queue(0, driver)
        assert bench.device.queues[0].size == 0 and not bench.get(registers.QUEUE_READY)
        bench.features(F_VERSION_1)
        bench.status(FEATURES_OK)
        bench.queue(0, driver)
        assert bench.get(registers.QUEUE_READY) == 1
        bench.put(registers.QUEUE_NUM, 4)
        bench.put(registers.QUEUE_DESC_LOW, 0)
        assert (bench.device.queues[0].size, bench.device.queues[0].descriptors) == (8, driver.descriptors)
        for select, largest in ((0, 8), (1, 2), (2, 0), (0xFFFFFFFF, 0)):
            bench.put(registers.QUEUE_SEL, select)
            assert bench.get(registers.QUEUE_NUM_MAX) == largest
        assert bench.get(registers.QUEUE_READY) == 0
        bench.put(registers.QUEUE_SEL, 0)
        bench.put(registers.QUEUE_READY, 0)
        assert bench.get(registers.QUEUE_READY) == 0


def test_nothing_is_used_before_driver_ok() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        bench.status(ACKNOWLEDGE, DRIVER)
        bench.features(F_VERSION_1)
        bench.status(FEATURES_OK)
        driver = driver_on(memory.memory, 8)
        bench.queue(0, driver)
        driver.offer([Buffer(DATA_REGION[0], 1, True)])
        bench.put(registers.QUEUE_NOTIFY, 0)
        bench.serve()
        bench.transport.configuration_changed()
        assert driver.collect() == [] and not bench.signal.pulses()


def test_a_broken_ring_needs_a_reset_and_gets_over_it() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        driver = bench.bring_up(memory)
        driver.make_available(8)
        bench.put(registers.QUEUE_NOTIFY, 0)
        bench.serve()
        assert bench.get(registers.STATUS) == 15 | DEVICE_NEEDS_RESET
        assert bench.get(registers.INTERRUPT_STATUS) == 2  # 2.1.2: a configuration change notification
        assert bench.device.events == ["activated", "deactivated"]
        bench.put(registers.QUEUE_NOTIFY, 0)
        bench.serve()
        assert bench.signal.pulses() == 1
        bench.put(registers.STATUS, 0)
        assert (bench.get(registers.STATUS), bench.get(registers.INTERRUPT_STATUS), bench.signal.pulses()) == (0, 0, 0)
        driver = bench.bring_up(memory)
        driver.offer([Buffer(DATA_REGION[0], 1, True)])
        bench.transport.serve(0)
        assert len(driver.collect()) == 1


def test_a_queue_that_cannot_be_needs_a_reset_before_driver_ok_without_interrupt() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        bench.status(ACKNOWLEDGE, DRIVER)
        bench.features(F_VERSION_1)
        bench.status(FEATURES_OK)
        bench.queue(0, FakeDriver(memory.memory, 8, 0x10008, 0x12000, 0x13000))
        assert bench.get(registers.STATUS) == 11 | DEVICE_NEEDS_RESET and not bench.signal.pulses()
        assert bench.status(DRIVER_OK) == 15 | DEVICE_NEEDS_RESET and not bench.device.active


def test_an_edge_line_gets_an_edge_for_every_notification_and_for_what_an_ack_left() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        bench.bring_up(memory)
        bench.transport.used_buffer_notification()
        bench.transport.used_buffer_notification()
        bench.transport.configuration_changed()
        assert bench.signal.pulses() == 3
        bench.put(registers.INTERRUPT_ACK, 1)
        assert bench.signal.pulses() == 1 and bench.get(registers.INTERRUPT_STATUS) == 2
        bench.put(registers.INTERRUPT_ACK, 2)
        assert bench.signal.pulses() == 0


def test_configuration_space_is_bytes_with_a_generation() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        assert bench.bus.read(registers.CONFIG + 1, 1) == ord("o")
        assert bench.bus.read(registers.CONFIG, 8).to_bytes(8, "little") == b"configur"
        assert bench.bus.read(registers.CONFIG + 8, 4) == int.from_bytes(b"ed", "little")
        bench.bus.write(registers.CONFIG, 2, int.from_bytes(b"CO", "little"))
        bench.bus.write(registers.CONFIG + 8, 4, 0)  # not all of it is there
        assert bench.device.state.space == b"COnfigured"
        before = bench.get(registers.CONFIG_GENERATION)
        bench.transport.configuration_changed()
        assert bench.get(registers.CONFIG_GENERATION) == before + 1
        assert bench.get(registers.SHM_LEN_LOW) == 0xFFFFFFFF


def test_a_device_whose_host_side_fails_needs_a_reset() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        bench.bring_up(memory)

        def broken(queue: VirtQueue) -> bool:
            raise NeedsReset("the host's disk is gone")

        bench.device.serve_queue = broken  # type: ignore[method-assign]
        bench.transport.serve(0)
        assert bench.get(registers.STATUS) & DEVICE_NEEDS_RESET
