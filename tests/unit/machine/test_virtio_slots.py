"""How virtio slots are announced, and their doorbells and lines."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import get_args

import pytest

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.aml import virtio_mmio_device
from pyvmm.errors import ConfigError
from pyvmm.machine import virtio_slots
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import DeviceConfig, RngConfig
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.virtio_makers import MAKERS
from pyvmm.machine.virtio_slots import SLOTS, Doorbells, _signal, announce_slots, slot_of


def test_slots_are_where_the_layout_says_on_isa_pins_that_are_free() -> None:
    assert slot_of(0) == (0xD0000000, 10)
    assert slot_of(SLOTS - 1) == (0xD0000000 + (SLOTS - 1) * layout.VIRTIO_MMIO_SIZE, 3)
    pins = [slot_of(index)[1] for index in range(SLOTS)]
    taken = {0, 2, layout.IRQ_SERIAL, layout.IRQ_RTC, layout.IRQ_ACPI_SCI, layout.IRQ_I8042_KEYBOARD}
    assert len(set(pins)) == SLOTS and not taken & set(pins) and max(pins) < 16


def test_a_device_is_announced_on_the_command_line_or_in_the_dsdt_never_both() -> None:
    config = MachineConfig(image="x", devices=(RngConfig(),), acpi=False, linux_additions="quiet")
    said = announce_slots(config)
    assert said.linux_additions == "quiet virtio_mmio.device=4K@0xd0000000:10" and said.acpi_devices == ()
    config = MachineConfig(image="x", devices=(RngConfig(),), linux_additions="quiet")
    said = announce_slots(config)
    assert said.linux_additions == "quiet"
    assert said.acpi_devices == (virtio_mmio_device(0, 0xD0000000, 0x1000, 10, level=False),)


def test_without_devices_nothing_is_said() -> None:
    for acpi in (False, True):
        config = MachineConfig(image="x", acpi=acpi)
        assert announce_slots(config) == config


def test_every_kind_of_device_has_a_maker() -> None:
    assert set(MAKERS) == set(get_args(DeviceConfig))


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtio_slots, "SLOTS", 0)
    with pytest.raises(ConfigError, match="1 virtio devices: the machine has room for 0"):
        announce_slots(MachineConfig(image="x", devices=(RngConfig(),)))


def test_a_doorbell_is_answered_on_the_loop_once_for_many_rings() -> None:
    loop = EventLoop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        bells = Doorbells(loop, 2, stack)
        answered: list[int] = []
        bells.answer(answered.append)
        bells.ring(1)
        bells.ring(1)
        assert answered == []
        loop.run_once(1.0)
        assert answered == [1]
        bells.ring(0)
        loop.run_once(1.0)
        loop.run_once(0.0)
        assert answered == [1, 0]
        fds = bells.fds
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_without_irqfd_a_signal_is_a_pulse_of_the_pin() -> None:
    driven: list[tuple[int, int]] = []

    class FakeVm:
        def check_extension(self, capability: str) -> int:
            return 0

        def irq_line(self, gsi: int, level: int) -> None:
            driven.append((gsi, level))

    loop = EventLoop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        fd = _signal(SimpleNamespace(vm=FakeVm(), loop=loop), 10, stack)  # type: ignore[arg-type]
        os.eventfd_write(fd, 1)
        assert driven == []
        loop.run_once(1.0)
        loop.run_once(0.0)
        assert driven == [(10, 1), (10, 0)]
