"""MC146818: time as guests read and set it, flags, CMOS bytes, battery."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices.rtc import CENTURY, REG_A, REG_B, REG_C, REG_D, SHUTDOWN, Rtc, days_since_1970
from tests.unit.devices.fakes import FakeClock

SECOND = 10**9
FIELDS = (0x00, 0x02, 0x04, 0x07, 0x08, 0x09, CENTURY)


class Clock:
    """An RTC as a guest uses it."""

    def __init__(self, when: datetime = datetime(2024, 2, 29, 23, 58, 59, tzinfo=UTC)) -> None:
        self.host = FakeClock(int(when.timestamp()) * SECOND)
        self.device = Rtc(self.host)

    def __getitem__(self, index: int) -> int:
        self.device.write(0, 1, index)
        return self.device.read(1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.device.write(0, 1, index | 0x80)  # with NMI masked, as Linux does
        self.device.write(1, 1, value)

    def time(self) -> datetime:
        """As Linux's mc146818_get_time() decodes it (BCD, 24 hours)."""
        second, minute, hour, day, month, year, century = (int(f"{self[i]:x}") for i in FIELDS)
        return datetime(century * 100 + year, month, day, hour, minute, second, tzinfo=UTC)

    def set(self, when: datetime) -> None:
        """As Linux's mc146818_set_time() does it."""
        control = self[REG_B]
        self[REG_B] = control | 0x80
        select = self[REG_A]
        self[REG_A] = select | 0x70
        values = (when.second, when.minute, when.hour, when.day, when.month, when.year % 100, when.year // 100)
        for index, value in zip(FIELDS, values, strict=True):
            self[index] = int(str(value), 16)
        self[REG_B] = control
        self[REG_A] = select


def test_it_shows_the_hosts_utc() -> None:
    clock = Clock()
    assert clock.time() == datetime(2024, 2, 29, 23, 58, 59, tzinfo=UTC)
    clock.host.now += 61 * SECOND
    assert clock.time() == datetime(2024, 3, 1, 0, 0, 0, tzinfo=UTC)
    assert clock[0x06] == 6, "a Friday; Sunday is 1"


def test_power_on_registers() -> None:
    clock = Clock()
    assert [clock[r] for r in (REG_A, REG_B, REG_C, REG_D)] == [0x26, 0x02, 0x00, 0x80]
    assert clock.device.read(0, 1) == 0xFF


def test_binary_and_12_hour_modes() -> None:
    clock = Clock(datetime(2024, 2, 29, 23, 58, 59, tzinfo=UTC))
    clock[REG_B] = 0x06
    assert [clock[i] for i in FIELDS] == [59, 58, 23, 29, 2, 24, 20]
    clock[REG_B] = 0x00
    assert clock[0x04] == 0x91, "11 PM in BCD"
    clock.host.now += 3600 * SECOND
    assert clock[0x04] == 0x12, "midnight is 12 AM"
    clock[0x04] = 0x81  # 1 PM
    clock[REG_B] = 0x02
    assert clock[0x04] == 0x13


@settings(max_examples=80, deadline=None)
@given(when=st.datetimes(datetime(1970, 1, 1), datetime(2399, 12, 31)), later=st.integers(0, 10**8))
def test_a_time_that_was_set_runs_on(when: datetime, later: int) -> None:
    clock = Clock()
    when = when.replace(microsecond=0, tzinfo=UTC)
    clock.set(when)
    assert clock.time() == when
    clock.host.now += later * SECOND
    assert clock.time() == when + timedelta(seconds=later)


def test_set_stops_the_time_registers() -> None:
    clock = Clock()
    clock[REG_B] = 0x82
    before = clock.time()
    clock.host.now += 100 * SECOND
    assert clock.time() == before
    clock[REG_B] = 0x02
    assert clock.time() == before


def test_one_register_written_while_it_runs() -> None:
    clock = Clock()
    clock[0x02] = 0x15
    assert clock.time() == datetime(2024, 2, 29, 23, 15, 59, tzinfo=UTC)


def test_absurd_times_carry_over_and_do_not_raise() -> None:
    clock = Clock()
    for index in (*FIELDS, 0x06):
        clock[index] = 0xFF
        clock[index] = 0x00
    clock[REG_B] = 0x06
    for index in FIELDS:
        clock[index] = 0xFF
    assert all(0 <= clock[index] <= 0xFF for index in range(128))


@settings(deadline=None)
@given(days=st.integers(-700_000, 2_900_000))
def test_days_since_1970_is_the_calendars(days: int) -> None:
    date = datetime(1970, 1, 1) + timedelta(days=days)
    assert days_since_1970(date.year, date.month, date.day) == days
    assert days_since_1970(date.year, date.month + 12, date.day) == days_since_1970(date.year + 1, date.month, date.day)


def test_uip_comes_and_goes_with_the_clock() -> None:
    clock = Clock()
    second = clock.host.now
    seen = []
    for microseconds in (0, 500_000, 999_700, 999_800, 999_999, 1_000_000):
        clock.host.now = second + microseconds * 1000
        seen.append(bool(clock[REG_A] & 0x80))
    assert seen == [False, False, False, True, True, False]
    clock.host.now = second + 999_999_000
    clock[REG_B] = 0x82
    assert not clock[REG_A] & 0x80, "SET stops updates"


def test_flags_can_be_polled_and_reading_clears_them() -> None:
    clock = Clock()
    clock.host.now += SECOND
    assert clock[REG_C] == 0x50, "a second and periods of 1024 Hz have passed"
    assert clock[REG_C] == 0
    clock.host.now += SECOND // 1024 + 1
    assert clock[REG_C] == 0x40
    clock[REG_A] = 0x20  # periodic rate off
    clock[REG_B] = 0x12
    clock.host.now += SECOND
    assert clock[REG_C] == 0x90, "IRQF, since UIE is on"


def test_reset_keeps_battery_backed_bytes_and_drops_enables() -> None:
    clock = Clock()
    clock[SHUTDOWN] = 0x0A
    clock[REG_B] = 0x7A
    clock.set(datetime(2030, 1, 1, tzinfo=UTC))
    clock.device.reset()
    assert (clock[SHUTDOWN], clock[REG_B]) == (0x0A, 0x02)
    assert clock.time() == datetime(2030, 1, 1, tzinfo=UTC)


MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("low", "high", "kib_above_1m", "chunks_above_16m", "chunks_above_4g"),
    [
        (8 * MIB, 0, 7 * 1024, 0, 0),
        (64 * MIB, 0, 63 * 1024, 48 * 16, 0),
        (128 * MIB, 0, 0xFFFF, 112 * 16, 0),
        (3 * GIB, 5 * GIB, 0xFFFF, (3 * 1024 - 16) * 16, 5 * 1024 * 16),
        (0, 0, 0, 0, 0),
    ],
)
def test_memory_sizes(low: int, high: int, kib_above_1m: int, chunks_above_16m: int, chunks_above_4g: int) -> None:
    device = Rtc(FakeClock(), low_ram=low, high_ram=high, cpus=4)

    def cmos(index: int, size: int = 1) -> int:
        value = 0
        for i in range(size):
            device.write(0, 1, index + i)
            value |= device.read(1, 1) << 8 * i
        return value

    assert cmos(0x15, 2) == 640
    assert cmos(0x17, 2) == cmos(0x30, 2) == kib_above_1m
    assert cmos(0x34, 2) == chunks_above_16m
    assert cmos(0x5B, 3) == chunks_above_4g
    assert cmos(0x5F) == 3


def test_nvram_is_ram_and_the_read_only_registers_are_not() -> None:
    clock = Clock()
    for index in range(0x0E, 0x80):
        if index != CENTURY:
            clock[index] = index ^ 0x55
            assert clock[index] == index ^ 0x55
    clock[REG_D] = 0
    clock[REG_C] = 0xFF
    assert (clock[REG_D], clock[REG_C]) == (0x80, 0)
    for alarm in (0x01, 0x03, 0x05):
        clock[alarm] = 0x12
        assert clock[alarm] == 0x12


@pytest.mark.parametrize("host", [-5, 0, 1 << 100])
def test_an_odd_host_clock_does_no_harm(host: int) -> None:
    clock = Clock()
    clock.host.now = host
    assert all(0 <= clock[index] <= 0xFF for index in range(128))
    clock.device.load(clock.device.save())
