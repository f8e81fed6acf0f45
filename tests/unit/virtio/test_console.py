"""The console device."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.console import CHAIN_MAX, RECEIVE, TRANSMIT, VirtioConsole
from pyvmm.virtio.mmio_registers import CONFIG
from tests.unit.virtio.device_bench import DeviceBench
from tests.unit.virtio.fake_driver import DATA_REGION, REGIONS, Buffer, Ram, ram

DATA = DATA_REGION[0]


class ConsoleBench(DeviceBench):
    """``said`` is what came out; it stops coming when ``limit`` bytes are there."""

    def __init__(self, memory: Ram) -> None:
        self.said = bytearray()
        self.limit = 1 << 30
        self.rooms = 0
        self.console = VirtioConsole(memory.table, self.said.extend, lambda: len(self.said) >= self.limit)
        self.console.on_room = self._on_room
        super().__init__(memory, self.console)

    def _on_room(self) -> None:
        self.rooms += 1

    def say(self, data: bytes, at: int = DATA) -> None:
        self.ram.memory.write(at, data)
        self.drivers[TRANSMIT].offer([Buffer(at, len(data), False)])
        self.ring_bell(TRANSMIT)


def test_output_arrives_in_order_and_its_buffers_come_back() -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.negotiate()
        assert bench.get(registers.DEVICE_ID) == 3
        for word in (b"one ", b"two ", b"three"):
            bench.say(word)
        assert bench.said == b"one two three"
        assert [written for _, written in bench.drivers[TRANSMIT].collect()] == [0, 0, 0]
        assert bench.signal.pulses() > 0


def test_a_full_host_leaves_output_with_the_driver_until_there_is_room() -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.negotiate()
        bench.limit = 5
        for i in range(4):
            bench.say(b"abc%d" % i, DATA + 16 * i)
        assert bench.said == b"abc0abc1" and len(bench.drivers[TRANSMIT].collect()) == 2
        bench.ring_bell(TRANSMIT)
        assert len(bench.said) == 8
        bench.limit = 1000
        bench.console.output_has_room()
        bench.serve()
        assert bench.said == b"abc0abc1abc2abc3" and len(bench.drivers[TRANSMIT].collect()) == 2


def test_input_goes_as_far_as_there_are_buffers_and_then_waits() -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        assert bench.console.receive(b"too early") == 0
        bench.negotiate()
        assert bench.console.receive(b"nothing offered") == 0
        driver = bench.drivers[RECEIVE]
        driver.offer([Buffer(DATA, 4, True)])
        driver.offer([Buffer(DATA + 4, 2, True), Buffer(DATA + 8, 3, True)])
        before = bench.rooms
        bench.ring_bell(RECEIVE)
        assert bench.rooms == before + 1
        assert bench.console.receive(b"0123456789") == 9
        assert [written for _, written in driver.collect()] == [4, 5]
        assert memory.memory.read(DATA, 11) == b"012345\0\x00678"
        driver.offer([Buffer(DATA, 100, True)])
        assert bench.console.receive(b"xyz") == 3 and driver.collect()[0][1] == 3


def test_input_waits_while_the_machine_is_paused() -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.negotiate()
        bench.drivers[RECEIVE].offer([Buffer(DATA, 100, True)])
        bench.transport.pause()
        before = memory.snapshot()
        bench.say(b"while paused", DATA + 200)
        memory.memory.write(DATA + 200, bytes(20))
        assert bench.console.receive(b"abc") == 0 and bench.said == b""
        assert memory.memory.read(DATA, 100) == before[DATA_REGION[0]][:100]
        rooms = bench.rooms
        bench.transport.resume()
        bench.serve()
        assert bench.rooms == rooms + 1 and len(bench.said) == 12
        assert bench.console.receive(b"abc") == 3


def test_an_emergency_write_needs_no_driver_and_is_bounded() -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.put(CONFIG + 8, ord("!"))
        bench.put(CONFIG + 4, ord("?"))  # max_nr_ports is not the driver's
        assert bench.said == b"!"
        bench.limit = 3
        for _ in range(10):
            bench.put(CONFIG + 8, ord("!"))
        assert bench.said == b"!!!"


def test_the_size_is_told_and_its_change_is_a_notification() -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.negotiate()
        assert struct.pack("<III", *(bench.get(CONFIG + 4 * i) for i in range(3))) == struct.pack("<HHII", 80, 25, 1, 0)
        generation = bench.get(registers.CONFIG_GENERATION)
        bench.signal.pulses()
        bench.console.resize(132, 50)
        assert bench.get(CONFIG) == 50 << 16 | 132
        assert bench.get(registers.CONFIG_GENERATION) == generation + 1 and bench.signal.pulses() == 1
        for wrong in ((-1, 2), (1, 0x10000)):
            with pytest.raises(ValueError, match="columns"):
                bench.console.resize(*wrong)


@pytest.mark.parametrize(
    ("queue", "buffers"),
    [(TRANSMIT, [Buffer(DATA, 4, True)]), (RECEIVE, [Buffer(DATA, 4, False)]), (RECEIVE, [Buffer(DATA, 0, True)]),
     (TRANSMIT, [Buffer(DATA, 1, False), Buffer(DATA, 1, True)])],
)  # fmt: skip
def test_buffers_of_the_wrong_kind_need_a_reset(queue: int, buffers: list[Buffer]) -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.negotiate()
        bench.drivers[queue].offer(buffers)
        if queue == RECEIVE:
            assert bench.console.receive(b"abc") == 0
        else:
            bench.ring_bell(queue)
        assert bench.broken and bench.said == b""


def test_a_chain_of_more_than_is_held_at_once_needs_a_reset() -> None:
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.negotiate()
        pieces = CHAIN_MAX // 0x8000 + 1
        bench.drivers[TRANSMIT].offer([Buffer(DATA, 0x8000, False)] * pieces, indirect_table=0x48000)
        bench.ring_bell(TRANSMIT)
        assert bench.broken and bench.said == b""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.integers(1, 30)), max_size=30), st.booleans())
def test_no_byte_of_input_is_lost_or_doubled(steps: list[bytes | int], save: bool) -> None:
    """Typed bytes and offered buffers in any order; perhaps saved and loaded on the way."""
    with ram(*REGIONS) as memory:
        bench = ConsoleBench(memory)
        bench.negotiate()
        typed, pending, got, outstanding = b"", b"", b"", {}
        for at, step in enumerate(steps):
            if isinstance(step, bytes):
                typed, pending = typed + step, pending + step
            elif bench.drivers[RECEIVE].free:
                gpa = DATA + 64 * at
                outstanding[bench.drivers[RECEIVE].offer([Buffer(gpa, step, True)])] = gpa
            taken = bench.console.receive(pending)
            pending = pending[taken:]
            for head, written in bench.drivers[RECEIVE].collect():
                got += memory.memory.read(outstanding.pop(head), written)
            assert got + pending == typed and (not pending or not outstanding)
            if save:
                bench.transport.load(bench.transport.save())
