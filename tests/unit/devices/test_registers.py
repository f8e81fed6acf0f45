"""Register tables against the devices they describe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.arch.x86.control_registers import CONTROL_BITS
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.device import Device
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.rtc import CMOS, Rtc
from pyvmm.devices.serial import Serial
from pyvmm.devices.serial_registers import LCR, LCR_DLAB, LSR
from pyvmm.registers import Bit, Register, RegisterTable, named_bits
from pyvmm.virtio import mmio_registers


def devices() -> list[tuple[Device, int]]:
    """With how many addresses they have."""
    return [(Serial(lambda data: None), 8), (Rtc(), 2), (I8042(lambda: None), 5), (AcpiPm(lambda kind: None), 8)]


@pytest.mark.parametrize("number", range(4))
def test_every_address_has_a_name(number: int) -> None:
    device, length = devices()[number]
    for offset in range(length):
        for write in (False, True):
            found = device.register_at(offset, write=write)
            if found is None:
                # Nothing is there: 0x61 to 0x63 of the keyboard controller; or it may only be read, or only be written.
                assert isinstance(device, I8042) or device.register_at(offset, write=not write) is not None
            else:
                assert found.name and found.text


def test_the_divisor_is_in_the_place_of_others() -> None:
    device = Serial(lambda data: None)
    names = [device.register_at(at, write=True) for at in (0, 1)]
    device.write(LCR, 1, LCR_DLAB)
    assert [r.name for r in names if r] == ["THR", "IER"]
    assert [r.name for r in (device.register_at(at, write=True) for at in (0, 1)) if r] == ["DLL", "DLM"]
    status = device.register_at(LSR, write=False)
    assert status is not None and status.describe(device.read(LSR, 1)) == "THRE TEMT"


def test_the_clock_says_what_its_index_selects() -> None:
    device = Rtc()
    for index in range(128):
        device.write(0, 1, index)
        found = device.register_at(1, write=False)
        assert found is not None and (found.name.startswith("CMOS") == (CMOS.find(index, write=False) is None))


def test_virtio_has_no_two_meanings_and_no_hole_before_its_configuration() -> None:
    table = mmio_registers.TABLE
    assert table.find(0x100, write=False) is table.find(0xFFF, write=False)
    status = table.find(0x70, write=True)
    assert status is not None
    assert (status.describe(0xB), status.describe(0)) == ("ACKNOWLEDGE DRIVER FEATURES_OK", "reset")


def test_two_at_one_place_are_a_defect_of_the_table() -> None:
    with pytest.raises(ValueError, match="B and A are both at 0x1"):
        RegisterTable("x", (Register(0, "A", "", size=2), Register(1, "B", "", access="r")))
    RegisterTable("x", (Register(0, "A", "", access="w"), Register(0, "B", "", access="r")))


@given(st.integers(0, (1 << 64) - 1))
def test_names_say_which_bits_are_set(value: int) -> None:
    for bits in CONTROL_BITS.values():
        assert all(bit.single for bit in bits)
        assert [b.shift for b in bits] == sorted({b.shift for b in bits})
        said = named_bits(value, [bit for bit in bits if bit.name]).split()
        assert said == [bit.name for bit in bits if bit.name and value & bit.mask]


def test_a_field_says_its_number() -> None:
    assert named_bits(0b1100, [Bit(0b1, "X"), Bit(0b1110, "F")]) == "F=6"
