"""What test images of the kvm-unit-tests kind rely on: fw_cfg, the shutdown port, pc-testdev."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices import testdev
from pyvmm.devices.bus import MMIO_SPACE, PORT_SPACE, Bus
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.devices.shutdown_port import ShutdownPort
from pyvmm.devices.testdev import LINE_COUNT, TestDevice
from tests.unit.devices.fakes import FakeLine, nothing


class Ports:
    """fw_cfg on a bus, read as test images read it."""

    def __init__(self) -> None:
        self.bus = Bus("io", PORT_SPACE)
        self.bus.claim(0x510, 2, FwCfg(ram=(5 << 30) + 4096, cpus=3))

    def item(self, selector: int, size: int) -> bytes:
        self.bus.write(0x510, 2, selector)
        return bytes(self.bus.read(0x511, 1) for _ in range(size))


@pytest.mark.parametrize(
    ("selector", "value"),
    [
        (0x00, b"QEMU"),
        (0x01, b"\x01\0\0\0"),  # bit 1, DMA, is clear
        (0x03, ((5 << 30) + 4096).to_bytes(8, "little")),
        (0x05, b"\x03\0"),
        (0x0F, b"\x03\0"),
        (0x11, bytes(4)),
        (0x19, bytes(4)),
        (0xFFFF, bytes(9)),
    ],
)
def test_fw_cfg_items_and_zeros_behind_their_end(selector: int, value: bytes) -> None:
    assert Ports().item(selector, len(value) + 3) == value + bytes(3)


def test_selecting_rewinds_and_nothing_can_be_written() -> None:
    ports = Ports()
    assert ports.item(0, 2) == b"QE"
    ports.bus.write(0x511, 1, 0x41)
    ports.bus.write(0x510, 1, 5)  # one byte does not select
    assert bytes(ports.bus.read(0x511, 1) for _ in range(2)) == b"MU"
    assert ports.item(0, 4) == b"QEMU"


@pytest.mark.parametrize(
    ("written", "ends"), [("Shutdown", 1), ("ShutShutdown", 1), ("shutdown", 0), ("Shutdow", 0), ("SShutdown", 1),
                          ("ShutdownShutdown", 2)]
)  # fmt: skip
def test_the_shutdown_port_wants_the_word_letter_by_letter(written: str, ends: int) -> None:
    ended: list[None] = []
    port = ShutdownPort(lambda: ended.append(None))
    for letter in written.encode():
        port.write(0, 1, letter)
    assert len(ended) == ends


class Rig:
    """The test device as the builder wires it."""

    def __init__(self) -> None:
        self.lines = [FakeLine() for _ in range(LINE_COUNT)]
        self.flushed: list[int] = []
        self.device = TestDevice(self.lines, self.flushed.append)
        self.ports, self.mmio = Bus("io", PORT_SPACE), Bus("memory", MMIO_SPACE)
        self.ports.claim(0xE0, 12, self.device, testdev.LATCH)
        self.ports.claim(0x2000, 24, self.device, testdev.LINES)
        self.mmio.claim(0xFF000000, testdev.MEMORY_SIZE, self.device, testdev.MEMORY)


def test_the_latch_in_every_width_and_through_its_byte_window() -> None:
    rig = Rig()
    rig.ports.write(0xE0, 4, 0x12345678)
    assert [rig.ports.read(0xE0 + i, 1) for i in range(4)] == [0x78, 0x56, 0x34, 0x12]
    assert rig.ports.read(0xE2, 2) == 0x1234
    assert rig.ports.read(0xE8, 4) == 0x12345678
    rig.ports.write(0xE9, 1, 0xAA)
    rig.ports.write(0xE2, 2, 0xBEEF)
    assert rig.ports.read(0xE0, 4) == 0xBEEFAA78
    assert rig.ports.read(0xE4, 4) == 0


def test_a_flush_is_32_bits_wide_and_names_a_page() -> None:
    rig = Rig()
    rig.ports.write(0xE4, 1, 0x55)
    rig.ports.write(0xE4, 2, 0x5555)
    assert rig.flushed == []
    rig.ports.write(0xE4, 4, 0x12345678)
    assert rig.flushed == [0x12345000]


def test_lines_follow_what_is_written_and_only_those_used_are_driven_anew() -> None:
    rig = Rig()
    rig.ports.write(0x2000 + 5, 1, 1)
    rig.ports.write(0x2000 + 23, 1, 0x80)
    rig.ports.write(0x2000 + 7, 2, 0x0101)  # no such width
    assert [n for n, line in enumerate(rig.lines) if line.level] == [5, 23]
    saved = rig.device.save()
    rig.ports.write(0x2000 + 5, 1, 0)
    assert rig.lines[5].driven == [True, False]
    rig.device.load(saved)
    assert rig.lines[5].driven == [True, False, True]
    assert rig.lines[23].driven == [True, True]
    rig.device.reset()
    assert [line.level for line in rig.lines] == [False] * LINE_COUNT
    assert rig.lines[4].driven == [], "another device's line"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.sampled_from([1, 2, 4, 8]), st.binary(min_size=8, max_size=8))))
def test_the_memory_is_memory_and_moves_with_the_state(writes: list[tuple[int, int, bytes]]) -> None:
    rig, model = Rig(), bytearray(testdev.MEMORY_SIZE)
    for offset, wanted, data in writes:
        size = min(wanted, testdev.MEMORY_SIZE - offset)
        rig.mmio.write(0xFF000000 + offset, size, int.from_bytes(data[:size], "little"))
        model[offset : offset + size] = data[:size]
    copy = TestDevice(rig.lines, nothing)
    copy.load(rig.device.save())
    assert copy.state.memory == bytes(model)
    for offset, wanted, _ in writes:
        size = min(wanted, testdev.MEMORY_SIZE - offset)
        assert rig.mmio.read(0xFF000000 + offset, size) == int.from_bytes(model[offset : offset + size], "little")
