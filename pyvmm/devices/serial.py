"""16550A UART.

Source: National Semiconductor PC16550D data sheet (June 1995), section 8 "Registers": 8.1 line control, 8.3 line
status, 8.4 FIFO control, 8.5 interrupt identification, 8.6 interrupt enable, 8.7 modem control, 8.8 modem status;
8.9 scratchpad; 8.10 FIFO interrupt mode. The names of bits below are the data sheet's.

Differences from the chip, all of which follow from a line without a bit time:

- A byte is sent the moment it is written: THRE and TEMT are always set. The THRE *interrupt* follows the data
  sheet: pending when THR becomes empty or when ETBEI is turned on, cleared by the IIR read that reports it.
- The character time-out interrupt needs no four character times: whatever is in the receive FIFO below the
  trigger level is timed out at once. The line stays high until the FIFO is empty.
- Input from the host never overruns: :meth:`Serial.receive` takes what fits and ``on_room`` says when to go on.
  Only loopback can overrun.
- The divisor, word length, parity and break are kept and have no effect; PE, FE and BI never occur.
- INTR reaches the interrupt line only while OUT2 is on, as PC boards wire it; loopback turns the OUT2 pin off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta

from pyvmm.devices.device import IrqLine, NoPortHint, Output, PortHint
from pyvmm.devices.irq import IrqOutput
from pyvmm.devices.serial_registers import (
    DIVISOR_HIGH,
    DIVISOR_LOW,
    FCR,
    FCR_ENABLE,
    FCR_RESET_RX,
    IER,
    IER_EDSSI,
    IER_ELSI,
    IER_ERBFI,
    IER_ETBEI,
    IIR,
    IIR_FIFOS,
    IIR_LINE_STATUS,
    IIR_MODEM_STATUS,
    IIR_NONE,
    IIR_RECEIVED,
    IIR_THRE,
    IIR_TIMEOUT,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_DR,
    LSR_OE,
    LSR_TEMT,
    LSR_THRE,
    MCR,
    MCR_LOOP,
    MCR_OUT2,
    MSR,
    MSR_CTS,
    MSR_DCD,
    MSR_DCTS,
    MSR_DDCD,
    MSR_DDSR,
    MSR_DSR,
    MSR_RI,
    MSR_TERI,
    RBR,
    SCR,
    TABLE,
    THR,
)
from pyvmm.devices.state import Byte, DeviceState, Nibble, StatefulDevice, Word
from pyvmm.registers import Register
from pyvmm.trace import trace_group

T = trace_group("devices")

FIFO_DEPTH = 16

TRIGGER_LEVELS: tuple[Literal[1, 4, 8, 14], ...] = (1, 4, 8, 14)
_MODEM_LINES = MSR_CTS | MSR_DSR | MSR_DCD  # somebody is always there and ready


class SerialState(DeviceState):
    """The registers; ``rx`` holds received bytes, oldest first (one at most while the FIFOs are off)."""

    ier: Nibble = 0
    lcr: Byte = 0
    mcr: Annotated[int, Meta(ge=0, le=0x1F)] = 0
    msr_delta: Nibble = 0
    scr: Byte = 0
    divisor: Word = 12
    fifos: bool = False
    trigger: Literal[1, 4, 8, 14] = 1
    overrun: bool = False
    thre_pending: bool = False
    rx: Annotated[bytes, Meta(max_length=FIFO_DEPTH)] = b""

    def problem(self) -> tuple[str, str] | None:
        """The FIFO's content must fit."""
        if len(self.rx) > 1 and not self.fifos:
            return "rx", f"{len(self.rx)} bytes while the FIFOs are off"
        return None


