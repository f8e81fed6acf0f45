"""i8042: the questions Linux asks, all answered at once, and every way to reset."""

from __future__ import annotations

import pytest

from pyvmm.devices.i8042 import I8042
from tests.unit.devices.fakes import FakeLine

OBF, AUX_DATA, TIMEOUT = 0x01, 0x20, 0x40


class Controller:
    """A controller as a driver sees it."""

    def __init__(self) -> None:
        self.line = FakeLine()
        self.resets = 0
        self.device = I8042(self._reset, self.line)

    def _reset(self) -> None:
        self.resets += 1

    @property
    def status(self) -> int:
        return self.device.read(4, 1)

    @property
    def data(self) -> int:
        return self.device.read(0, 1)

    def command(self, command: int, *data: int) -> None:
        self.device.write(4, 1, command)
        for byte in data:
            self.device.write(0, 1, byte)

    def ask(self, command: int, *data: int) -> int:
        """Linux's i8042_command(): the answer must be there without waiting."""
        self.command(command, *data)
        assert self.status & OBF, f"command {command:#x} would run into the time-out"
        return self.data


@pytest.fixture
def controller() -> Controller:
    return Controller()


def test_linux_flushes_nothing_and_finds_a_controller(controller: Controller) -> None:
    """i8042_controller_check(), i8042_controller_init(), i8042_controller_selftest()."""
    assert controller.status & (OBF | 0x02) == 0
    first, second = controller.ask(0x20), controller.ask(0x20)
    assert first == second
    assert controller.status & 0x10, "not locked"
    assert first & 0x40, "translation is on, or Linux talks to the keyboard directly"
    controller.command(0x60, (first | 0x10) & ~0x01)
    assert controller.ask(0x20) == (first | 0x10) & ~0x01
    assert controller.ask(0xAA) == 0x55


def test_linux_sees_no_aux_port(controller: Controller) -> None:
    """i8042_check_aux(): the loop answers without the AUX bit, and the test says an error."""
    controller.command(0xD3, 0x5A)
    assert controller.status & (OBF | AUX_DATA) == OBF, "auxerr, at once"
    assert controller.ask(0xA9) not in (0x00, 0xFA, 0xFF)
    assert not controller.status & OBF, "the loop's answer was replaced, not queued"


@pytest.mark.parametrize("byte", [0xFF, 0xF2, 0xED, 0xF4])
def test_a_keyboard_command_is_refused_at_once_with_an_interrupt(controller: Controller, byte: int) -> None:
    controller.command(0x60, 0x41)
    controller.device.write(0, 1, byte)
    assert controller.line.driven == [True]
    assert controller.status & (OBF | TIMEOUT) == OBF | TIMEOUT
    assert controller.data == 0xFE
    assert controller.status & (OBF | TIMEOUT) == 0
    assert controller.line.driven == [True, False]
    # A second one is a second edge.
    controller.device.write(0, 1, byte)
    controller.device.write(0, 1, byte)
    assert controller.line.edges == 3


def test_no_interrupt_unless_enabled(controller: Controller) -> None:
    controller.command(0x60, 0x40)
    controller.device.write(0, 1, 0xF2)
    assert controller.line.driven == []
    controller.command(0x60, 0x41)
    assert controller.line.driven == [True]


def test_aux_device_commands_are_refused(controller: Controller) -> None:
    controller.command(0xD4, 0xF2)
    assert controller.status & TIMEOUT
    assert controller.data == 0xFE


def test_status_tells_command_from_data(controller: Controller) -> None:
    controller.command(0xAE)
    assert controller.status & 0x08
    controller.device.write(0, 1, 0xF4)
    assert not controller.status & 0x08


def test_keyboard_interface(controller: Controller) -> None:
    assert controller.ask(0xAB) == 0
    controller.command(0xAD)
    assert controller.ask(0x20) & 0x10
    controller.command(0xAE)
    assert not controller.ask(0x20) & 0x10
    assert controller.ask(0xD2, 0x1C) == 0x1C
    assert controller.ask(0xC0) & 0x80


@pytest.mark.parametrize("command", [0xFE, 0xFC, 0xF0, 0xFA])
def test_pulsing_bit_0_resets(controller: Controller, command: int) -> None:
    controller.command(command)
    assert controller.resets == 1


@pytest.mark.parametrize("command", [0xFF, 0xF1, 0xFD, 0xA7, 0xA8])
def test_other_commands_do_not(controller: Controller, command: int) -> None:
    controller.command(command)
    assert controller.resets == 0
    assert not controller.status & OBF


def test_output_port_reset_and_a20(controller: Controller) -> None:
    assert controller.ask(0xD0) == 0x03
    controller.command(0xD1, 0xDD)
    assert (controller.ask(0xD0), controller.resets) == (0x01, 0)
    controller.command(0xDF)
    assert controller.ask(0xD0) == 0x03
    controller.command(0xDD)
    assert controller.ask(0xD0) == 0x01
    controller.command(0xD1, 0x02)
    assert controller.resets == 1


def test_a_new_command_forgets_the_one_that_waited_for_data(controller: Controller) -> None:
    controller.command(0xD1)
    controller.command(0xAA)
    assert controller.data == 0x55
    controller.device.write(0, 1, 0x00)
    assert controller.resets == 0


def test_the_port_between_is_not_ours(controller: Controller) -> None:
    before = controller.device.save()
    for offset in (1, 2, 3):
        controller.device.write(offset, 1, 0xFE)
        assert controller.device.read(offset, 1) == 0xFF
    assert controller.device.save() == before
