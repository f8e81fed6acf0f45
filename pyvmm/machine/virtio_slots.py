"""Where virtio transports sit in the machine, and what leads to and from them.

Slot ``i`` has 4 KiB at ``VIRTIO_MMIO + i * 0x1000`` and GSI ``IRQS_VIRTIO[i]``. There are as many as there are free
ISA pins: the MP table describes these, and a kernel without ACPI knows no others.

Doorbells: KVM turns a write of ``i`` to QueueNotify into a signal on queue ``i``'s event descriptor, and the machine's
loop, or a thread of the device's own, serves the queue. Without ioeventfd the write is an exit, and the transport
signals the same descriptor.

Interrupts are edges, active high: what a kernel takes an ISA pin for when only the command line names the device,
what the MP table says of these pins, and what the DSDT says, too. An irqfd is a pulse, which is an edge; a level would
need a resampling irqfd and one more exit for each interrupt. Where KVM has no irqfd, the loop turns the signal into
two ioctls.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import msgspec

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.aml import virtio_mmio_device
from pyvmm.devices.device import Device
from pyvmm.errors import ConfigError
from pyvmm.kvm.vm import Vm
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.event_loop import EventLoop, clear_eventfd
from pyvmm.machine.machine import Machine
from pyvmm.machine.virtio_makers import make_device
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.mmio import WINDOW, VirtioMmio
from pyvmm.virtio.mmio_registers import QUEUE_NOTIFY

D = TypeVar("D", bound=VirtioDevice)

SLOTS = len(layout.IRQS_VIRTIO)


def slot_of(index: int) -> tuple[int, int]:
    """(GPA, GSI) of slot ``index``."""
    return layout.VIRTIO_MMIO + index * layout.VIRTIO_MMIO_SIZE, layout.IRQS_VIRTIO[index]


def announce_slots(config: MachineConfig) -> MachineConfig:
    """``config`` with the slots made known to the guest, one way only: a driver that finds both fails on the second.

    With ACPI tables they are in the DSDT (LNRO0005), else on Linux's command line.
    """
    count = len(config.devices)
    if count > SLOTS:
        raise ConfigError(f"{count} virtio devices: the machine has room for {SLOTS}")
    slots = [slot_of(index) for index in range(count)]
    if config.acpi:
        entries = (virtio_mmio_device(i, gpa, layout.VIRTIO_MMIO_SIZE, gsi) for i, (gpa, gsi) in enumerate(slots))
        return msgspec.structs.replace(config, acpi_devices=tuple(entries))
    there = config.linux_additions.split(" ")  # a saved machine's configuration has them already
    words = [word for gpa, gsi in slots if (word := f"virtio_mmio.device=4K@{gpa:#x}:{gsi}") not in there]
    return msgspec.structs.replace(config, linux_additions=" ".join([config.linux_additions, *words]).strip())


def build_slots(machine: Machine, stack: contextlib.ExitStack) -> list[Device]:
    """The transports, claimed on the memory bus and wired; ``stack`` gives back what they need."""
    assert WINDOW == layout.VIRTIO_MMIO_SIZE
    built: list[Device] = []
    of_a_kind: Counter[str] = Counter()
    for index, config in enumerate(machine.config.devices):
        gpa, gsi = slot_of(index)
        device = make_device(machine, config)
        bells = Doorbells(machine.loop, len(device.queues), stack)
        number = of_a_kind[device.name]
        of_a_kind[device.name] += 1
        section_id = f"{device.name}-{number}" if number else device.name
        transport = VirtioMmio(device, _signal(machine, gsi, stack), bells.ring, section_id=section_id)
        stack.callback(device.close)  # before its descriptors are
        if not device.take_doorbells(bells.fds, transport.interrupt):
            bells.answer(transport.serve)
        if machine.vm.check_extension("KVM_CAP_IOEVENTFD"):
            for queue, fd in enumerate(bells.fds):
                machine.vm.ioeventfd(fd, gpa + QUEUE_NOTIFY, 4, datamatch=queue)
        machine.mmio.claim(gpa, WINDOW, transport)
        built.append(transport)
    return built


def virtio_devices(machine: Machine, kind: type[D]) -> list[D]:
    """Those of ``kind`` behind its transports, in their slots' order."""
    behind = (each.device for each in machine.devices if isinstance(each, VirtioMmio))
    return [device for device in behind if isinstance(device, kind)]


class Doorbells:
    """One event descriptor for each queue of a device, served on the machine's loop."""

    def __init__(self, loop: EventLoop, queues: int, stack: contextlib.ExitStack) -> None:
        self._loop = loop
        self._stack = stack
        self.fds = [_eventfd(stack) for _ in range(queues)]

    def ring(self, queue: int) -> None:
        """From any thread; never waits."""
        os.eventfd_write(self.fds[queue], 1)

    def answer(self, serve: Callable[[int], None]) -> None:
        """Call ``serve(queue)`` on the loop's thread whenever it was rung, once for any number of times."""
        for queue, fd in enumerate(self.fds):
            self._loop.add_reader(fd, functools.partial(_answer, fd, serve, queue))
            self._stack.callback(self._loop.remove_reader, fd)


def _signal(machine: Machine, gsi: int, stack: contextlib.ExitStack) -> int:
    """An eventfd that pulses pin ``gsi`` whenever something is added to it."""
    fd = _eventfd(stack)
    if machine.vm.check_extension("KVM_CAP_IRQFD"):
        machine.vm.irqfd(fd, gsi)
    else:
        machine.loop.add_reader(fd, functools.partial(_pulse, machine.vm, gsi, fd))
        stack.callback(machine.loop.remove_reader, fd)
    return fd


def _pulse(vm: Vm, gsi: int, fd: int) -> None:
    clear_eventfd(fd)
    vm.irq_line(gsi, 1)
    vm.irq_line(gsi, 0)


def _eventfd(stack: contextlib.ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


def _answer(fd: int, serve: Callable[[int], None], queue: int) -> None:
    clear_eventfd(fd)
    serve(queue)
