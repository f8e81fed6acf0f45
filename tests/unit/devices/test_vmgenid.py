"""The VM generation counter and the event that tells of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.arch.x86.boot.acpi import build_dsdt
from pyvmm.devices.acpi_pm import GPE0_EN, GPE0_STS, AcpiPm
from pyvmm.devices.vmgenid import VmGenId
from pyvmm.memory.guest_memory import GuestMemory, Region
from tests.unit.devices.fakes import FakeLine, nothing

GPA = 0x3000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([Region(0, 1 << 16)])
    yield memory
    memory.close()


def test_it_changes_when_renewed_and_only_then(memory: GuestMemory) -> None:
    told: list[bytes] = []
    counter = VmGenId(memory, GPA, lambda: told.append(memory.read(GPA, 16)))
    counter.place()
    first = memory.read(GPA, 16)
    assert first != bytes(16)
    counter.reset()
    moved = VmGenId(memory, GPA, nothing)
    moved.load(counter.save())
    moved.place()
    assert memory.read(GPA, 16) == first and moved.save() == counter.save()
    memory.regions[0].dirty.harvest()
    counter.renew()
    assert told == [memory.read(GPA, 16)] and told[0] != first, "the GUID is there before the guest is told"
    assert memory.regions[0].dirty.test(GPA >> 12), "a migration must send the page again"


def test_the_event_is_a_level_until_the_guest_clears_it() -> None:
    line = FakeLine()
    pm = AcpiPm(nothing, line)
    pm.raise_generation_event()
    assert line.driven == []
    pm.write(GPE0_EN, 1, 0xFF)
    assert line.driven == [True]
    assert (pm.read(GPE0_STS, 1), pm.read(GPE0_EN, 1)) == (1, 1)
    pm.press_power_button()
    pm.write(GPE0_STS, 1, 1)
    assert line.driven == [True, False]
    assert pm.read(GPE0_STS, 1) == 0


def test_firmware_tells_where_it_is() -> None:
    dsdt = build_dsdt()
    assert b"VM_Gen_Counter" in dsdt and (0xFF000).to_bytes(4, "little") in dsdt
