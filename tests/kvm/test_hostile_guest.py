"""A guest that pokes every port and device register, and addresses where nothing is, with random values.

What is proved is that nothing it does raises in the VMM (a vCPU thread's exception surfaces in ``run()``) and
that what nobody claims reads as all ones. The guest is a tiny interpreter in real mode with 4 GiB segments: the
test writes commands into its memory and reads the answers from there, so any sequence costs no new image.
"""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86 import layout
from pyvmm.machine.machine import Machine

Build = Callable[..., Machine]

MEMORY = 16 << 20
COMMANDS = 0x100000
"""Commands of 16 bytes: operation, address, value, answer."""
NOTHING_READ = 0x5A5A5A5A
OUT8, OUT16, OUT32, IN8, IN16, IN32, WRITE8, WRITE16, WRITE32, READ8, READ16, READ32, END = range(13)
PIO = {(True, 1): OUT8, (True, 2): OUT16, (True, 4): OUT32, (False, 1): IN8, (False, 2): IN16, (False, 4): IN32}
MMIO = {
    (True, 1): WRITE8, (True, 2): WRITE16, (True, 4): WRITE32,
    (False, 1): READ8, (False, 2): READ16, (False, 4): READ32,
}  # fmt: skip
ENDING_PORTS = {0x64, 0x92, 0xCF9, 0xF4, 0x604, 0x605}
"""Where a write may end or reset the guest."""
KERNEL_PORTS = {0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0xA0, 0xA1, 0x4D0, 0x4D1}
"""What KVM answers itself: PICs, PIT and its gate, ELCR."""
KERNEL_PAGES = {*range(0xFEC00, 0xFEC01), *range(0xFEE00, 0xFEE01), *range(0xFEFFC, 0xFF000)}
"""Likewise: IOAPIC, local APIC, and the pages for VMX."""
ENDS = {"halt", "debug-exit", "reset", "poweroff", "triple-fault", "unknown-instruction", "vcpu-error", "timeout"}
SIZES = (1, 2, 4)


class Access(NamedTuple):
    """One access of the guest's: ``value`` only matters for writes."""

    space: dict[tuple[bool, int], int]
    write: bool
    size: int
    address: int
    value: int = 0

    def encode(self) -> bytes:
        return struct.pack("<IIII", self.space[self.write, self.size], self.address, self.value, NOTHING_READ)


ASSEMBLY = """
    .code16
    cli
    lgdt gdtr
    mov eax, cr0
    or al, 1
    mov cr0, eax
    mov bx, 8
    mov ds, bx
    mov es, bx
    and al, 0xfe
    mov cr0, eax
    mov esi, 0x100000
next:
    movzx ebx, byte ptr [esi]
    mov edx, [esi + 4]
    mov eax, [esi + 8]
    mov edi, edx
    shl ebx, 1
    jmp word ptr cs:[table + ebx]
out8:  out dx, al
    jmp done
out16: out dx, ax
    jmp done
out32: out dx, eax
    jmp done
in8:   in al, dx
    jmp save
in16:  in ax, dx
    jmp save
in32:  in eax, dx
    jmp save
write8:  mov [edi], al
    jmp done
write16: mov [edi], ax
    jmp done
write32: mov [edi], eax
    jmp done
read8:   mov al, [edi]
    jmp save
read16:  mov ax, [edi]
    jmp save
read32:  mov eax, [edi]
save: mov [esi + 12], eax
done: add esi, 16
    jmp next
end: cli
    hlt
    jmp end
table: .word out8, out16, out32, in8, in16, in32, write8, write16, write32, read8, read16, read32, end
    .balign 8
gdt: .quad 0, 0x00cf92000000ffff
gdtr: .word 15
    .long gdt
"""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("interpreter")
    (folder / "poke.s").write_text(".intel_syntax noprefix\n" + ASSEMBLY)
    for command in (
        ["as", "--32", "-o", "poke.o", "poke.s"],
        ["ld", "-m", "elf_i386", "--oformat=binary", "-Ttext=0x7c00", "-e", "0x7c00", "-o", "poke.bin", "poke.o"],
    ):
        subprocess.run(command, cwd=folder, check=True, timeout=30)
    return (folder / "poke.bin").read_bytes()


