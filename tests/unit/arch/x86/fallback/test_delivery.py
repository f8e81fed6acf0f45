"""Software interrupts through real-mode, 32-bit and 64-bit tables built in memory."""

from __future__ import annotations

import struct

import pytest

from pyvmm.arch.x86.control_registers import FLAG_AC, FLAG_IF, FLAG_NT, FLAG_OF, FLAG_TF
from pyvmm.arch.x86.faults import Vector
from pyvmm.errors import UnknownInstructionError
from pyvmm.kvm.state import Dtable, Segment
from tests.unit.arch.x86.fallback.fake_cpu import CODE, DATA, FakeCpu

IDT, GDT, TSS = DATA, DATA + 0x1000, DATA + 0x1800
STACK, INNER_STACK, IST = DATA + 0x2F08, DATA + 0x3000, DATA + 0x3800
HANDLER = 0x12345678
KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA = 0x08, 0x10, 0x18, 0x20
FLAGS = FLAG_IF | FLAG_TF | FLAG_NT | FLAG_AC | 2


def descriptor(kind: int, dpl: int, *, long: int = 0, db: int = 1, present: int = 1, limit: int = 0xFFFFF) -> int:
    access = present << 7 | dpl << 5 | 1 << 4 | kind
    return limit & 0xFFFF | access << 40 | (limit >> 16) << 48 | long << 53 | db << 54 | 1 << 55


def machine(code: str, *, bits: int, cpl: int = 0) -> FakeCpu:
    cpu = FakeCpu(bytes.fromhex(code), bits=bits, cpl=cpl)
    long = int(bits == 64)
    table = [
        0,
        descriptor(0xB, 0, long=long, db=1 - long),
        descriptor(0x3, 0),
        descriptor(0xB, 3, long=long, db=1 - long),
        descriptor(0x3, 3),
    ]
    put(cpu, GDT, struct.pack(f"<{len(table)}Q", *table))
    cpu.sregs.gdt = Dtable(base=GDT, limit=8 * len(table) - 1)
    cpu.sregs.idt = Dtable(base=IDT, limit=0xFFF)
    cpu.sregs.tr = Segment(base=TSS, limit=0x67, selector=0x40, type=0xB, present=1)
    if long:
        put(cpu, TSS, struct.pack("<IQ", 0, INNER_STACK))
        put(cpu, TSS + 0x24, struct.pack("<Q", IST))
    else:
        put(cpu, TSS + 4, struct.pack("<II", INNER_STACK, KERNEL_DATA))
    selectors = (USER_CODE | 3, USER_DATA | 3) if cpl else (KERNEL_CODE, KERNEL_DATA)
    cpu.sregs.cs.selector, cpu.sregs.ss.selector = selectors
    cpu.regs.rsp, cpu.regs.rflags = STACK, FLAGS
    return cpu


def put(cpu: FakeCpu, address: int, data: bytes) -> None:
    cpu.data[address - DATA : address - DATA + len(data)] = data


def words(cpu: FakeCpu, address: int, size: int, count: int) -> list[int]:
    raw = cpu.data[address - DATA : address - DATA + size * count]
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, size * count, size)]


def gate(
    cpu: FakeCpu, vector: int, *, kind: int = 0xE, dpl: int = 3, present: int = 1, selector: int = KERNEL_CODE,
    ist: int = 0, offset: int = HANDLER, wide: bool = True,
) -> None:  # fmt: skip
    access = kind | dpl << 5 | present << 7
    low = offset & 0xFFFF | selector << 16 | ist << 32 | access << 40 | (offset >> 16 & 0xFFFF) << 48
    if wide:
        put(cpu, IDT + 16 * vector, struct.pack("<QQ", low, offset >> 32))
    else:
        put(cpu, IDT + 8 * vector, struct.pack("<Q", low))


