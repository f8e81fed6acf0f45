"""The entropy device."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.virtio import mmio
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.mmio import VirtioMmio
from pyvmm.virtio.mmio_registers import DEVICE_NEEDS_RESET
from pyvmm.virtio.rng import FILL_MAX, VirtioRng
from tests.unit.virtio.fake_device import Bench
from tests.unit.virtio.fake_driver import DATA_REGION, REGIONS, Buffer, Ram, ram

DATA = DATA_REGION[0]


class RngBench(Bench):
    """The entropy device behind a transport; ``asked`` remembers what its source was asked for."""

    def __init__(self, memory: Ram, answer: Any = None) -> None:
        super().__init__(memory)
        self.asked: list[int] = []

        def source(size: int) -> bytes:
            self.asked.append(size)
            if answer is not None:
                return answer(size)  # type: ignore[no-any-return]
            return bytes(len(self.asked) for _ in range(size))

        rng = VirtioRng(memory.table, source)
        self.transport = VirtioMmio(rng, self.signal.fd, self.rung.append)
        self.bus.release(0)
        self.bus.claim(0, mmio.WINDOW, self.transport)


def test_buffers_are_filled_from_the_source() -> None:
    with ram(*REGIONS) as memory:
        bench = RngBench(memory)
        driver = bench.bring_up(memory)
        assert bench.get(registers.DEVICE_ID) == 4
        chains = [[Buffer(DATA, 3, True), Buffer(DATA + 8, 2, True)], [Buffer(DATA + 16, 4, True)]]
        heads = [driver.offer(chain) for chain in chains]
        bench.put(registers.QUEUE_NOTIFY, 0)
        bench.serve()
        assert driver.collect() == [(heads[0], 5), (heads[1], 4)]
        assert memory.memory.read(DATA, 21) == b"\1\1\1\0\0\0\0\0\1\1\0\0\0\0\0\0\2\2\2\2\0"
        assert bench.signal.pulses() == 1


def test_a_large_buffer_gets_a_bounded_part() -> None:
    with ram(*REGIONS) as memory:
        bench = RngBench(memory)
        driver = bench.bring_up(memory)
        head = driver.offer([Buffer(DATA, 0x4000, True)])
        bench.transport.serve(0)
        assert bench.asked == [FILL_MAX] and driver.collect() == [(head, FILL_MAX)]


@pytest.mark.parametrize("buffers", [[Buffer(DATA, 4, False)], [Buffer(DATA, 0, True)],
                                     [Buffer(DATA, 4, False), Buffer(DATA + 4, 4, True)]])  # fmt: skip
def test_a_buffer_entropy_cannot_go_into_needs_a_reset(buffers: list[Buffer]) -> None:
    with ram(*REGIONS) as memory:
        bench = RngBench(memory)
        driver = bench.bring_up(memory)
        driver.offer(buffers)
        bench.transport.serve(0)
        assert bench.get(registers.STATUS) & DEVICE_NEEDS_RESET and bench.asked == []


def test_a_source_that_fails_needs_a_reset_and_one_that_lies_is_a_defect() -> None:
    def fail(size: int) -> bytes:
        raise OSError(5, "Input/output error")

    with ram(*REGIONS) as memory:
        bench = RngBench(memory, fail)
        driver = bench.bring_up(memory)
        driver.offer([Buffer(DATA, 4, True)])
        bench.transport.serve(0)
        assert bench.get(registers.STATUS) & DEVICE_NEEDS_RESET
        for wrong in (b"", b"12345"):
            bench = RngBench(memory, lambda size, wrong=wrong: wrong)
            driver = bench.bring_up(memory)
            driver.offer([Buffer(DATA, 4, True)])
            with pytest.raises(ValueError, match="asked for"):
                bench.transport.serve(0)


def test_the_hosts_generator_is_the_default() -> None:
    with ram(*REGIONS) as memory:
        bench = Bench(memory)
        bench.transport = VirtioMmio(VirtioRng(memory.table), bench.signal.fd, bench.rung.append)
        bench.bus.release(0)
        bench.bus.claim(0, mmio.WINDOW, bench.transport)
        driver = bench.bring_up(memory)
        driver.offer([Buffer(DATA, 32, True)])
        bench.transport.serve(0)
        assert driver.collect()[0][1] == 32 and memory.memory.read(DATA, 32) != bytes(32)
