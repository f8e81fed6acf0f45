"""All of a paused machine but its RAM, saved as sections and loaded into another machine of the same make.

::

    description   what must be the same on both sides; checked before anything is applied
    clock         kvm-clock
    irqchips      PIC, IOAPIC, PIT
    cpu-N         arch/x86/cpu_state.py
    DEVICE        each device and virtio transport, by its section_id
    machine       resets so far

Loading has two phases. First every section is decoded and checked against the machine; then all of it is applied, in
this order:

1. The devices are paused: natively served queues must not start to work between two sections.
2. TSCs, all at once, before the MSRs that are times of it.
3. vCPUs with their local APICs, before the IOAPIC: giving KVM an IOAPIC delivers what it has pending to local APICs,
   and loading these afterwards would lose it.
4. PIC, IOAPIC, PIT: setting them forgets the lines' levels, so
5. devices come behind them. Each drives its line anew: at worst an edge is seen twice, at best no interrupt is lost.
6. kvm-clock last: it goes on from here. It is never set back below what the guest has seen.
7. The work-arounds' breakpoints are put where the loaded LSTAR and IDT say.

Resuming then rings every virtio queue's doorbell: a signalled eventfd is not in the state. RAM is the caller's, and is
there before all this (KVM writes the wall clock into it when its MSR is set).

The PIT counts on from its reload values, since KVM tells no current count: an interval that was being measured when
the machine was saved gets longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pyvmm import __version__
from pyvmm.arch.x86 import user_entry
from pyvmm.arch.x86.cpu_state import CpuState, cpuid_differences, differences, load_cpu, load_tscs, save_cpu
from pyvmm.devices.state import decode_fields
from pyvmm.errors import SectionError, StateError
from pyvmm.kvm.state import U32, U64, CpuidEntry
from pyvmm.kvm.vm import IRQCHIPS
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.migration.sections import KnownSections, Section, decode_sections, match_sections
from pyvmm.trace import trace_group

T = trace_group("migration")

DESCRIPTION, CLOCK, CHIPS, MACHINE = "description", "clock", "irqchips", "machine"
_VERSIONS = {DESCRIPTION: 1, CLOCK: 1, CHIPS: 1, MACHINE: 1}
CPU_VERSION = 1
_TSC_TOLERANCE = 250e-6
"""Relative difference of TSC frequencies that is none: KVM's own (tsc_tolerance_ppm)."""
_NAMED = 8
_Chip = Annotated[bytes, Meta(min_length=1, max_length=4096)]


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What the other side must have, too. ``pyvmm`` and ``quirks`` are for people: state does not depend on them."""

    pyvmm: Annotated[str, Meta(max_length=100)]
    memory: Annotated[tuple[tuple[U64, U64], ...], Meta(max_length=16)]
    """(GPA, bytes) of each region."""
    devices: Annotated[tuple[str, ...], Meta(max_length=100)]
    """Section names in the order of ports, then of virtio slots."""
    cpuid: Annotated[tuple[tuple[CpuidEntry, ...], ...], Meta(max_length=255)]
    """For each vCPU."""
    msrs: Annotated[tuple[U32, ...], Meta(max_length=1024)]
    tsc_khz: U32
    quirks: Annotated[tuple[str, ...], Meta(max_length=100)]


class Clock(msgspec.Struct, frozen=True):
    """kvm-clock."""

    nanoseconds: U64


class Chips(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel's raw structures."""

    pic_master: _Chip
    pic_slave: _Chip
    ioapic: _Chip
    pit: _Chip


class MachineFacts(msgspec.Struct, frozen=True):
    """What is left."""

    resets: U32


def describe(machine: Machine) -> Description:
    """What ``machine`` is."""
    return Description(
        pyvmm=__version__,
        memory=tuple((region.gpa, region.size) for region in machine.memory.regions),
        devices=tuple(device.section_id for device in machine.devices),
        cpuid=tuple(vcpu.cpuid for vcpu in machine.vcpus),
        msrs=tuple(machine.power_on_state.msrs[0]),
        tsc_khz=machine.vcpus[0].tsc_khz(),
        quirks=tuple(sorted(machine.quirks)),
    )


