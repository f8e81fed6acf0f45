"""The one place that wires a machine: KVM, memory, interrupt lines, buses, devices, vCPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyvmm.arch.x86 import layout, user_entry
from pyvmm.arch.x86.boot.mptable import isa_irq_pins
from pyvmm.arch.x86.cpuid import guest_cpuid
from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.bus import MMIO_SPACE, PORT_SPACE, Bus
from pyvmm.devices.debug_console import DebugConsole
from pyvmm.devices.debug_exit import DebugExit
from pyvmm.devices.device import Device
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.post import PostPort
from pyvmm.devices.reset_control import ResetControl
from pyvmm.devices.rtc import Rtc
from pyvmm.devices.serial import Serial
from pyvmm.devices.shutdown_port import ShutdownPort
from pyvmm.devices.system_port_a import SystemPortA
from pyvmm.devices.task_port import TaskPort
from pyvmm.devices.vmgenid import VmGenId
from pyvmm.errors import HostError
from pyvmm.host.kvm_counters import KvmCounters
from pyvmm.kvm.system import System
from pyvmm.kvm.vm import Vm
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import NetConfig
from pyvmm.machine.dirty_tracker import DirtyTracker, prepare_dirty_log
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.machine import Machine
from pyvmm.machine.serial_backend import SerialBackend, open_serial
from pyvmm.machine.sinks import SinkCollector
from pyvmm.memory.guest_memory import GuestMemory, Region
from pyvmm.native import lib

if TYPE_CHECKING:
    from pyvmm.net.leases import Lease

NEEDED = (
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_IRQCHIP",
    "KVM_CAP_PIT2",
    "KVM_CAP_IMMEDIATE_EXIT",
    "KVM_CAP_MP_STATE",
    "KVM_CAP_VCPU_EVENTS",
)
COALESCED_PORTS = (layout.PORT_SERIAL[0], layout.PORT_POST[0])


class KvmIrqLine:
    """A device's interrupt line that leads to a pin of the in-kernel PIC and IOAPIC."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi

    def set_level(self, level: bool) -> None:
        """Drive the pin."""
        self._vm.irq_line(self._gsi, int(level))


MakeRegion = Callable[[int, int, str], Region]
"""(GPA, size in bytes, name) -> a region of RAM."""


