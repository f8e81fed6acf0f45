"""Debug exit, debug console, POST, the reset registers, ACPI power management."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.boot import acpi as acpi_tables
from pyvmm.devices.acpi_pm import S5_SLEEP_TYPE, AcpiPm
from pyvmm.devices.bus import PORT_SPACE, Bus
from pyvmm.devices.debug_console import DebugConsole
from pyvmm.devices.debug_exit import DebugExit, debug_exit_status
from pyvmm.devices.post import PostPort
from pyvmm.devices.reset_control import ResetControl
from pyvmm.devices.system_port_a import SystemPortA
from pyvmm.errors import ConfigError
from tests.unit.devices.fakes import FakeHint, FakeLine, nothing

# -- debug exit


@pytest.mark.parametrize(("value", "status"), [(0, 1), (1, 3), (0x10, 33), (0x7F, 255), (0x80, 1), (0xFFFF, 255)])
def test_debug_exit_status(value: int, status: int) -> None:
    assert debug_exit_status(value) == status


@settings(deadline=None)
@given(st.integers(0, 0xFFFFFFFF))
def test_a_debug_exit_is_never_a_clean_end(value: int) -> None:
    assert 0 < debug_exit_status(value) <= 255


@pytest.mark.parametrize(("size", "seen"), [(1, 0x78), (2, 0x5678), (4, 0x12345678)])
def test_debug_exit_keeps_the_raw_value_as_wide_as_its_ports(size: int, seen: int) -> None:
    values: list[int] = []
    bus = Bus("io", PORT_SPACE)
    device = DebugExit(values.append, size)
    bus.claim(0xF4, size, device)
    assert bus.read(0xF4, 1) == 0
    bus.write(0xF4, 4, 0x12345678)
    assert values == [seen]
    assert device.state.value == seen


@pytest.mark.parametrize("size", [0, 3, 8, -1])
def test_debug_exit_of_an_odd_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="1, 2 or 4"):
        DebugExit(nothing, size)


# -- debug console and POST


def test_debug_console() -> None:
    out: list[bytes] = []
    hint = FakeHint()
    device = DebugConsole(out.append, hint)
    assert (hint.sinks, hint.latches) == ({0}, {0: 0xE9})
    assert device.read(0, 1) == 0xE9
    device.write(0, 1, 0x41)
    device.output_from_sink(b"BC")
    device.output_from_sink(b"")
    assert out == [b"A", b"BC"]


def test_post_keeps_the_last_code() -> None:
    hint = FakeHint()
    device = PostPort(hint)
    assert hint.sinks == {0}
    device.write(0, 1, 0x12)
    assert device.read(0, 1) == 0x12
    device.output_from_sink(b"\x01\x02\x03")
    assert device.read(0, 1) == 3
    device.output_from_sink(b"")
    assert device.read(0, 1) == 3


# -- resets


class Resets:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_port_92_resets_on_the_rising_edge() -> None:
    resets = Resets()
    device = SystemPortA(resets)
    assert device.read(0, 1) == 0x02
    device.write(0, 1, 0x00)
    assert (device.read(0, 1), resets.count) == (0x00, 0)
    device.write(0, 1, 0x03)
    device.write(0, 1, 0x03)
    assert (device.read(0, 1), resets.count) == (0x03, 1)
    device.write(0, 1, 0x02)
    device.write(0, 1, 0x01)
    assert resets.count == 2


def test_cf9_resets_on_rst_cpus_rising_edge() -> None:
    """Linux's BOOT_CF9_FORCE: 2 or 0xe first, then with bit 2."""
    resets = Resets()
    device = ResetControl(resets)
    device.write(0, 1, 0x02)
    assert (device.read(0, 1), resets.count) == (0x02, 0)
    device.write(0, 1, 0x06)
    device.write(0, 1, 0xFF)
    assert (device.read(0, 1), resets.count) == (0x0E, 1)
    device.reset()
    device.write(0, 1, 0x0E)
    assert resets.count == 2


def test_a_scan_of_the_pci_bus_does_not_reset_the_machine() -> None:
    """Linux's early PCI quirks write 32-bit addresses to 0xCF8 for every slot and function."""
    resets = Resets()
    bus = Bus("io", PORT_SPACE)
    bus.claim(0xCF9, 1, ResetControl(resets))
    for slot in range(32):
        for function in range(8):
            bus.write(0xCF8, 4, 0x80000000 | slot << 11 | function << 8)
            assert bus.read(0xCFC, 4) == 0xFFFFFFFF
    assert resets.count == 0


# -- ACPI


class Pm:
    """The fixed registers, with 16-bit accesses through a bus, as ACPICA does them."""

    def __init__(self) -> None:
        self.sci = FakeLine()
        self.sleeps: list[int] = []
        self.device = AcpiPm(self.sleeps.append, self.sci)
        self.bus = Bus("io", PORT_SPACE)
        self.bus.claim(0x600, 8, self.device)

    def __getitem__(self, offset: int) -> int:
        return self.bus.read(0x600 + offset, 2)

    def __setitem__(self, offset: int, value: int) -> None:
        self.bus.write(0x600 + offset, 2, value)


def test_the_machine_is_always_in_acpi_mode() -> None:
    pm = Pm()
    assert [pm[0], pm[2], pm[4], pm[6]] == [0, 0, 1, 0]
    pm[4] = 0
    assert pm[4] == 1


def test_power_button_raises_a_level_until_the_status_is_cleared() -> None:
    pm = Pm()
    pm.device.press_power_button()
    assert (pm[0], pm.sci.level) == (0x0100, False)
    pm[2] = 0xFFFF
    assert pm[2] == 0x0520, "only the bits that exist"
    assert pm.sci.level
    pm[0] = 0x0001
    assert pm.sci.level
    pm[0] = 0x0100
    assert (pm[0], pm.sci.level) == (0, False)


def test_s5_as_linux_enters_it() -> None:
    """acpi_hw_legacy_sleep(): clear WAK_STS, write SLP_TYP, then SLP_TYP with SLP_EN."""
    pm = Pm()
    pm[0] = 0x8000
    control = pm[4] & ~0x3C00
    pm[4] = control | S5_SLEEP_TYPE << 10
    assert pm.sleeps == []
    pm[4] = control | S5_SLEEP_TYPE << 10 | 0x2000
    assert pm.sleeps == [S5_SLEEP_TYPE]
    assert pm[4] & 0x2000 == 0, "SLP_EN always reads zero"
    assert pm[0] & 0x8000, "a guest that is not switched off sees the end of its sleep"


def test_the_dsdt_names_the_same_sleep_type() -> None:
    assert acpi_tables.S5_SLEEP_TYPE == S5_SLEEP_TYPE


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255)), max_size=20))
def test_the_sci_is_always_status_and_enable(writes: list[tuple[int, int]]) -> None:
    pm = Pm()
    for offset, value in writes:
        pm.device.write(offset, 1, value)
        pm.device.press_power_button()
        assert pm.sci.level == bool(pm[0] & pm[2])
