"""16550A: what the data sheet says, and what Linux's 8250 driver does to find out that it is one."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pyvmm.devices.bus import PORT_SPACE, Bus
from pyvmm.devices.serial import Serial
from pyvmm.devices.serial_registers import DLL, DLM, FCR, IER, IIR, LCR, LSR, MCR, MSR, RBR, SCR, THR
from tests.unit.devices.fakes import FakeHint, FakeLine

OUT2 = 0x08
LOOP = 0x10


class Uart:
    """A UART with everything around it watched."""

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.line = FakeLine()
        self.hint = FakeHint()
        self.rooms = 0
        self.device = Serial(self.out.append, self.line, self.hint, self._room)

    def _room(self) -> None:
        self.rooms += 1

    def __getitem__(self, offset: int) -> int:
        return self.device.read(offset, 1)

    def __setitem__(self, offset: int, value: int) -> None:
        self.device.write(offset, 1, value)

    @property
    def sent(self) -> bytes:
        return b"".join(self.out)


@pytest.fixture
def uart() -> Uart:
    return Uart()


def test_after_reset_the_transmitter_is_empty_and_nothing_is_pending(uart: Uart) -> None:
    assert [uart[r] for r in (IER, IIR, LCR, MCR, LSR, MSR)] == [0, 0x01, 0, 0, 0x60, 0xB0]
    assert not uart.line.level


def test_bytes_written_are_output_in_order(uart: Uart) -> None:
    for byte in b"hello":
        uart[THR] = byte
    assert uart.sent == b"hello"
    assert uart[LSR] == 0x60


def test_dlab_turns_the_first_two_registers_into_the_divisor(uart: Uart) -> None:
    uart[IER] = 0x05
    uart[LCR] = 0x83
    uart[DLL], uart[DLM] = 0x34, 0x12
    assert (uart[DLL], uart[DLM]) == (0x34, 0x12)
    uart[LCR] = 0x03
    assert uart[IER] == 0x05
    assert uart.sent == b""


def test_only_the_bits_that_exist_are_kept(uart: Uart) -> None:
    for register, kept in ((IER, 0x0F), (MCR, 0x1F), (SCR, 0xFF), (LCR, 0xFF)):
        uart[LCR] = 0
        uart[register] = 0xFF
        assert uart[register] == kept
    uart[LCR] = 0
    uart[LSR] = 0xFF
    uart[MSR] = 0xFF
    assert uart[LSR] == 0x60
    assert uart[SCR] == 0xFF


def test_linux_autoconfig_finds_a_16550a(uart: Uart) -> None:
    """drivers/tty/serial/8250/8250_port.c: autoconfig(), autoconfig_16550a() and size_fifo(), step by step."""
    uart[IER] = 0
    assert uart[IER] & 0x0F == 0
    uart[IER] = 0x0F
    assert uart[IER] & 0x0F == 0x0F
    uart[IER] = 0
    uart[MCR] = LOOP | 0x0A
    assert uart[MSR] & 0xF0 == 0x90
    uart[MCR] = 0
    uart[LCR] = 0xBF
    uart[FCR] = 0  # EFR of a 16650
    uart[LCR] = 0
    uart[FCR] = 0x01
    assert uart[IIR] & 0xC0 == 0xC0
    # No enhanced feature register, neither with DLAB nor in mode B.
    uart[LCR] = 0x80
    assert uart[FCR] != 0
    uart[LCR] = 0xBF
    assert uart[FCR] != 0
    # Not a NS SuperIO: EXCR1 does not follow MCR's loop bit.
    uart[LCR] = 0
    mcr = uart[MCR]
    uart[MCR] = mcr ^ LOOP
    uart[LCR] = 0xE0
    assert not (uart[2] ^ mcr) & LOOP
    uart[LCR] = 0
    uart[MCR] = mcr
    # Not an XScale: no UART unit enable bit.
    uart[IER] = 0x40
    assert uart[IER] & 0x40 == 0
    # size_fifo(): 256 bytes in loopback, count what stayed.
    uart[FCR] = 0x07
    uart[MCR] = LOOP
    uart[LCR] = 0x80
    uart[DLL], uart[DLM] = 1, 0
    uart[LCR] = 0x03
    for byte in range(256):
        uart[THR] = byte
    received = []
    while uart[LSR] & 0x01:
        received.append(uart[RBR])
    assert received == list(range(16))
    assert uart.sent == b""


def test_linux_thre_test_sees_the_interrupt_raised_again(uart: Uart) -> None:
    """serial8250_THRE_test(): without it Linux falls back to a polling timer."""
    uart[IER] = 0x02
    assert uart[IIR] == 0x02
    assert uart[IIR] == 0x01, "reading IIR cleared it"
    uart[IER] = 0
    uart[IER] = 0x02
    assert uart[IIR] & 0x01 == 0


def test_thre_interrupt_comes_back_with_each_byte_as_an_edge(uart: Uart) -> None:
    uart[MCR] = OUT2
    uart[IER] = 0x02
    assert uart.line.edges == 1
    uart[THR] = 0x41
    uart[THR] = 0x42
    assert (uart.line.edges, uart.line.level) == (3, True)
    assert uart[IIR] == 0x02
    assert not uart.line.level
    uart[THR] = 0x43
    assert uart.line.level


def test_an_iir_read_that_reports_another_source_leaves_thre_pending(uart: Uart) -> None:
    uart[IER] = 0x03
    uart.device.receive(b"x")
    assert uart[IIR] == 0x04
    uart[RBR]
    assert uart[IIR] == 0x02


def test_priorities(uart: Uart) -> None:
    uart[FCR] = 0x01
    uart[MCR] = LOOP
    uart[IER] = 0x0F
    for byte in range(17):
        uart[THR] = byte
    uart[MCR] = LOOP | 0x01  # DSR comes on
    seen = []
    for clear in (LSR, None, IIR, MSR):
        seen.append(uart[IIR] & 0x0F)
        if clear is None:
            uart[FCR] = 0x03
        elif clear != IIR:
            uart[clear]
    # Line status, received data, THRE (cleared by the read that reported it), modem status.
    assert seen == [0x06, 0x04, 0x02, 0x00]
    assert uart[IIR] & 0x0F == 0x01


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_level_and_timeout(uart: Uart, fcr: int, trigger: int) -> None:
    uart[FCR] = fcr
    uart[MCR] = OUT2
    uart[IER] = 0x01
    assert uart.device.receive(bytes(range(trigger))) == trigger
    assert uart[IIR] == 0xC4
    if trigger > 1:
        uart[RBR]
        assert uart[IIR] == 0xCC, "below the level what is left has timed out"
    while uart[LSR] & 1:
        assert uart.line.level
        uart[RBR]
    assert uart[IIR] == 0xC1
    assert not uart.line.level


def test_without_fifos_one_byte_is_held(uart: Uart) -> None:
    uart[IER] = 0x01
    assert uart.device.receive(b"abc") == 1
    assert uart.device.receive(b"bc") == 0
    assert (uart[LSR], uart[IIR], uart[RBR]) == (0x61, 0x04, 0x61)
    assert uart[LSR] == 0x60
    assert uart[RBR] == 0


def test_fcr_bits(uart: Uart) -> None:
    uart[FCR] = 0x41
    uart.device.receive(b"abcdef")
    uart[FCR] = 0x45  # transmitter reset: nothing to the receiver
    assert uart[RBR] == 0x61
    uart[FCR] = 0x43
    assert uart[LSR] == 0x60
    uart.device.receive(b"abcdef")
    uart[FCR] = 0xC2  # bit 0 clear: FIFOs off and emptied, trigger not programmed
    assert (uart[LSR], uart[IIR]) == (0x60, 0x01)
    uart.device.receive(b"z")
    uart[FCR] = 0x01  # switching clears, too
    assert uart[LSR] == 0x60


def test_overrun_in_loopback(uart: Uart) -> None:
    uart[MCR] = LOOP
    uart[THR] = 1
    uart[THR] = 2
    assert uart[LSR] == 0x63
    assert uart[LSR] == 0x61, "reading clears OE"
    assert uart[RBR] == 2, "without FIFOs the older byte is destroyed"
    uart[FCR] = 1
    for byte in range(20):
        uart[THR] = byte
    assert uart[LSR] & 0x02
    assert [uart[RBR] for _ in range(17)] == [*range(16), 0]


def test_modem_lines_in_loopback_and_their_changes(uart: Uart) -> None:
    uart[MCR] = LOOP
    uart[MSR]
    for mcr, msr in ((0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)):
        uart[MCR] = LOOP
        uart[MSR]
        uart[MCR] = LOOP | mcr
        assert uart[MSR] & 0xF0 == msr
    uart[MCR] = LOOP | 0x04
    uart[MSR]
    uart[MCR] = LOOP | 0x01
    assert uart[MSR] == 0x20 | 0x02 | 0x04, "DDSR, and TERI for RI's trailing edge"
    assert uart[MSR] == 0x20
    uart[MCR] = LOOP | 0x05
    assert uart[MSR] == 0x60, "RI's leading edge does not count"


def test_out2_gates_the_line_and_loopback_turns_it_off(uart: Uart) -> None:
    uart[IER] = 0x01
    uart.device.receive(b"x")
    assert (uart[IIR], uart.line.level) == (0x04, False)
    uart[MCR] = OUT2
    assert uart.line.level
    uart[MCR] = OUT2 | LOOP
    assert (uart[IIR], uart.line.level) == (0x04, False)
    uart[MCR] = OUT2
    assert uart.line.level


def test_flow_control_loses_nothing(uart: Uart) -> None:
    uart[FCR] = 0x01
    data = bytes(range(100))
    got = bytearray()
    left = data[uart.device.receive(data) :]
    assert (len(left), uart.rooms) == (84, 0)
    while uart[LSR] & 1:
        got.append(uart[RBR])
        if uart.rooms:
            uart.rooms = 0
            left = left[uart.device.receive(left) :]
    assert (bytes(got), left) == (data, b"")
    assert uart.rooms == 0, "nobody waits any more"


def test_on_room_may_receive_from_inside(uart: Uart) -> None:
    left = [b"bcd"]

    def refill() -> None:
        left[0] = left[0][uart.device.receive(left[0]) :]

    uart.device.on_room = refill
    assert uart.device.receive(b"abcd") == 1
    got = bytearray()
    while uart[LSR] & 1:
        got.append(uart[RBR])
    assert got == b"abcd"


def test_loopback_disconnects_the_host_and_says_when_it_is_back(uart: Uart) -> None:
    uart[MCR] = LOOP
    assert uart.device.receive(b"x") == 0
    uart[MCR] = 0
    assert uart.rooms == 1
    assert uart.device.receive(b"x") == 1


def test_reset_makes_room(uart: Uart) -> None:
    uart.device.receive(b"xy")
    uart.device.reset()
    assert (uart.rooms, uart[LSR]) == (1, 0x60)


def test_the_sink_is_on_exactly_while_a_thr_write_is_pure_output(uart: Uart) -> None:
    def sink() -> bool:
        return THR in uart.hint.sinks

    assert sink()
    for register, value in ((LCR, 0x80), (MCR, LOOP), (IER, 0x02)):
        uart[register] = value
        assert not sink(), register
        uart[register] = 0
        assert sink(), register
    uart[LCR] = 0x80
    uart.device.reset()
    assert sink()


def test_the_latch_is_what_lsr_would_read(uart: Uart) -> None:
    assert uart.hint.latches == {LSR: 0x60}
    uart.device.receive(b"x")
    assert uart.hint.latches == {LSR: 0x61}
    uart[MCR] = LOOP
    uart[THR] = 1  # overrun: now reading LSR has a side effect
    assert uart.hint.latches == {}
    assert uart[LSR] == 0x63
    assert uart.hint.latches == {LSR: 0x61}
    uart[RBR]
    assert uart.hint.latches == {LSR: 0x60}


def test_collected_bytes_are_output_as_they_are(uart: Uart) -> None:
    uart[LCR] = 0x80  # set after the bytes were collected
    uart.device.output_from_sink(b"boot\n")
    uart.device.output_from_sink(b"")
    assert uart.out == [b"boot\n"]


def test_collected_bytes_raise_the_thre_interrupt_if_it_is_on(uart: Uart) -> None:
    uart[MCR] = OUT2
    uart[IER] = 0x02
    assert uart[IIR] == 0x02
    assert uart.line.edges == 1
    uart.device.output_from_sink(b"ab")
    assert (uart.line.edges, uart.line.level) == (2, True)
    assert uart[IIR] == 0x02


def test_state_moves_with_fifo_and_pending_interrupt(uart: Uart) -> None:
    uart[FCR] = 0x81
    uart[MCR] = OUT2
    uart[IER] = 0x03
    uart.device.receive(b"moved")
    other = Uart()
    other.device.load(uart.device.save())
    assert other.line.level
    assert other.hint.sinks == set()
    assert other.hint.latches == {LSR: 0x61}
    assert bytes(other[RBR] for _ in range(5)) == b"moved"
    assert other[IIR] == 0xC2


@pytest.mark.parametrize("offset", [8, 9, 1000])
def test_offsets_outside_do_nothing(uart: Uart, offset: int) -> None:
    before: dict[str, Any] = uart.device.save()
    uart[offset] = 0xFF
    assert uart[offset] == 0xFF
    assert uart.device.save() == before


def test_host_and_guest_threads_lose_and_reorder_nothing(uart: Uart) -> None:
    """The guest polls through a bus; the host thread sends whenever it hears of room."""
    bus, room = Bus("io", PORT_SPACE), threading.Event()
    bus.claim(0x3F8, 8, uart.device)
    bus.write(0x3F8 + FCR, 1, 0x81)
    uart.device.on_room = room.set
    data = bytes(range(256)) * 8
    deadline = time.monotonic() + 60

    def host() -> None:
        left = data
        while left:
            room.clear()
            left = left[uart.device.receive(left) :]
            if left:
                assert room.wait(60)

    sender = threading.Thread(target=host)
    sender.start()
    got = bytearray()
    while len(got) < len(data) and time.monotonic() < deadline:
        if bus.read(0x3F8 + LSR, 1) & 1:
            got.append(bus.read(0x3F8 + RBR, 1))
    sender.join(60)
    assert bytes(got) == data
