"""Save, load, save is the identity, whatever a guest has done to its devices and its vCPU before.

The guest here is hypothesis: accesses to any port and any window of a real machine, a virtio driver's steps among them,
and registers that KVM takes. What ends or resets a machine is left out: it is carried out by the loop, not in a state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.cpu_state import load_cpu, save_cpu
from pyvmm.kvm.state import Regs
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import BalloonConfig, ConsoleConfig, DiskConfig, RngConfig, VsockConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import Region
from pyvmm.migration.machine_state import load_machine, save_machine
from pyvmm.migration.sections import decode_sections, encode_sections
from tests.migration.test_machine_state import Sections, steady

ENDS = ("reset-control", "shutdown-port", "debug-exit", "acpi-pm", "i8042", "system-port-a", "debug-console", "serial")
"""Ports that end or reset the machine, or whose output is not state; i8042 and the UART have properties of their own
(tests/unit/devices).
"""
VIRTIO_WINDOW = 0x1000
STATUS, SELECT, SIZE, READY = 0x70, 0x30, 0x38, 0x44
FEATURES_SELECT, FEATURES = 0x24, 0x20
RINGS = ((0x80, 0x84), (0x90, 0x94), (0xA0, 0xA4))
U64 = st.integers(0, (1 << 64) - 1)


@dataclasses.dataclass(frozen=True)
class Access:
    """One of the guest's, at ``offset`` of the ``place``-th range of a bus; read if ``value`` is ``None``."""

    mmio: bool
    place: int
    offset: int
    size: int
    value: int | None


ACCESSES = st.builds(
    Access, st.booleans(), st.integers(0, 63), st.integers(0, 0x120) | st.sampled_from([STATUS, SELECT, SIZE, READY]),
    st.sampled_from([1, 2, 4]), st.none() | st.integers(0, 0xFF) | st.integers(0, 0xFFFFFFFF),
)  # fmt: skip
DRIVEN = st.dictionaries(st.integers(0, 4), st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)))
"""For virtio slots: how far a driver has come (status bits, queues made ready), and in which page its rings begin."""
REGS = st.builds(Regs, **{name: U64 for name in Regs.__struct_fields__ if name != "rflags"})
HALTED, RUNNABLE = 3, 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    """Two machines of one make that have not run; nobody runs their loops."""
    install_kick_signal()
    folder = tmp_path_factory.mktemp("any-state")
    (folder / "spin.bin").write_bytes(b"\xeb\xfe".ljust(512, b"\0"))
    made: list[Machine] = []
    try:
        for name in ("one", "two"):
            (folder / name).write_bytes(bytes(1 << 16))
            devices = (
                RngConfig(), DiskConfig(path=str(folder / name)), BalloonConfig(),
                ConsoleConfig(path=str(folder / f"{name}.console")), VsockConfig(cid=3, path=str(folder / f"{name}.v")),
            )  # fmt: skip
            config = MachineConfig(
                image=str(folder / "spin.bin"), memory=2 << 20, serial="null", devices=devices, cpus=2
            )
            made.append(build_machine(config, frozenset(), saved_ram=Region))
        yield made[0], made[1]
    finally:
        for machine in made:
            machine.close()


def saved(machine: Machine) -> Sections:
    return decode_sections(encode_sections(save_machine(machine)))


def comparable(sections: Sections) -> dict[str, Any]:
    """Without what is to be otherwise: a socket device that was loaded tells its driver that connections are gone."""
    fields = steady(sections)
    vsock = fields["virtio-vsock"]
    fields["virtio-vsock"] = {**vsock, "device": {**vsock["device"], "reset_wanted": True}}
    return fields


def carry_out(machine: Machine, access: Access) -> None:
    bus = machine.mmio if access.mmio else machine.ports
    ranges = [one for one in bus.ranges() if one.device.section_id not in ENDS]
    where = ranges[access.place % len(ranges)]
    address = where.base + access.offset % where.length
    if access.value is None:
        bus.read(address, access.size)
    else:
        bus.write(address, access.size, access.value % (1 << 8 * access.size))


def drive(machine: Machine, slot: int, steps: int, queues: int, page: int) -> None:
    """As a driver begins (virtio 1.2, 3.1.1): status bit by bit, features, then ``queues`` queues made ready."""
    windows = [one for one in machine.mmio.ranges() if one.length == VIRTIO_WINDOW]
    base = windows[slot % len(windows)].base

    def write(register: int, value: int) -> None:
        machine.mmio.write(base + register, 4, value)

    for status in ((0,), (0, 1), (0, 1, 3), (0, 1, 3, 11))[steps]:
        if status == 11:
            write(FEATURES_SELECT, 1)
            write(FEATURES, 1)  # VIRTIO_F_VERSION_1, without which FEATURES_OK is not taken
        write(STATUS, status)
    for queue in range(queues):
        write(SELECT, queue)
        write(SIZE, 8)
        for number, (low, high) in enumerate(RINGS):
            write(low, 0x100000 + (page + 3 * queue + number << 12))
            write(high, 0)
        write(READY, 1)
    if steps == 3:
        write(STATUS, 15)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(ACCESSES, max_size=30), DRIVEN, st.lists(ACCESSES, max_size=10), REGS,
    st.sampled_from([HALTED, RUNNABLE]), st.booleans(), st.tuples(U64, U64, U64, U64),
)  # fmt: skip
def test_save_load_save_is_the_identity(
    pair: tuple[Machine, Machine], before: list[Access], driven: dict[int, tuple[int, int, int]], after: list[Access],
    regs: Regs, mp_state: int, nmi: bool, breakpoints: tuple[int, int, int, int],
) -> None:  # fmt: skip
    first, second = pair
    for access in before:
        carry_out(first, access)
    for slot, (steps, queues, page) in driven.items():
        drive(first, slot, steps, queues, page)
    for access in after:
        carry_out(first, access)
    vcpu, msrs = first.vcpus[0], first.power_on_state.msrs[0]
    state = save_cpu(vcpu, msrs)
    state.regs, state.mp_state = regs, mp_state
    state.events = msgspec.structs.replace(state.events, nmi_pending=int(nmi))
    state.debugregs = msgspec.structs.replace(state.debugregs, db=breakpoints)
    load_cpu(vcpu, state)

    sections = saved(first)
    expected = comparable(sections)
    assert sections["cpu-0"].data["regs"]["r15"] == regs.r15
    assert load_machine(second, sections) == []
    assert comparable(saved(second)) == expected
    assert load_machine(first, sections) == [], "and it is its own twin"
    assert comparable(saved(first)) == expected


def test_what_is_driven_is_in_the_state(pair: tuple[Machine, Machine]) -> None:
    """The steps above reach a driver that is ready, with queues: the property is about something."""
    machine = pair[0]
    for slot in range(5):
        drive(machine, slot, 3, 1, 0)
    transports: dict[str, Any] = {n: s.data for n, s in saved(machine).items() if n.startswith("virtio")}
    assert len(transports) == 5
    for name, data in transports.items():
        assert data["status"] == 15 and data["queues"][0]["ready"], name