class Serial(StatefulDevice[SerialState]):
    """One UART: eight byte registers, an interrupt line, output to and input from the host."""

    section_id = "serial"
    registers = TABLE

    def __init__(
        self,
        output: Output,
        irq: IrqLine | None = None,
        hint: PortHint | None = None,
        on_room: Callable[[], None] | None = None,
        section_id: str = "serial",
    ) -> None:
        super().__init__(SerialState)
        self.section_id = section_id
        self.on_room = on_room
        self._output = output
        self._irq = IrqOutput(irq)
        self._hint: PortHint = hint if hint is not None else NoPortHint()
        self._sink_on = False
        self._latch: int | None = None
        self._host_waits = False
        self._update()

    # -- the host's side

    def receive(self, data: bytes) -> int:
        """Bytes arriving from the host; returns how many of them were taken.

        If not all were, ``on_room`` is called once the guest has emptied the receiver.
        """
        with self.lock:
            s = self.state
            room = 0 if s.mcr & MCR_LOOP else (FIFO_DEPTH if s.fifos else 1) - len(s.rx)
            taken = min(room, len(data))
            T.serial_receive.on and T.serial_receive(len(data), taken)
            self._host_waits = taken < len(data)
            if taken:
                s.rx += bytes(data[:taken])
                self._update()
            return taken

    def output_from_sink(self, data: bytes) -> None:
        """Bytes that the native loop (or KVM's coalesced ring) took as THR writes, in order.

        They were written under the hint, so they are output whatever DLAB and loopback say by now.
        """
        if not data:
            return
        with self.lock:
            self._transmit(data)

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """One register; reading may have the side effects of the data sheet."""
        value = self._read(offset)
        T.serial_read.on and T.serial_read(offset, value)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """One register."""
        value &= 0xFF
        T.serial_write.on and T.serial_write(offset, value)
        s = self.state
        if offset == THR:
            if s.lcr & LCR_DLAB:
                s.divisor = s.divisor & 0xFF00 | value
            elif s.mcr & MCR_LOOP:
                self._loop_back(value)
            else:
                self._transmit(value.to_bytes(1, "little"))
        elif offset == IER:
            if s.lcr & LCR_DLAB:
                s.divisor = s.divisor & 0x00FF | value << 8
            else:
                self._write_ier(value & 0x0F)
        elif offset == FCR:
            self._write_fcr(value)
        elif offset == LCR:
            s.lcr = value
            self._update()
        elif offset == MCR:
            self._write_mcr(value & 0x1F)
        elif offset == SCR:
            s.scr = value
        # LSR is for factory tests only (8.3) and MSR read-only: writes have no effect.

    def register_at(self, offset: int, *, write: bool) -> Register | None:
        """DLAB puts the divisor in the place of the first two."""
        if offset < 2 and self.state.lcr & LCR_DLAB:
            return DIVISOR_HIGH if offset else DIVISOR_LOW
        return super().register_at(offset, write=write)

    def _read(self, offset: int) -> int:
        s = self.state
        if offset == LSR:
            value = self._line_status()
            if s.overrun:
                s.overrun = False
                self._update()
            return value
        if offset == RBR:
            return s.divisor & 0xFF if s.lcr & LCR_DLAB else self._read_rbr()
        if offset == IIR:
            return self._read_iir()
        if offset == IER:
            return s.divisor >> 8 if s.lcr & LCR_DLAB else s.ier
        if offset == LCR:
            return s.lcr
        if offset == MCR:
            return s.mcr
        if offset == MSR:
            value = self._modem_lines() | s.msr_delta
            s.msr_delta = 0
            self._update()
            return value
        return s.scr if offset == SCR else 0xFF

    def _read_rbr(self) -> int:
        s = self.state
        if not s.rx:
            return 0
        value = s.rx[0]
        s.rx = s.rx[1:]
        self._update()
        self._say_room()
        return value

    def _read_iir(self) -> int:
        s = self.state
        identity = self._interrupt()
        if identity == IIR_THRE:  # 8.5, table II: reading IIR, if it is the source, resets it
            s.thre_pending = False
            self._update()
        return identity | (IIR_FIFOS if s.fifos else 0)

    def _write_ier(self, value: int) -> None:
        s = self.state
        if not value & IER_ETBEI:
            s.thre_pending = False
        elif not s.ier & IER_ETBEI:
            s.thre_pending = True  # THR is empty, so enabling its interrupt raises it (Linux tests for this)
        s.ier = value
        self._update()

    def _write_fcr(self, value: int) -> None:
        s = self.state
        enable = bool(value & FCR_ENABLE)
        if enable != s.fifos or (enable and value & FCR_RESET_RX):
            s.rx = b""
        s.fifos = enable
        # 8.4: the other bits are only programmed while bit 0 is written as one.
        s.trigger = TRIGGER_LEVELS[value >> 6] if enable else 1
        self._update()
        self._say_room()

    def _write_mcr(self, value: int) -> None:
        s = self.state
        before = self._modem_lines()
        s.mcr = value
        after = self._modem_lines()
        s.msr_delta |= (before ^ after) >> 4 & (MSR_DCTS | MSR_DDSR | MSR_DDCD)
        if before & ~after & MSR_RI:  # only RI's trailing edge counts
            s.msr_delta |= MSR_TERI
        self._update()
        self._say_room()

    def _transmit(self, data: bytes) -> None:
        s = self.state
        if not s.ier & IER_ETBEI:
            self._output(data)
            return
        # THR is full for an instant: the line falls, so that an edge-triggered controller sees it rise again.
        s.thre_pending = False
        self._update()
        self._output(data)
        s.thre_pending = True
        self._update()

    def _loop_back(self, value: int) -> None:
        s = self.state
        if not s.fifos:
            s.overrun = s.overrun or bool(s.rx)
            s.rx = bytes((value,))  # 8.3: the character in RBR is destroyed
        elif len(s.rx) < FIFO_DEPTH:
            s.rx += bytes((value,))
        else:
            s.overrun = True  # 8.3: the one in the shift register is overwritten, the FIFO stays
        if s.ier & IER_ETBEI:
            s.thre_pending = True
        self._update()

    # -- what follows from the registers

    def state_replaced(self) -> None:
        """Drive the line anew; the host may send again."""
        self._update()
        self._irq.redrive(self._irq.level)
        self._say_room()

    def _line_status(self) -> int:
        s = self.state
        return LSR_THRE | LSR_TEMT | (LSR_DR if s.rx else 0) | (LSR_OE if s.overrun else 0)

    def _modem_lines(self) -> int:
        mcr = self.state.mcr
        if not mcr & MCR_LOOP:
            return _MODEM_LINES
        # 8.7: in loopback DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
        return (mcr & 0x01) << 5 | (mcr & 0x02) << 3 | (mcr & 0x04) << 4 | (mcr & 0x08) << 4

    def _interrupt(self) -> int:
        """IIR's low four bits: the pending, enabled interrupt of the highest priority (table II)."""
        s = self.state
        if s.ier & IER_ELSI and s.overrun:
            return IIR_LINE_STATUS
        if s.ier & IER_ERBFI and s.rx:
            return IIR_RECEIVED if not s.fifos or len(s.rx) >= s.trigger else IIR_TIMEOUT
        if s.ier & IER_ETBEI and s.thre_pending:
            return IIR_THRE
        if s.ier & IER_EDSSI and s.msr_delta:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update(self) -> None:
        """Interrupt line and hints follow the registers."""
        s = self.state
        level = s.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 and self._interrupt() != IIR_NONE
        if level != self._irq.level:
            T.serial_irq.on and T.serial_irq(level)
            self._irq.drive(level)
        sink = not (s.lcr & LCR_DLAB or s.mcr & MCR_LOOP or s.ier & IER_ETBEI)
        if sink != self._sink_on:
            self._sink_on = sink
            self._hint.set_sink(THR, sink)
        latch = None if s.overrun else self._line_status()
        if latch != self._latch:
            self._latch = latch
            self._hint.set_latch(LSR, latch)

    def _say_room(self) -> None:
        """Called last: ``on_room`` may call :meth:`receive` from here."""
        s = self.state
        if self._host_waits and not s.rx and not s.mcr & MCR_LOOP:
            self._host_waits = False
            if self.on_room is not None:
                self.on_room()