def build_machine(
    config: MachineConfig,
    quirks: frozenset[str],
    saved_ram: MakeRegion | None = None,
    make_bus: Callable[[str, int], Bus] | None = None,
) -> Machine:
    """A machine in run state prelaunch, its image loaded.

    With ``saved_ram``, which makes its RAM, nothing is loaded: saved state follows. ``make_bus`` is for those who want
    to see every access: it makes the buses, and none is served without them.
    Raises ConfigError, ImageError or HostError; nothing is left open then.
    """
    with contextlib.ExitStack() as stack:
        leases: dict[str, Lease] = {}
        if any(isinstance(device, NetConfig) and device.backend == "network" for device in config.devices):
            from pyvmm.machine.network_leases import take_leases

            config, leases = take_leases(config, stack)
        if config.devices:
            from pyvmm.machine import virtio_slots  # its imports cost every start some milliseconds

            config = virtio_slots.announce_slots(config)
        system = stack.enter_context(System())
        for capability in NEEDED:
            if not system.check_extension(capability):
                raise HostError(f"this host's KVM lacks {capability}; a newer kernel has it (see pyvmm doctor)")
        vm = stack.enter_context(system.create_vm())
        _prepare_vm(vm, quirks, config, coalesce=make_bus is None)
        memory = _build_memory(config, vm, stack, saved_ram or Region)
        loop = EventLoop()
        stack.callback(loop.close)
        ports, mmio = (make_bus or Bus)("io", PORT_SPACE), (make_bus or Bus)("memory", MMIO_SPACE)
        collector = SinkCollector(vm, ports, mmio, native=make_bus is None)
        backend = open_serial(config.serial, loop)
        stack.callback(backend.close)
        dirty = DirtyTracker(vm, memory, prepare_dirty_log(vm, config.dirty_log))
        machine = Machine(
            config, quirks, system=system, vm=vm, memory=memory, dirty=dirty, loop=loop, ports=ports, mmio=mmio,
            collector=collector, backend=backend,
        )  # fmt: skip
        machine.leases = leases
        machine.vm_counters = stack.enter_context(KvmCounters(vm))
        machine.devices.extend(_build_devices(machine, backend, collector))
        if config.devices:
            machine.devices.extend(virtio_slots.build_slots(machine, stack))
        supported = user_entry.offer_no_hypercalls(system.supported_cpuid(), quirks)
        tsc_deadline = bool(system.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"))
        for index in range(config.cpus):
            vcpu = stack.enter_context(vm.create_vcpu(index))
            vcpu.set_cpuid(guest_cpuid(supported, apic_id=index, cpus=config.cpus, tsc_deadline=tsc_deadline))
            dirty.add_vcpu(vcpu)
            machine.add_vcpu(vcpu)
            machine.counters.append(stack.enter_context(KvmCounters(vcpu)))
        machine.power_on(load_image=saved_ram is None and not config.incoming)
        machine.owned = stack.pop_all()
        return machine


def _prepare_vm(vm: Vm, quirks: frozenset[str], config: MachineConfig, *, coalesce: bool) -> None:
    if "instruction-fallback" in quirks and vm.check_extension("KVM_CAP_EXIT_ON_EMULATION_FAILURE"):
        # Otherwise KVM queues #UD for the guest before we hear of an instruction it does not know.
        vm.enable_cap("KVM_CAP_EXIT_ON_EMULATION_FAILURE", 1)
    user_entry.prepare_vm(vm, quirks)
    # VMX without unrestricted guest needs these; elsewhere they are accepted and unused.
    vm.set_identity_map_addr(layout.IDENTITY_MAP)
    vm.set_tss_addr(layout.TSS)
    vm.create_irqchip()
    vm.set_gsi_routing(_pc_wiring())
    vm.create_pit2()
    if coalesce and vm.check_extension("KVM_CAP_COALESCED_PIO"):
        for port in COALESCED_PORTS if config.testdev else (*COALESCED_PORTS, layout.PORT_DEBUG_CONSOLE[0]):
            vm.register_coalesced(port, 1, pio=True)


def _pc_wiring() -> list[tuple[int, str, int]]:
    """GSIs as a PC wires them and the MP table and MADT say it: KVM's default has the timer at IOAPIC pin 0."""
    pic = [(irq, "pic_slave" if irq & 8 else "pic_master", irq & 7) for irq in range(16)]
    return pic + [(irq, "ioapic", pin) for irq, pin in isa_irq_pins()] + [(gsi, "ioapic", gsi) for gsi in range(16, 24)]


def _check_host_memory(size: int) -> None:
    """A guest may have more than is free now (it need not use all), but not more than the host could ever give."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        there = (kib["MemTotal"] + kib["SwapTotal"]) << 10
    except (OSError, ValueError, KeyError, IndexError):
        return
    if size > there:
        raise HostError(f"--memory {size >> 20}M: this host has {there >> 20}M of memory and swap; ask for less")


def _build_memory(
    config: MachineConfig, vm: Vm, stack: contextlib.ExitStack, make_region: MakeRegion
) -> GuestMemory:
    _check_host_memory(config.memory)
    low = min(config.memory, layout.HOLE_START)
    plan = [("ram-low", 0, low)]
    if config.memory > low:
        plan.append(("ram-high", layout.HOLE_END, config.memory - low))
    regions = []
    for name, gpa, size in plan:
        region = make_region(gpa, size, name)
        stack.callback(region.close)
        regions.append(region)
    memory = GuestMemory(regions)
    for slot, region in enumerate(memory.regions):
        vm.set_memory_region(slot, region.gpa, region.size, region.hva)
        vm.add_native_region(region.gpa, region.size, region.hva, region.dirty.native)
    return memory


def _build_devices(machine: Machine, backend: SerialBackend, collector: SinkCollector) -> list[Device]:
    """Every device, claimed on the port bus. Adding one is one line here."""
    vm, config, ports = machine.vm, machine.config, machine.ports
    built: list[Device] = []

    def claim(base_and_length: tuple[int, int], device: Device) -> None:
        ports.claim(*base_and_length, device)
        built.append(device)

    def reset(source: str) -> Callable[[], None]:
        return lambda: machine.request_reset(source)

    serial_hint = collector.hint(layout.PORT_SERIAL[0])
    serial = Serial(backend.output, KvmIrqLine(vm, layout.IRQ_SERIAL), serial_hint)
    collector.attach(serial_hint, serial.output_from_sink)
    backend.attach(serial)
    claim(layout.PORT_SERIAL, serial)

    if config.testdev:
        built.append(_build_testdev(machine))
    else:
        console = DebugConsole(backend.output, collector.hint(layout.PORT_DEBUG_CONSOLE[0], beside=serial_hint))
        claim(layout.PORT_DEBUG_CONSOLE, console)

    post_hint = collector.hint(layout.PORT_POST[0])
    post = PostPort(post_hint)
    collector.attach(post_hint, post.output_from_sink)
    claim(layout.PORT_POST, post)

    claim((config.debug_exit.port, config.debug_exit.size),
          DebugExit(machine.debug_exit_written, config.debug_exit.size))  # fmt: skip
    low, high = machine.memory.regions[0].size, sum(r.size for r in machine.memory.regions[1:])
    claim(layout.PORT_RTC, Rtc(low_ram=low, high_ram=high, cpus=config.cpus))
    i8042 = I8042(reset("i8042"), KvmIrqLine(vm, layout.IRQ_I8042_KEYBOARD))
    ports.claim(layout.PORT_I8042[0], 1, i8042, 0)
    ports.claim(layout.PORT_I8042[0] + 4, 1, i8042, 4)
    built.append(i8042)
    claim(layout.PORT_SYSTEM_CONTROL_A, SystemPortA(reset("port 0x92")))
    claim(layout.PORT_RESET_CONTROL, ResetControl(reset("port 0xcf9")))
    claim(layout.PORT_TASK, TaskPort())
    acpi_pm = AcpiPm(machine.sleep_requested, KvmIrqLine(vm, layout.IRQ_ACPI_SCI))
    machine.power_button = acpi_pm.press_power_button
    claim(layout.PORT_ACPI_PM, acpi_pm)
    if config.acpi:
        generation = VmGenId(machine.memory, layout.VMGENID, acpi_pm.raise_generation_event)
        built.append(generation)
        machine.image_loaded = generation.place
    claim(layout.PORT_FW_CFG, FwCfg(ram=low + high, cpus=config.cpus))
    claim(layout.PORT_SHUTDOWN, ShutdownPort(machine.shutdown_spelled))
    return built


def _build_testdev(machine: Machine) -> Device:
    """The test device, claimed at its ports and in memory space."""
    from pyvmm.devices import testdev

    lines = [KvmIrqLine(machine.vm, gsi) for gsi in range(testdev.LINE_COUNT)]
    device = testdev.TestDevice(lines, machine.memory.drop_mapping)
    machine.ports.claim(*layout.PORT_TESTDEV, device, testdev.LATCH)
    machine.ports.claim(*layout.PORT_TESTDEV_LINES, device, testdev.LINES)
    machine.mmio.claim(layout.TESTDEV_MEMORY, testdev.MEMORY_SIZE, device, testdev.MEMORY)
    return device


def install_kick_signal() -> None:
    """Once per process: the signal that brings vCPU threads out of KVM_RUN."""
    if lib.pv_install_kick_signal():
        raise HostError("the kick signal's handler cannot be installed")