class TestLongMode:
    @pytest.mark.parametrize(("code", "vector"), [("cc", 3), ("cd80", 0x80), ("cd03", 3)])
    def test_same_level(self, code: str, vector: int) -> None:
        cpu = machine(code, bits=64)
        gate(cpu, vector, offset=0xFFFF_8000_1234_5678)
        cpu.run()
        assert not cpu.injected
        assert cpu.regs.rip == 0xFFFF_8000_1234_5678
        assert cpu.regs.rsp == (STACK & ~15) - 40
        frame = words(cpu, cpu.regs.rsp, 8, 5)
        assert frame == [CODE + len(code) // 2, KERNEL_CODE, FLAGS, STACK, KERNEL_DATA]
        assert cpu.regs.rflags == FLAG_AC | 2
        assert (cpu.sregs.cs.selector, cpu.sregs.ss.selector, cpu.sregs.cs.l) == (KERNEL_CODE, KERNEL_DATA, 1)

    def test_trap_gate_keeps_interrupts_on(self) -> None:
        cpu = machine("cc", bits=64)
        gate(cpu, 3, kind=0xF)
        cpu.run()
        assert cpu.regs.rflags == FLAG_AC | FLAG_IF | 2

    def test_from_user_space(self) -> None:
        cpu = machine("cd80", bits=64, cpl=3)
        gate(cpu, 0x80)
        cpu.run()
        assert cpu.regs.rsp == INNER_STACK - 40
        assert words(cpu, cpu.regs.rsp, 8, 5) == [CODE + 2, USER_CODE | 3, FLAGS, STACK, USER_DATA | 3]
        assert (cpu.sregs.cs.selector, cpu.sregs.cs.dpl) == (KERNEL_CODE, 0)
        assert (cpu.sregs.ss.selector, cpu.sregs.ss.dpl, cpu.sregs.ss.unusable) == (0, 0, 1)

    def test_interrupt_stack_table(self) -> None:
        cpu = machine("cc", bits=64)
        gate(cpu, 3, ist=1)
        cpu.run()
        assert cpu.regs.rsp == IST - 40

    @pytest.mark.parametrize(
        ("change", "vector", "error"),
        [
            ({"dpl": 0}, Vector.GP, 0x80 * 8 + 2),
            ({"present": 0}, Vector.NP, 0x80 * 8 + 2),
            ({"kind": 0x6}, Vector.GP, 0x80 * 8 + 2),
            ({"kind": 0x5}, Vector.GP, 0x80 * 8 + 2),
            ({"selector": 3}, Vector.GP, 0),
            ({"selector": 0x28}, Vector.GP, 0x28),
            ({"selector": KERNEL_DATA}, Vector.GP, KERNEL_DATA),
            ({"selector": KERNEL_CODE | 4}, Vector.GP, KERNEL_CODE | 4),
            ({"offset": 1 << 47}, Vector.GP, 0),
            ({"ist": 7}, Vector.SS, 0),
        ],
    )
    def test_refused(self, change: dict[str, int], vector: Vector, error: int) -> None:
        cpu = machine("cd80", bits=64, cpl=3)
        put(cpu, TSS + 0x24 + 8 * 6, struct.pack("<Q", (1 << 47) + 64))
        gate(cpu, 0x80, **change)  # type: ignore[arg-type]
        before = bytes(cpu.data)
        cpu.run()
        assert cpu.injected == [(vector, error)]
        assert cpu.regs.rip == CODE and cpu.regs.rsp == STACK and bytes(cpu.data) == before

    def test_beyond_the_table(self) -> None:
        cpu = machine("cd80", bits=64)
        cpu.sregs.idt = Dtable(base=IDT, limit=0x80 * 16 + 14)
        cpu.run()
        assert cpu.injected == [(Vector.GP, 0x80 * 8 + 2)]

    def test_task_state_too_short(self) -> None:
        cpu = machine("cd80", bits=64, cpl=3)
        gate(cpu, 0x80)
        cpu.sregs.tr = Segment(base=TSS, limit=10, selector=0x43, type=0xB, present=1)
        cpu.run()
        assert cpu.injected == [(Vector.TS, 0x40)]

    def test_absent_code_segment(self) -> None:
        cpu = machine("cc", bits=64)
        gate(cpu, 3)
        put(cpu, GDT + KERNEL_CODE, struct.pack("<Q", descriptor(0xB, 0, long=1, db=0, present=0)))
        cpu.run()
        assert cpu.injected == [(Vector.NP, KERNEL_CODE)]

    def test_accessed_bit_is_set(self) -> None:
        cpu = machine("cc", bits=64)
        gate(cpu, 3)
        put(cpu, GDT + KERNEL_CODE, struct.pack("<Q", descriptor(0xA, 0, long=1, db=0)))
        cpu.run()
        assert cpu.data[GDT + KERNEL_CODE + 5 - DATA] & 1 and cpu.sregs.cs.type == 0xB

    def test_unmapped_stack(self) -> None:
        cpu = machine("cc", bits=64)
        gate(cpu, 3)
        cpu.regs.rsp = 0x5000
        cpu.run()
        assert [v for v, _ in cpu.injected] == [Vector.PF] and cpu.sregs.cr2 == 0x5000 - 40


class TestProtectedMode:
    @pytest.mark.parametrize(("code", "vector"), [("cc", 3), ("cd21", 0x21), ("ce", 4)])
    def test_same_level(self, code: str, vector: int) -> None:
        cpu = machine(code, bits=32)
        cpu.regs.rflags |= FLAG_OF
        gate(cpu, vector, wide=False)
        cpu.run()
        assert cpu.regs.rip == HANDLER and cpu.regs.rsp == STACK - 12
        assert words(cpu, cpu.regs.rsp, 4, 3) == [CODE + len(code) // 2, KERNEL_CODE, FLAGS | FLAG_OF]

    def test_from_user_space(self) -> None:
        cpu = machine("cc", bits=32, cpl=3)
        gate(cpu, 3, wide=False)
        cpu.run()
        assert cpu.regs.rsp == INNER_STACK - 20
        assert words(cpu, cpu.regs.rsp, 4, 5) == [CODE + 1, USER_CODE | 3, FLAGS, STACK, USER_DATA | 3]
        assert (cpu.sregs.ss.selector, cpu.sregs.ss.dpl) == (KERNEL_DATA, 0)

    def test_16_bit_gate(self) -> None:
        cpu = machine("cc", bits=32)
        gate(cpu, 3, kind=0x7, offset=0x4321, wide=False)
        cpu.run()
        assert cpu.regs.rip == 0x4321 and cpu.regs.rsp == STACK - 6
        assert words(cpu, cpu.regs.rsp, 2, 3) == [(CODE + 1) & 0xFFFF, KERNEL_CODE, FLAGS & 0xFFFF]
        assert cpu.regs.rflags & FLAG_IF

    @pytest.mark.parametrize(
        ("selector", "error"),
        [(0, 0), (KERNEL_DATA | 3, KERNEL_DATA), (USER_DATA, USER_DATA), (KERNEL_CODE, 8), (0x28, 0x28)],
    )
    def test_bad_inner_stack(self, selector: int, error: int) -> None:
        cpu = machine("cc", bits=32, cpl=3)
        gate(cpu, 3, wide=False)
        put(cpu, TSS + 8, struct.pack("<I", selector))
        cpu.run()
        assert cpu.injected == [(Vector.TS, error)]

    def test_handler_beyond_its_segment(self) -> None:
        cpu = machine("cc", bits=32)
        gate(cpu, 3, wide=False)
        put(cpu, GDT + KERNEL_CODE, struct.pack("<Q", descriptor(0xB, 0, limit=0x10)))
        cpu.run()
        assert cpu.injected == [(Vector.GP, 0)]

    def test_task_gate_is_unknown(self) -> None:
        cpu = machine("cc", bits=32)
        gate(cpu, 3, kind=0x5, wide=False)
        with pytest.raises(UnknownInstructionError, match="task gate"):
            cpu.run()


class TestRealMode:
    def machine(self, code: str) -> FakeCpu:
        cpu = FakeCpu(bytes.fromhex(code), bits=16, cpl=0, rip=CODE)
        cpu.sregs.cr0 &= ~0x80000001
        cpu.sregs.cs = Segment(base=CODE, selector=0x1000, type=0xB, present=1, s=1)
        cpu.sregs.ss = Segment(base=DATA, selector=0x2000, type=3, present=1, s=1)
        cpu.sregs.idt = Dtable(base=DATA + 0x2000, limit=0x3FF)
        cpu.regs.rip, cpu.regs.rsp, cpu.regs.rflags = 0, 0xABCD_1000, FLAG_IF | FLAG_TF | FLAG_OF | 2
        return cpu

    @pytest.mark.parametrize(("code", "vector"), [("cc", 3), ("cd10", 0x10), ("ce", 4)])
    def test_through_the_vector_table(self, code: str, vector: int) -> None:
        cpu = self.machine(code)
        put(cpu, DATA + 0x2000 + 4 * vector, struct.pack("<HH", 0x5678, 0x1234))
        cpu.run()
        assert (cpu.regs.rip, cpu.sregs.cs.selector, cpu.sregs.cs.base) == (0x5678, 0x1234, 0x12340)
        assert cpu.regs.rsp == 0xABCD_0FFA
        assert words(cpu, DATA + 0xFFA, 2, 3) == [len(code) // 2, 0x1000, FLAG_IF | FLAG_TF | FLAG_OF | 2]
        assert cpu.regs.rflags == FLAG_OF | 2

    def test_beyond_the_table(self) -> None:
        cpu = self.machine("cd10")
        cpu.sregs.idt = Dtable(base=DATA + 0x2000, limit=0x41)
        cpu.run()
        assert cpu.injected == [(Vector.GP, None)]

    def test_stack_pointer_wraps_at_64_kib(self) -> None:
        cpu = self.machine("cc")
        cpu.regs.rsp = 1
        cpu.run()
        assert cpu.injected == [(Vector.SS, None)]
