"""A bare VM for tests of the KVM layer, and machines for tests of what is above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.kvm.system import System
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import GuestMemory, Region
from tests.framework.real_mode import image


class BareVm:
    """One vCPU in real mode at 0:0x1000 over 1 MiB of RAM, with the in-kernel interrupt chips."""

    def __init__(self, vm: Vm, vcpu: Vcpu, memory: GuestMemory) -> None:
        self.vm = vm
        self.vcpu = vcpu
        self.memory = memory

    def enter(self, code: bytes, at: int = 0x1000) -> None:
        """Put ``code`` at ``at`` and the vCPU there."""
        self.memory.write(at, code)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = at, 0x8000, 2
        self.vcpu.set_regs(regs)


@pytest.fixture
def bare() -> Iterator[BareVm]:
    install_kick_signal()
    region = Region(0, 1 << 20)
    with System() as system, system.create_vm() as vm:
        vm.set_tss_addr(0xFEFFD000)
        vm.create_irqchip()
        vm.create_pit2()
        vm.set_memory_region(0, 0, region.size, region.hva)
        vm.add_native_region(0, region.size, region.hva)
        with vm.create_vcpu(0) as vcpu:
            yield BareVm(vm, vcpu, GuestMemory([region]))
    region.close()


@pytest.fixture
def machine_of(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """A factory: flat code and options -> a machine; its output collects in ``machine.output``."""
    made: list[Machine] = []

    def build(code: bytes, **options: object) -> Machine:
        install_kick_signal()
        settings: dict[str, object] = {
            "image": image(tmp_path, code), "serial": "null", "memory": 4 << 20, "timeout": 20.0,
        }  # fmt: skip
        machine = build_machine(MachineConfig(**(settings | options)), frozenset())  # type: ignore[arg-type]
        made.append(machine)
        machine.output = bytearray()  # type: ignore[attr-defined]
        machine.backend.observe = machine.output.extend  # type: ignore[attr-defined]
        return machine

    yield build
    for machine in made:
        machine.close()
