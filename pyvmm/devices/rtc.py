"""MC146818 real-time clock with its CMOS RAM, at an index port (offset 0) and a data port (offset 1).

Source: Motorola MC146818 data sheet (time registers, A to D); the meaning of the CMOS bytes is the one that
SeaBIOS reads and QEMU writes (memory sizes at 0x15-0x18, 0x30-0x35, 0x5b-0x5d, number of CPUs at 0x5f).

The time is the host's clock plus an offset that the guest may set; nothing ticks, so nothing can be stuck:

- UIP is set in the last 244 us of each second, computed from the clock.
- Register C's UF and PF say whether a second or a period has passed since C was last read, so a guest can poll
  them. The alarm registers are kept, but AF is never set, and **the interrupt line is never raised**: pyvmm's
  guests tick by the local APIC or the PIT, and a timer thread for this would buy nothing.
- The divider bits of register A are kept and stop nothing; bit SET of register B stops the time as it should.
- RESET keeps time and CMOS RAM (there is a battery; byte 0x0f says what the firmware does after a reset) and
  clears the interrupt enables, as the chip's pin does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import Byte, DeviceState, StatefulDevice
from pyvmm.registers import Bit, Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D
SHUTDOWN = 0x0F
EQUIPMENT = 0x14
CENTURY = 0x32
_TIME_REGISTERS = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)

A_UIP = 0x80
B_SET, B_PIE, B_AIE, B_UIE, B_SQWE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02
C_IRQF, C_PF, C_UF = 0x80, 0x40, 0x10
D_VALID = 0x80
HOUR_PM = 0x80

_TIME_NAMES = {
    SECONDS: "seconds", MINUTES: "minutes", HOURS: "hours", WEEKDAY: "day of the week", DAY: "day of the month",
    MONTH: "month", YEAR: "year", CENTURY: "century",
}  # fmt: skip
TABLE = RegisterTable("MC146818 clock", (
    Register(0, "INDEX", "selects a register", access="w"),
    Register(1, "DATA", "the selected register"),
))  # fmt: skip
CMOS = RegisterTable("CMOS", (
    *(Register(at, text.upper().split()[-1], f"time: {text}") for at, text in _TIME_NAMES.items()
      if at not in (WEEKDAY, DAY)),
    Register(WEEKDAY, "WEEKDAY", "time: day of the week"), Register(DAY, "DAY", "time: day of the month"),
    Register(REG_A, "A", "rate and update", bits=(Bit(A_UIP, "UIP", "the time changes just now"), Bit(0x0F, "RATE"))),
    Register(REG_B, "B", "mode and interrupts", bits=(
        Bit(B_SET, "SET", "the time stands still"), Bit(B_PIE, "PIE"), Bit(B_AIE, "AIE"), Bit(B_UIE, "UIE"),
        Bit(B_SQWE, "SQWE"), Bit(B_BINARY, "BINARY"), Bit(B_24H, "24H"),
    )),
    Register(REG_C, "C", "interrupt flags, cleared by reading", bits=(
        Bit(C_IRQF, "IRQF"), Bit(C_PF, "PF"), Bit(C_UF, "UF"),
    )),
    Register(REG_D, "D", "valid RAM and time", bits=(Bit(D_VALID, "VRT"),)),
    Register(SHUTDOWN, "SHUTDOWN", "what firmware does after a reset"),
    Register(EQUIPMENT, "EQUIPMENT", "what the board has"),
))  # fmt: skip

_SECOND = 1_000_000_000
_UIP_NS = 244_000  # from UIP's rise to the update
_CLOCK_MAX = 1 << 62
_MIB = 1 << 20


class RtcState(DeviceState):
    """``ram``: the CMOS bytes (time registers: what they were when SET stopped them; A to D: unused)."""

    index: Annotated[int, Meta(ge=0, le=0x7F)] = 0
    reg_a: Annotated[int, Meta(ge=0, le=0x7F)] = 0x26
    reg_b: Byte = B_24H
    offset_s: Annotated[int, Meta(ge=-(1 << 40), le=1 << 40)] = 0
    polled_ns: Annotated[int, Meta(ge=0, le=_CLOCK_MAX)] = 0
    ram: Annotated[bytes, Meta(min_length=128, max_length=128)] = bytes(128)


class Rtc(StatefulDevice[RtcState]):
    """The clock. ``clock`` gives the host's time in nanoseconds since 1970 (UTC)."""

    section_id = "rtc"
    registers = TABLE

    def __init__(
        self,
        clock: Callable[[], int] = time.time_ns,
        *,
        low_ram: int = 0,
        high_ram: int = 0,
        cpus: int = 1,
    ) -> None:
        """``low_ram``/``high_ram``: bytes of guest RAM below and above 4 GiB, for the CMOS bytes."""
        super().__init__(RtcState)
        self._clock = clock
        self.state.polled_ns = self._now()
        ram = bytearray(128)
        ram[EQUIPMENT] = 0x02  # an FPU, no floppy
        for address, size, value in _memory_bytes(low_ram, high_ram):
            ram[address : address + size] = value.to_bytes(size, "little")
        ram[0x5F] = min(max(cpus - 1, 0), 255)
        self.state.ram = bytes(ram)

    def reset(self) -> None:
        """RESET pin: interrupts off, flags cleared; time and CMOS RAM stay."""
        with self.lock:
            s = self.state
            s.index = 0
            s.reg_b &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
            s.polled_ns = self._now()

    def read(self, offset: int, size: int) -> int:
        """The register that the index port selected; the index port itself is write-only."""
        if offset != 1:
            return 0xFF
        index = self.state.index
        value = self._read_register(index)
        T.rtc_read.on and T.rtc_read(index, value)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register (bit 7, the NMI mask, is ignored) or write it."""
        value &= 0xFF
        if offset == 0:
            self.state.index = value & 0x7F
        elif offset == 1:
            index = self.state.index
            T.rtc_write.on and T.rtc_write(index, value)
            self._write_register(index, value)

    def register_at(self, offset: int, *, write: bool) -> Register | None:
        """Behind the data port is what the index port selected; most of it is plain CMOS RAM."""
        if offset != 1:
            return super().register_at(offset, write=write)
        index = self.state.index
        return CMOS.find(index, write=write) or Register(1, f"CMOS[{index:#04x}]", "battery-backed RAM")

    def _read_register(self, index: int) -> int:
        s = self.state
        if index == REG_A:
            updating = not s.reg_b & B_SET and self._now() % _SECOND >= _SECOND - _UIP_NS
            return s.reg_a | (A_UIP if updating else 0)
        if index == REG_B:
            return s.reg_b
        if index == REG_C:
            return self._poll_flags()
        if index == REG_D:
            return D_VALID
        if index in _TIME_REGISTERS and not s.reg_b & B_SET:
            return self._time_registers()[index]
        return s.ram[index]

    def _write_register(self, index: int, value: int) -> None:
        s = self.state
        if index == REG_A:
            s.reg_a = value & 0x7F
        elif index == REG_B:
            if value & B_SET and not s.reg_b & B_SET:
                self._store(self._time_registers())
            stopped = s.reg_b & B_SET
            s.reg_b = value
            if stopped and not value & B_SET:
                self._adopt_time()
        elif index in (REG_C, REG_D):
            pass  # read-only
        elif index in _TIME_REGISTERS and not s.reg_b & B_SET:
            self._store(self._time_registers() | {index: value})
            self._adopt_time()
        else:
            self._store({index: value})

    def _store(self, values: dict[int, int]) -> None:
        ram = bytearray(self.state.ram)
        for index, value in values.items():
            ram[index] = value
        self.state.ram = bytes(ram)

    def _now(self) -> int:
        return min(max(self._clock(), 0), _CLOCK_MAX)

    def _poll_flags(self) -> int:
        """Register C. Reading it clears the flags, that is: starts a new wait."""
        s = self.state
        now, last = self._now(), s.polled_ns
        s.polled_ns = now
        flags = 0
        if now // _SECOND != last // _SECOND and not s.reg_b & B_SET:
            flags |= C_UF
        rate = s.reg_a & 0x0F
        if rate:
            # Rates 1 and 2 are those of 8 and 9 with the 32.768 kHz time base (data sheet, table 5).
            hertz = 32768 >> ((rate + 7 if rate < 3 else rate) - 1)
            if now * hertz // _SECOND != last * hertz // _SECOND:
                flags |= C_PF
        # UF/UIE and PF/PIE are the same bits, so IRQF (would an interrupt be pending?) is one test.
        return flags | (C_IRQF if flags & s.reg_b else 0)

    # -- time

    def _time_registers(self) -> dict[int, int]:
        now = time.gmtime(self._now() // _SECOND + self.state.offset_s)
        hour = now.tm_hour
        if self.state.reg_b & B_24H:
            hours = self._encode(hour)
        else:
            hours = self._encode((hour + 11) % 12 + 1) | (HOUR_PM if hour >= 12 else 0)
        return {
            SECONDS: self._encode(min(now.tm_sec, 59)),
            MINUTES: self._encode(now.tm_min),
            HOURS: hours,
            WEEKDAY: self._encode((now.tm_wday + 1) % 7 + 1),  # 1 is Sunday
            DAY: self._encode(now.tm_mday),
            MONTH: self._encode(now.tm_mon),
            YEAR: self._encode(now.tm_year % 100),
            CENTURY: self._encode(now.tm_year // 100 % 100),
        }

    def _adopt_time(self) -> None:
        """The guest has set the time registers: move the offset. Absurd values carry over, as in mktime."""
        ram = self.state.ram
        hours = ram[HOURS]
        if self.state.reg_b & B_24H:
            hour = self._decode(hours)
        else:
            hour = self._decode(hours & ~HOUR_PM) % 12 + (12 if hours & HOUR_PM else 0)
        days = days_since_1970(
            self._decode(ram[CENTURY]) * 100 + self._decode(ram[YEAR]),
            self._decode(ram[MONTH]),
            self._decode(ram[DAY]),
        )
        minute = self._decode(ram[MINUTES])
        seconds = ((days * 24 + hour) * 60 + minute) * 60 + self._decode(ram[SECONDS])
        self.state.offset_s = seconds - self._now() // _SECOND

    def _encode(self, value: int) -> int:
        return value if self.state.reg_b & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.state.reg_b & B_BINARY else (value >> 4) * 10 + (value & 0x0F)


def days_since_1970(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of the Gregorian calendar; month and day may be out of their ranges."""
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    # Years counted from March, so that the leap day is the last one (Richards' algorithm).
    year, month = (year - 1, month + 9) if month < 3 else (year, month - 3)
    leap_days = year // 4 - year // 100 + year // 400
    return 365 * year + leap_days + (153 * month + 2) // 5 + day - 1 - 719468


def _memory_bytes(low_ram: int, high_ram: int) -> list[tuple[int, int, int]]:
    """(CMOS address, bytes, value) of each memory size."""
    extended_kib = min(max(low_ram - _MIB, 0) >> 10, 0xFFFF)
    above_16m = min(max(low_ram - 16 * _MIB, 0) >> 16, 0xFFFF)
    return [
        (0x15, 2, 640),  # base memory, KiB
        (0x17, 2, extended_kib),  # above 1 MiB, KiB
        (0x30, 2, extended_kib),
        (0x34, 2, above_16m),  # above 16 MiB and below 4 GiB, 64 KiB
        (0x5B, 3, min(high_ram >> 16, 0xFFFFFF)),  # above 4 GiB, 64 KiB
    ]