def save_machine(machine: Machine) -> list[Section]:
    """The sections of ``machine``, which is paused. In the loop's thread; StateError while it runs.

    Changes nothing but that output which KVM or the native core still collected is delivered.
    """
    if machine.run_state is RunState.RUNNING:
        raise StateError("the machine runs: pause it before its state is saved")
    machine.collector.drain_ring()  # what the guest wrote so far is not in the state
    clock = machine.vm.get_clock()[0]
    cpus = [save_cpu(vcpu, msrs) for vcpu, msrs in zip(machine.vcpus, machine.power_on_state.msrs, strict=True)]
    chips = Chips(pit=machine.vm.get_pit2(), **{chip: machine.vm.get_irqchip(chip) for chip in IRQCHIPS})
    sections = [
        _section(DESCRIPTION, describe(machine)),
        _section(CLOCK, Clock(clock)),
        _section(CHIPS, chips),
        *(Section(f"cpu-{index}", CPU_VERSION, msgspec.structs.asdict(cpu)) for index, cpu in enumerate(cpus)),
        *(Section(device.section_id, device.version, device.save()) for device in machine.devices),
        _section(MACHINE, MachineFacts(machine.resets)),
    ]
    T.state_saved.on and T.state_saved(len(sections), clock)
    return sections


def _section(name: str, record: msgspec.Struct) -> Section:
    return Section(name, _VERSIONS[name], msgspec.structs.asdict(record))


