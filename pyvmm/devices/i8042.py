"""i8042 keyboard controller with nothing plugged in: reset, A20 and what a probing kernel asks.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller" (commands,
status bits); which of them matter: Linux drivers/input/serio/i8042.c.

Every command is answered at once, so that probing never runs into a time-out (0.5 s of polling each, many
times that where the guest kernel is emulated):

- AUX: the loop command (0xd3) answers without the "AUX data" status bit, as a controller without an AUX port
  does, and the AUX test (0xa9) reports a clock line stuck low. Linux gives up there.
- Keyboard: whatever is sent to it is answered by 0xfe with the time-out status bit, as the controller does
  when no keyboard clocks the byte in; with an interrupt if enabled. atkbd gives up after its first commands.

Offsets are those from port 0x60: 0 is the data port, 4 status and command; 0x61 between is not this device's.
A20 is a flag that reads back; addresses never wrap, as on every machine of this century.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.device import IrqLine
from pyvmm.devices.irq import IrqOutput
from pyvmm.devices.state import Byte, DeviceState, StatefulDevice
from pyvmm.registers import Bit, Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

DATA = 0
STATUS = COMMAND = 4

STATUS_OUTPUT_FULL = 0x01
STATUS_SYSTEM = 0x04
STATUS_WAS_COMMAND = 0x08
STATUS_NOT_LOCKED = 0x10
STATUS_TIMEOUT = 0x40

CONFIG_KEYBOARD_IRQ = 0x01
CONFIG_SYSTEM = 0x04
CONFIG_KEYBOARD_OFF = 0x10
CONFIG_TRANSLATE = 0x40

READ_CONFIG = 0x20
WRITE_CONFIG = 0x60
AUX_TEST = 0xA9
SELF_TEST = 0xAA
KEYBOARD_TEST = 0xAB
KEYBOARD_DISABLE = 0xAD
KEYBOARD_ENABLE = 0xAE
READ_INPUT_PORT = 0xC0
READ_OUTPUT_PORT = 0xD0
WRITE_OUTPUT_PORT = 0xD1
WRITE_KEYBOARD_BUFFER = 0xD2
AUX_LOOP = 0xD3
WRITE_AUX = 0xD4
DISABLE_A20 = 0xDD
ENABLE_A20 = 0xDF
PULSE = 0xF0

TABLE = RegisterTable("i8042 keyboard controller", (
    Register(DATA, "DATA", "answers, and data of commands"),
    Register(STATUS, "STATUS", "status", access="r", bits=(
        Bit(STATUS_OUTPUT_FULL, "OUTPUT_FULL", "there is an answer"), Bit(STATUS_SYSTEM, "SYSTEM"),
        Bit(STATUS_WAS_COMMAND, "WAS_COMMAND"), Bit(STATUS_NOT_LOCKED, "NOT_LOCKED"), Bit(STATUS_TIMEOUT, "TIMEOUT"),
    )),
    Register(COMMAND, "COMMAND", "commands", access="w", values={
        READ_CONFIG: "read the configuration", WRITE_CONFIG: "write the configuration", AUX_TEST: "test the mouse port",
        SELF_TEST: "self-test", KEYBOARD_TEST: "test the keyboard port", KEYBOARD_DISABLE: "keyboard off",
        KEYBOARD_ENABLE: "keyboard on", READ_INPUT_PORT: "read the input port",
        READ_OUTPUT_PORT: "read the output port",
        WRITE_OUTPUT_PORT: "write the output port", WRITE_KEYBOARD_BUFFER: "write the keyboard's buffer",
        AUX_LOOP: "loop a byte through the mouse port", WRITE_AUX: "write to the mouse", DISABLE_A20: "A20 off",
        ENABLE_A20: "A20 on", PULSE | 0x0E: "pulse the reset line",
    }),
))  # fmt: skip

_TAKES_DATA = (WRITE_CONFIG, WRITE_OUTPUT_PORT, WRITE_KEYBOARD_BUFFER, AUX_LOOP, WRITE_AUX)
_ANSWERS = {
    AUX_TEST: 0x01,  # AUX clock stuck low
    SELF_TEST: 0x55,
    KEYBOARD_TEST: 0x00,  # the interface is fine (it is the keyboard that is not there)
    READ_INPUT_PORT: 0x80,  # keyboard not locked
}
_RESEND = 0xFE
_OUTPUT_PORT_NO_RESET = 0x01
_OUTPUT_PORT_A20 = 0x02


class I8042State(DeviceState):
    """``pending``: the command that waits for its data byte; ``output``: the one-byte output buffer."""

    config: Byte = CONFIG_KEYBOARD_IRQ | CONFIG_SYSTEM | CONFIG_TRANSLATE
    pending: Byte | None = None
    output: Byte | None = None
    timed_out: bool = False
    was_command: bool = False
    a20: bool = True


class I8042(StatefulDevice[I8042State]):
    """The controller. ``on_reset`` is called when the guest pulls the reset line."""

    section_id = "i8042"
    registers = TABLE

    def __init__(self, on_reset: Callable[[], None], irq: IrqLine | None = None) -> None:
        super().__init__(I8042State)
        self._on_reset = on_reset
        self._irq = IrqOutput(irq)

    def read(self, offset: int, size: int) -> int:
        """Data (empties the output buffer) or status."""
        s = self.state
        if offset == DATA:
            value = s.output or 0
            s.output = None
            s.timed_out = False
            self._update()
        elif offset == STATUS:
            value = STATUS_NOT_LOCKED | s.config & CONFIG_SYSTEM
            value |= STATUS_OUTPUT_FULL if s.output is not None else 0
            value |= STATUS_TIMEOUT if s.timed_out else 0
            value |= STATUS_WAS_COMMAND if s.was_command else 0
        else:
            return 0xFF
        T.i8042_read.on and T.i8042_read(offset, value)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Data for the pending command or the keyboard, or a command."""
        value &= 0xFF
        if offset == DATA:
            T.i8042_data.on and T.i8042_data(value)
            self.state.was_command = False
            self._data(value)
        elif offset == COMMAND:
            T.i8042_command.on and T.i8042_command(value)
            self.state.was_command = True
            self._command(value)

    def _command(self, command: int) -> None:
        s = self.state
        s.pending = command if command in _TAKES_DATA else None
        if command in _ANSWERS:
            if command == SELF_TEST:
                s.config |= CONFIG_SYSTEM
            self._answer(_ANSWERS[command])
        elif command == READ_CONFIG:
            self._answer(s.config)
        elif command == READ_OUTPUT_PORT:
            self._answer(_OUTPUT_PORT_NO_RESET | (_OUTPUT_PORT_A20 if s.a20 else 0))
        elif command == KEYBOARD_DISABLE:
            s.config |= CONFIG_KEYBOARD_OFF
        elif command == KEYBOARD_ENABLE:
            s.config &= ~CONFIG_KEYBOARD_OFF
        elif command in (DISABLE_A20, ENABLE_A20):
            s.a20 = command == ENABLE_A20
        elif command >= PULSE and not command & 0x01:  # pulse output port bit 0: the reset line
            self._reset_line(command)

    def _data(self, value: int) -> None:
        s = self.state
        command, s.pending = s.pending, None
        if command == WRITE_CONFIG:
            s.config = value
            self._update()
        elif command == WRITE_OUTPUT_PORT:
            s.a20 = bool(value & _OUTPUT_PORT_A20)
            if not value & _OUTPUT_PORT_NO_RESET:
                self._reset_line(value)
        elif command in (WRITE_KEYBOARD_BUFFER, AUX_LOOP):
            self._answer(value)
        else:  # to the keyboard, or to the AUX device: nobody clocks it in
            if command is None:
                s.config &= ~CONFIG_KEYBOARD_OFF
            self._answer(_RESEND, timed_out=True)

    def _answer(self, value: int, *, timed_out: bool = False) -> None:
        # A new answer replaces one that was not fetched: the buffer is one byte deep.
        s = self.state
        s.output = None
        self._update()
        s.output = value
        s.timed_out = timed_out
        self._update()

    def _reset_line(self, value: int) -> None:
        T.reset_request.on and T.reset_request(self.section_id, value)
        self._on_reset()

    def _update(self) -> None:
        s = self.state
        self._irq.drive(s.output is not None and bool(s.config & CONFIG_KEYBOARD_IRQ))

    def state_replaced(self) -> None:
        """Drive the line anew."""
        self._update()
        self._irq.redrive(self._irq.level)
