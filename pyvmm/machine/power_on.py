"""What a machine is like when it is switched on, remembered once and brought back by each reset."""

from __future__ import annotations

from pyvmm.arch.x86.boot import BootOptions, LoadedImage, load_image
from pyvmm.arch.x86.cpu_state import CpuState, load_cpu, save_cpu, state_msrs
from pyvmm.arch.x86.entry_state import entry_sregs
from pyvmm.kvm.system import System
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import IRQCHIPS, Vm
from pyvmm.machine.config import MachineConfig
from pyvmm.memory.guest_memory import GuestMemory


class PowerOnState:
    """vCPUs and interrupt chips as KVM makes them. ``vcpus`` have their CPUID and have not run."""

    def __init__(self, system: System, vm: Vm, vcpus: list[Vcpu]) -> None:
        self._vm = vm
        self._vcpus = vcpus
        listed = system.msr_indices()
        self.msrs = [state_msrs(vcpu, listed) for vcpu in vcpus]
        """For each vCPU, the MSRs that are its state."""
        self._cpus: list[CpuState] = [save_cpu(vcpu, msrs) for vcpu, msrs in zip(vcpus, self.msrs, strict=True)]
        self._chips = {chip: vm.get_irqchip(chip) for chip in IRQCHIPS}
        self._pit = vm.get_pit2()

    def restore_chips(self) -> None:
        """PIC, IOAPIC and PIT as at power-on."""
        for chip in IRQCHIPS:
            self._vm.set_irqchip(chip, self._chips[chip])
        self._vm.set_pit2(self._pit)

    def restore_cpus(self) -> None:
        """The vCPUs, which are parked, as at power-on."""
        for vcpu, state in zip(self._vcpus, self._cpus, strict=True):
            load_cpu(vcpu, state)


def enter_image(config: MachineConfig, memory: GuestMemory, boot_vcpu: Vcpu) -> LoadedImage:
    """Load the image that ``config`` names and put the boot vCPU at its entry."""
    options = BootOptions(
        command_line=config.append,
        linux_additions=config.linux_additions,
        initrd=config.initrd,
        cpus=config.cpus,
        load_address=config.load_address,
        guest_decompress=config.guest_decompress,
        acpi=config.acpi,
        acpi_devices=config.acpi_devices,
    )
    image = load_image(memory, config.image, options)
    boot_vcpu.set_sregs(entry_sregs(image, boot_vcpu.get_sregs()))
    boot_vcpu.set_regs(image.regs)
    return image