class StateReader:
    """Reads streams of saved state for one machine, one after another: what is as it was is not checked again."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: KnownSections = {}
        self._fitting: Section | None = None

    def decode(self, stream: bytes | memoryview) -> dict[str, Section]:
        """See :func:`decode_sections`."""
        return decode_sections(stream, self._known)

    def prepare(self, sections: dict[str, Section]) -> Callable[[], list[str]]:
        """See :func:`prepare_machine`; ``sections`` are of :meth:`decode`."""
        apply = prepare_machine(self._machine, sections, fitting=self._fitting)
        self._fitting = sections[DESCRIPTION]
        return apply


def prepare_machine(
    machine: Machine, sections: dict[str, Section], *, fitting: Section | None = None
) -> Callable[[], list[str]]:
    """Check ``sections`` (hostile) against ``machine`` and return what applies them.

    SectionError, and nothing changed, if anything does not fit. What is returned is called in the loop's thread with
    the machine not running and its RAM in place; it gives the names of what the host did not take (nothing, on a good
    one). KvmError from there leaves a machine that is good for nothing but another load. ``fitting`` is a description
    known to fit: that very one is not checked again.
    """
    if DESCRIPTION not in sections:
        raise SectionError(DESCRIPTION, "name", "the section is missing")
    if sections[DESCRIPTION] is not fitting:
        description = decode_fields(DESCRIPTION, Description, sections[DESCRIPTION].data)
        if sections[DESCRIPTION].version == _VERSIONS[DESCRIPTION]:
            check_description(description, describe(machine))  # says more than a missing section would
    cpu_names = [f"cpu-{index}" for index in range(len(machine.vcpus))]
    match_sections(
        sections,
        _VERSIONS
        | dict.fromkeys(cpu_names, CPU_VERSION)
        | {device.section_id: device.version for device in machine.devices},
    )
    clock = decode_fields(CLOCK, Clock, sections[CLOCK].data)
    chips = decode_fields(CHIPS, Chips, sections[CHIPS].data)
    for name, here in _chips_of(machine).items():
        if len(getattr(chips, name)) != len(here):
            raise SectionError(CHIPS, name, f"{len(getattr(chips, name))} bytes, KVM has {len(here)}")
    cpus = [decode_fields(name, CpuState, sections[name].data) for name in cpu_names]
    for name, cpu, msrs in zip(cpu_names, cpus, machine.power_on_state.msrs, strict=True):
        if set(cpu.msrs) != set(msrs):
            odd = min(set(cpu.msrs) ^ set(msrs))
            raise SectionError(name, f"msrs[{odd:#x}]", "missing" if odd in msrs else "unknown MSR")
    device_loads = [device.prepare_load(sections[device.section_id].data) for device in machine.devices]
    facts = decode_fields(MACHINE, MachineFacts, sections[MACHINE].data)

    def apply() -> list[str]:
        if machine.run_state is RunState.RUNNING:
            raise StateError("the machine runs: pause it before state is loaded")
        machine.rest.pause()
        ahead = load_tscs(machine.vcpus, cpus)
        for vcpu, cpu in zip(machine.vcpus, cpus, strict=True):
            load_cpu(vcpu, cpu, deadline_shift=ahead)
        for chip in IRQCHIPS:
            machine.vm.set_irqchip(chip, getattr(chips, chip))
        machine.vm.set_pit2(chips.pit)
        for load in device_loads:
            load()
        machine.resets = facts.resets
        mismatches = _read_back(machine, cpus, chips)
        machine.vm.set_clock(clock.nanoseconds)
        for vcpu in machine.vcpus:
            vcpu.note_pause()
            user_entry.prepare_vcpu(vcpu, machine.quirks)
        T.state_loaded.on and T.state_loaded(len(sections), clock.nanoseconds, ahead)
        return mismatches

    return apply


def load_machine(machine: Machine, sections: dict[str, Section]) -> list[str]:
    """Both phases of :func:`prepare_machine`."""
    return prepare_machine(machine, sections)()


def _chips_of(machine: Machine) -> dict[str, bytes]:
    return {"pit": machine.vm.get_pit2()} | {chip: machine.vm.get_irqchip(chip) for chip in IRQCHIPS}


def check_description(there: Description, here: Description) -> None:
    """SectionError with all that differs in one field: its reader has to find a host, or options, that fit."""

    def refuse(field: str, lines: list[str]) -> None:
        more = f", and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        raise SectionError(DESCRIPTION, field, "; ".join(lines[:_NAMED]) + more)

    if there.memory != here.memory:
        refuse("memory", [f"{_layout(there.memory)} was saved, this machine has {_layout(here.memory)}"])
    if len(there.cpuid) != len(here.cpuid):
        refuse("cpuid", [f"{len(there.cpuid)} vCPUs were saved, this machine has {len(here.cpuid)}"])
    if there.devices != here.devices:
        refuse("devices", [f"{', '.join(there.devices)} were saved, this machine has {', '.join(here.devices)}"])
    unlike = [
        f"vCPU {index}: {line}"
        for index, (had, has) in enumerate(zip(there.cpuid, here.cpuid, strict=True))
        for line in cpuid_differences(had, has)
    ]
    if unlike:
        refuse("cpuid", unlike)
    if set(there.msrs) != set(here.msrs):
        lacking = [f"MSR {index:#x} is not there" for index in sorted(set(there.msrs) - set(here.msrs))]
        refuse("msrs", lacking + [f"MSR {index:#x} is new" for index in sorted(set(here.msrs) - set(there.msrs))])
    if abs(there.tsc_khz - here.tsc_khz) > here.tsc_khz * _TSC_TOLERANCE:
        refuse("tsc_khz", [f"the TSC ran at {there.tsc_khz} kHz, here at {here.tsc_khz}"])


def _layout(memory: Any) -> str:
    return ", ".join(f"{size >> 20} MiB at {gpa:#x}" for gpa, size in memory)


def _read_back(machine: Machine, cpus: list[CpuState], chips: Chips) -> list[str]:
    """Names of what reads back otherwise. Of the chips only the PICs and the IOAPIC's table hold still: IRR follows the
    devices, and the PIT counts.
    """
    found = []
    for vcpu, cpu, msrs in zip(machine.vcpus, cpus, machine.power_on_state.msrs, strict=True):
        found += [(f"cpu-{vcpu.index}", name) for name in differences(cpu, save_cpu(vcpu, msrs))]
    table = slice(32, None)  # struct kvm_ioapic_state: base, IOREGSEL, ID, IRR, padding; then the redirection table
    if machine.vm.get_irqchip("ioapic")[table] != chips.ioapic[table]:
        found.append((CHIPS, "ioapic"))
    for section, field in found:
        T.state_mismatch.on and T.state_mismatch(section, field)
    return [f"{section}: {field}" for section, field in found]