def poke(build: Build, interpreter: bytes, accesses: list[Access]) -> tuple[str, list[int]]:
    """A guest that makes ``accesses``: how it ended and what it read, NOTHING_READ where it did not."""
    machine = build(interpreter, memory=MEMORY, no_reboot=True, timeout=60.0)  # 65,536 exits, on any host
    commands = b"".join(access.encode() for access in accesses) + struct.pack("<IIII", END, 0, 0, 0)
    machine.memory.write(COMMANDS, commands)
    ending = machine.run()
    answers = machine.memory.read(COMMANDS, len(commands))
    for device in machine.devices:
        device.load(device.save())  # whatever was done to it, its state is one that it takes itself
    machine.close()
    return ending.kind, [answer for (answer,) in struct.iter_unpack("<12xI", answers)][:-1]


def ones(access: Access) -> int:
    """What an access that nobody claims leaves in the answer: the upper bytes are EAX's, the command's value."""
    mask = (1 << 8 * access.size) - 1
    return access.value & ~mask & 0xFFFFFFFF | mask


def claimed_ports(build: Build, interpreter: bytes) -> set[int]:
    machine = build(interpreter, memory=MEMORY)
    return {port for r in machine.ports.ranges() for port in range(r.base, r.end)} | KERNEL_PORTS


def touches(access: Access, ports: set[int]) -> bool:
    return any((access.address + i) & 0xFFFF in ports for i in range(access.size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("write", [False, True], ids=["in", "out"])
def test_every_port(machine_of: Build, interpreter: bytes, write: bool, size: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    values = random.Random(seed)
    accesses = [Access(PIO, write, size, port, values.getrandbits(32)) for port in range(0x10000)]
    if write:
        accesses = [a for a in accesses if not touches(a, ENDING_PORTS)]
    kind, answers = poke(machine_of, interpreter, accesses)
    assert kind == "halt"
    if not write:
        claimed = claimed_ports(machine_of, interpreter)
        checked = [(a, got) for a, got in zip(accesses, answers, strict=True) if not touches(a, claimed)]
        assert len(checked) > 0xFF00
        assert [(hex(a.address), hex(got)) for a, got in checked if got != ones(a)] == []


def test_addresses_where_nothing_is(machine_of: Build, interpreter: bytes) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    values = random.Random(seed)
    accesses = []
    for _ in range(5000):
        address, size = values.randrange(MEMORY, (1 << 32) - 4), values.choice(SIZES)
        if not {address >> 12, (address + size) >> 12} & KERNEL_PAGES:
            accesses.append(Access(MMIO, values.random() < 0.4, size, address, values.getrandbits(32)))
    kind, answers = poke(machine_of, interpreter, accesses)
    assert kind == "halt"
    wrong = [
        (a, hex(got))
        for a, got in zip(accesses, answers, strict=True)
        if got != (NOTHING_READ if a.write else ones(a))
    ]
    assert wrong == []


DEVICE_PORTS = [
    *range(layout.PORT_SERIAL[0] - 2, sum(layout.PORT_SERIAL) + 1), *range(layout.PORT_ACPI_PM[0] - 2, 0x60A),
    *range(0x5E, 0x66), *range(0x6E, 0x74), 0x80, 0x91, 0x92, 0xE8, 0xE9, 0xF3, 0xF4, 0xCF8, 0xCF9, *KERNEL_PORTS,
]  # fmt: skip
port_accesses = st.builds(
    Access,
    st.just(PIO),
    st.booleans(),
    st.sampled_from(SIZES),
    st.sampled_from(DEVICE_PORTS) | st.integers(0, 0xFFFF),
    st.sampled_from([0, 1, 2, 3, 0x80, 0xFE, 0xFF, 0xD1, 0xD2, 0x2001, 0x3400]) | st.integers(0, 0xFFFFFFFF),
)
chip_accesses = st.builds(
    Access,
    st.just(MMIO),
    st.booleans(),
    st.just(4) | st.sampled_from(SIZES),
    st.builds(int.__add__, st.sampled_from([0xFEC00000, 0xFEE00000]), st.integers(0, 0xFF).map(lambda n: n * 16)),
    st.integers(0, 0xFFFFFFFF),
)
hostile = settings(
    max_examples=15, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@hostile
@given(st.lists(port_accesses, min_size=1, max_size=300))
def test_any_sequence_on_the_devices(machine_of: Build, interpreter: bytes, accesses: list[Access]) -> None:
    kind, _ = poke(machine_of, interpreter, accesses)
    assert kind in ENDS - {"timeout"}


@hostile
@given(st.lists(chip_accesses | port_accesses, min_size=1, max_size=60))
def test_any_sequence_on_the_interrupt_controllers_too(
    machine_of: Build, interpreter: bytes, accesses: list[Access]
) -> None:
    """KVM's own chips: the guest may well end itself with an INIT or an NMI, but it ends as guests do."""
    kind, _ = poke(machine_of, interpreter, accesses)
    assert kind in ENDS
