"""How virtio slots are announced, and their doorbells and lines."""

from __future__ import annotations

import contextlib
import os

import pytest

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.aml import virtio_mmio_device
from pyvmm.errors import ConfigError
from pyvmm.machine import virtio_slots
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.virtio_slots import MAKERS, SLOTS, Doorbells, IrqfdLine, PulsedLine, announce_slots, slot_of


def test_slots_are_where_the_layout_says_and_end_with_the_isa_pins() -> None:
    assert slot_of(0) == (0xD0000000, 10)
    assert slot_of(SLOTS - 1) == (0xD0000000 + (SLOTS - 1) * layout.VIRTIO_MMIO_SIZE, 15)


def test_a_device_is_announced_on_the_command_line_or_in_the_dsdt_never_both() -> None:
    config = MachineConfig(image="x", rng=True, acpi=False, linux_additions="quiet")
    said = announce_slots(config)
    assert said.linux_additions == "quiet virtio_mmio.device=4K@0xd0000000:10" and said.acpi_devices == ()
    config = MachineConfig(image="x", rng=True, linux_additions="quiet")
    said = announce_slots(config)
    assert said.linux_additions == "quiet"
    assert said.acpi_devices == (virtio_mmio_device(0, 0xD0000000, 0x1000, 10, level=False),)


def test_without_devices_nothing_is_said() -> None:
    for acpi in (False, True):
        config = MachineConfig(image="x", acpi=acpi)
        assert config.virtio_devices == () and announce_slots(config) == config


def test_every_name_has_a_maker_and_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(MachineConfig(image="x", rng=True).virtio_devices) == set(MAKERS)
    monkeypatch.setattr(virtio_slots, "SLOTS", 0)
    with pytest.raises(ConfigError, match="1 virtio devices: the machine has room for 0"):
        announce_slots(MachineConfig(image="x", rng=True))


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


def test_an_irqfd_line_pulses_on_every_true() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        line = IrqfdLine(fd)
        for level in (True, True, False, True):
            line.set_level(level)
        assert os.eventfd_read(fd) == 3
    finally:
        os.close(fd)


def test_a_pulsed_line_goes_up_and_down() -> None:
    driven: list[tuple[int, int]] = []

    class FakeVm:
        def irq_line(self, gsi: int, level: int) -> None:
            driven.append((gsi, level))

    line = PulsedLine(FakeVm(), 10)  # type: ignore[arg-type]
    line.set_level(False)
    line.set_level(True)
    assert driven == [(10, 1), (10, 0)]
