"""A whole machine's state: the identity when it is loaded again, and hostile state refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm.arch.x86.cpu_state import RUNNING_MSRS
from pyvmm.errors import SectionError, StateError
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import RngConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import Region
from pyvmm.migration.machine_state import StateReader, load_machine, prepare_machine, save_machine
from pyvmm.migration.sections import Section, decode_sections, encode_sections

Sections = dict[str, Section]


@pytest.fixture
def make(tmp_path: Any) -> Iterator[Callable[..., Machine]]:
    install_kick_signal()
    made: list[Machine] = []
    image = tmp_path / "spin.bin"
    image.write_bytes(b"\xeb\xfe".ljust(512, b"\0"))

    def build(**options: Any) -> Machine:
        settings: dict[str, Any] = {"image": str(image), "memory": 2 << 20, "serial": "null", "devices": (RngConfig(),)}
        machine = build_machine(MachineConfig(**settings | options), frozenset(), saved_ram=Region)
        made.append(machine)
        return machine

    yield build
    for machine in made:
        machine.close()


def saved(machine: Machine) -> Sections:
    return decode_sections(encode_sections(save_machine(machine)))


def steady(sections: Sections) -> dict[str, Any]:
    """Without what runs on by itself, although no vCPU does."""
    fields = {name: dict(section.data) for name, section in sections.items()}
    del fields["clock"]
    del fields["irqchips"]["pit"]  # when counting began
    for name, data in fields.items():
        if name.startswith("cpu-"):
            data["msrs"] = {i: v for i, v in data["msrs"].items() if i not in RUNNING_MSRS}
            del data["tsc_offset"]
    return fields


def test_a_reader_that_has_seen_a_machine_before_still_checks(make: Callable[..., Machine]) -> None:
    machine, other = make(), make(memory=4 << 20)
    reader = StateReader(machine)
    good = encode_sections(save_machine(machine))
    for _ in range(2):
        assert reader.prepare(reader.decode(good))() == []
    with pytest.raises(SectionError, match="memory"):
        reader.prepare(reader.decode(encode_sections(save_machine(other))))
    sections = change(saved(machine), "cpu-0", msrs={})
    with pytest.raises(SectionError, match="msrs"):
        reader.prepare(reader.decode(encode_sections(sections.values())))
    assert reader.prepare(reader.decode(good))() == []


@pytest.mark.parametrize("cpus", [1, 3])
def test_save_load_save_is_the_identity(make: Callable[..., Machine], cpus: int) -> None:
    first, second = make(cpus=cpus), make(cpus=cpus)
    sections = saved(first)
    assert load_machine(second, sections) == []
    assert steady(saved(second)) == steady(sections)
    assert saved(second)["clock"].data["nanoseconds"] >= sections["clock"].data["nanoseconds"]


def test_a_running_machine_is_not_saved(make: Callable[..., Machine]) -> None:
    machine = make()
    machine.start()
    with pytest.raises(StateError, match="pause it"):
        save_machine(machine)
    sections = {}
    machine.pause()
    sections = saved(machine)
    machine.resume()
    with pytest.raises(StateError, match="pause it"):
        load_machine(machine, sections)


def change(sections: Sections, name: str, **fields: Any) -> Sections:
    data = {**sections[name].data, **fields}
    return {**sections, name: Section(name, sections[name].version, data)}


def inside(sections: Sections, name: str, field: str, **fields: Any) -> Sections:
    return change(sections, name, **{field: {**sections[name].data[field], **fields}})


def inside_msr(sections: Sections) -> Sections:
    return change(sections, "cpu-0", msrs={**sections["cpu-0"].data["msrs"], 0x1234: 0})


def newer(sections: Sections, name: str) -> Sections:
    return {**sections, name: Section(name, 2, sections[name].data)}


def longer(sections: Sections, field: str, more: list[Any]) -> Sections:
    return change(sections, "description", **{field: [*sections["description"].data[field], *more]})


BAD: dict[str, tuple[str, Callable[[Sections], Sections]]] = {
    "missing section": ("'serial': name", lambda s: {k: v for k, v in s.items() if k != "serial"}),
    "missing description": ("'description': name", lambda s: {k: v for k, v in s.items() if k != "description"}),
    "unknown section": ("'gpu': name", lambda s: {**s, "gpu": Section("gpu", 1, {})}),
    "newer section": ("'rtc': version: 2", lambda s: newer(s, "rtc")),
    "newer description": ("'description': version", lambda s: newer(s, "description")),
    "unknown field": ("'clock': color", lambda s: change(s, "clock", color=1)),
    "missing field": ("'machine': resets: missing", lambda s: {**s, "machine": Section("machine", 1, {})}),
    "ill-typed": ("'cpu-0': mp_state", lambda s: change(s, "cpu-0", mp_state="running")),
    "out of range": ("'cpu-0': mp_state", lambda s: change(s, "cpu-0", mp_state=11)),
    "nested unknown": (r"'cpu-0': regs\.rxx: unknown", lambda s: inside(s, "cpu-0", "regs", rxx=1)),
    "nested missing": (r"'cpu-0': regs\.rbx: missing", lambda s: change(s, "cpu-0", regs={"rax": 1})),
    "too wide": (r"'cpu-0': regs\.rip: more than 64", lambda s: inside(s, "cpu-0", "regs", rip=1 << 64)),
    "negative": ("'cpu-0': regs", lambda s: inside(s, "cpu-0", "regs", rip=-1)),
    "short blob": ("'cpu-0': xsave", lambda s: change(s, "cpu-0", xsave=b"x")),
    "short chip": ("'irqchips': pit: 1 bytes", lambda s: change(s, "irqchips", pit=b"x")),
    "unknown MSR": (r"'cpu-0': msrs\[0x1234\]: unknown", inside_msr),
    "device state": ("'serial': divisor", lambda s: change(s, "serial", divisor=1 << 16)),
    "virtio state": ("'virtio-rng': queues", lambda s: change(s, "virtio-rng", queues=[])),
    "other memory": ("'description': memory: 0 MiB", lambda s: change(s, "description", memory=[[0, 4096]])),
    "other devices": ("'description': devices: rtc were", lambda s: change(s, "description", devices=["rtc"])),
    "other TSC": ("'description': tsc_khz", lambda s: change(s, "description", tsc_khz=1000)),
    "more MSRs": (r"'description': msrs: MSR 0x1234 is not there", lambda s: longer(s, "msrs", [0x1234])),
    "more vCPUs": ("'description': cpuid: 2 vCPUs", lambda s: longer(s, "cpuid", [[]])),
}  # fmt: skip


def test_bad_state_is_refused_by_name_and_nothing_of_it_applied(make: Callable[..., Machine]) -> None:
    machine = make()
    good = saved(machine)
    before = steady(good)
    for name, (says, spoil) in BAD.items():
        with pytest.raises(SectionError, match=says):
            prepare_machine(machine, spoil(good))
        assert steady(saved(machine)) == before, name
    prepare_machine(machine, good)


def test_another_cpu_is_refused_with_the_list_of_differences(make: Callable[..., Machine]) -> None:
    machine = make()
    good = saved(machine)
    table = [dict(entry) for entry in good["description"].data["cpuid"][0]]
    leaf = next(entry for entry in table if entry["function"] == 1)
    leaf["ecx"] ^= 1 << 28
    leaf["edx"] ^= 1 << 3
    with pytest.raises(SectionError) as refused:
        prepare_machine(machine, change(good, "description", cpuid=[table]))
    assert "vCPU 0: CPUID 0x1.0 ecx" in str(refused.value) and "CPUID 0x1.0 edx" in str(refused.value)
