"""Privileged and random instructions, which have no native counterpart at CPL 3, and what emulate() itself does."""

from __future__ import annotations

import struct

import msgspec
import pytest

from pyvmm.arch.x86.control_registers import (
    CR4_FSGSBASE,
    CR4_PCIDE,
    CR4_TSD,
    FLAG_AC,
    FLAG_CF,
    FLAG_OF,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    FLAG_ZF,
    STATUS_FLAGS,
)
from pyvmm.arch.x86.faults import PF_FETCH, PF_USER, Vector
from pyvmm.errors import UnknownInstructionError
from pyvmm.kvm.state import Regs, Segment
from tests.unit.arch.x86.fallback.fake_cpu import CODE, DATA, PAGE, FakeCpu, Mapping

GP0 = [(Vector.GP, 0)]
UD = [(Vector.UD, None)]


def cpu_with(code: str, *, cpl: int = 0, bits: int = 64, **registers: int) -> FakeCpu:
    cpu = FakeCpu(bytes.fromhex(code), cpl=cpl, bits=bits)
    for name, value in registers.items():
        setattr(cpu.regs, name, value)
    return cpu


class TestAccessControl:
    @pytest.mark.parametrize(("code", "before", "after"), [("0f01cb", 2, FLAG_AC | 2), ("0f01ca", FLAG_AC | 2, 2)])
    def test_flag(self, code: str, before: int, after: int) -> None:
        cpu = cpu_with(code, rflags=before)
        cpu.run()
        assert (cpu.regs.rflags, cpu.regs.rip, cpu.injected) == (after, CODE + 3, [])

    @pytest.mark.parametrize("code", ["0f01cb", "0f01ca"])
    def test_user_space_gets_undefined(self, code: str) -> None:
        cpu = cpu_with(code, cpl=3)
        cpu.run()
        assert cpu.injected == UD and cpu.regs.rip == CODE


class TestInvpcid:
    def run(self, kind: int, pcid: int = 0, address: int = 0, *, pcide: bool = True, cpl: int = 0) -> FakeCpu:
        cpu = cpu_with("660f388207", cpl=cpl, rax=kind, rdi=DATA)
        cpu.data[:16] = struct.pack("<QQ", pcid, address)
        if pcide:
            cpu.sregs.cr4 |= CR4_PCIDE
        cpu.run()
        return cpu

    @pytest.mark.parametrize("kind", range(4))
    def test_flushes(self, kind: int) -> None:
        cpu = self.run(kind, pcid=5, address=0x1000)
        assert (cpu.flushes, cpu.injected) == (1, [])

    @pytest.mark.parametrize(
        ("kind", "pcid", "address", "pcide", "cpl"),
        [
            (4, 0, 0, True, 0),
            (0, 0x1000, 0, True, 0),
            (3, 1 << 63, 0, True, 0),
            (0, 0, 1 << 47, True, 0),
            (0, 1, 0, False, 0),
            (1, 1, 0, False, 0),
            (2, 0, 0, True, 3),
        ],
    )
    def test_refuses(self, kind: int, pcid: int, address: int, pcide: bool, cpl: int) -> None:
        cpu = self.run(kind, pcid, address, pcide=pcide, cpl=cpl)
        assert (cpu.flushes, cpu.injected) == (0, GP0)

    def test_without_pcide_the_rest_is_allowed(self) -> None:
        assert self.run(2, pcid=1, pcide=False).flushes == 1


class TestSegmentBase:
    @pytest.mark.parametrize("code", ["f3480faec0", "f3480faec8", "f3480faed0", "f3480faed8"])
    def test_needs_cr4_bit(self, code: str) -> None:
        cpu = cpu_with(code)
        cpu.sregs.cr4 &= ~CR4_FSGSBASE
        cpu.run()
        assert cpu.injected == UD

    @pytest.mark.parametrize("code", ["f30faec0", "f30faed0"])
    def test_is_undefined_outside_64_bit_mode(self, code: str) -> None:
        cpu = cpu_with(code, bits=32)
        with pytest.raises(UnknownInstructionError):  # not even an encoding there
            cpu.run()

    def test_not_canonical(self) -> None:
        cpu = cpu_with("f3480faed0", rax=1 << 47)
        cpu.run()
        assert cpu.injected == GP0 and cpu.sregs.fs.base == 0

    def test_only_the_named_one_changes(self) -> None:
        cpu = cpu_with("f3480faed8", rax=0x1234)
        before = cpu.sregs
        cpu.run()
        assert (cpu.sregs.gs.base, cpu.sregs.fs.base, before.gs.base) == (0x1234, 0, 0)


class TestProcessorAndTime:
    def test_rdpid(self) -> None:
        cpu = cpu_with("f30fc7f8", cpl=3, rax=(1 << 64) - 1)
        cpu.msrs[0xC0000103] = 0x1234
        cpu.run()
        assert cpu.regs.rax == 0x1234

    def test_rdtscp(self) -> None:
        cpu = cpu_with("0f01f9", cpl=3, rax=(1 << 64) - 1, rdx=(1 << 64) - 1, rcx=(1 << 64) - 1)
        cpu.msrs |= {0x10: 0x1_2345_6789_ABCD, 0xC0000103: 7}
        cpu.run()
        assert (cpu.regs.rax, cpu.regs.rdx, cpu.regs.rcx) == (0x6789ABCD, 0x12345, 7)

    @pytest.mark.parametrize(("cpl", "faults"), [(0, False), (3, True)])
    def test_rdtscp_with_tsd(self, cpl: int, faults: bool) -> None:
        cpu = cpu_with("0f01f9", cpl=cpl)
        cpu.sregs.cr4 |= CR4_TSD
        cpu.run()
        assert cpu.injected == (GP0 if faults else [])


class TestRandom:
    @pytest.mark.parametrize("opcode", ["f0", "f8"])
    @pytest.mark.parametrize(("prefix", "size"), [("66", 2), ("", 4), ("48", 8)])
    def test_value_size_and_flags(self, opcode: str, prefix: str, size: int) -> None:
        cpu = cpu_with(f"{prefix}0fc7{opcode}", cpl=3, rax=(1 << 64) - 1, rflags=STATUS_FLAGS & ~FLAG_CF | 2)
        asked: list[int] = []

        def source(size: int) -> bytes:
            asked.append(size)
            return bytes(range(1, size + 1))

        cpu.random_bytes = source  # type: ignore[method-assign]
        cpu.run()
        value = int.from_bytes(bytes(range(1, size + 1)), "little")
        kept = 0xFFFFFFFFFFFF0000 if size == 2 else 0
        assert (asked, cpu.regs.rax) == ([size], value | kept)
        assert cpu.regs.rflags & STATUS_FLAGS == FLAG_CF

    def test_the_real_source_differs(self) -> None:
        values = set()
        for _ in range(4):
            cpu = cpu_with("480fc7f0", cpl=3)
            cpu.run()
            values.add(cpu.regs.rax)
        assert len(values) == 4


class TestEntryPoint:
    def test_resume_and_trap_flags(self) -> None:
        cpu = cpu_with("f30fb8c1", rflags=FLAG_RF | FLAG_TF | 2)
        cpu.run()
        assert cpu.regs.rflags == FLAG_TF | FLAG_ZF | 2
        assert cpu.done == [True]

    def test_a_fault_does_not_complete(self) -> None:
        cpu = cpu_with("f30fb801", rflags=FLAG_RF | FLAG_TF | 2, rcx=0x1234)
        before = Regs(**{name: getattr(cpu.regs, name) for name in Regs.__struct_fields__})
        cpu.run()
        assert cpu.regs == before and not cpu.done
        assert cpu.injected == [(Vector.PF, 0)] and cpu.sregs.cr2 == 0x1234

    @pytest.mark.parametrize("code", ["0fa2", "90", "62f17c481000", "ffff", "0f0b"])
    def test_unknown(self, code: str) -> None:
        cpu = cpu_with(code)
        with pytest.raises(UnknownInstructionError) as caught:
            cpu.run()
        assert caught.value.rip == CODE and caught.value.code.startswith(bytes.fromhex(code))
        assert cpu.regs.rip == CODE and not cpu.injected and not cpu.done

    def test_string_movsd_is_not_sse_movsd(self) -> None:
        with pytest.raises(UnknownInstructionError):
            cpu_with("a5").run()

    def test_virtual_8086_mode_is_unknown(self) -> None:
        with pytest.raises(UnknownInstructionError):
            cpu_with("f30fb8c1", bits=16, rflags=FLAG_VM | 2).run()

    @pytest.mark.parametrize("code", ["f0f30fb8c1", "f00f2807", "f00fae27", "f0c4e2f1f7c0"])
    def test_lock_where_it_must_not_be(self, code: str) -> None:
        cpu = cpu_with(code, rdi=DATA)
        cpu.run()
        assert cpu.injected == UD and cpu.regs.rip == CODE

    def test_locked_compare_exchange(self) -> None:
        cpu = cpu_with("f0480fc70f", rdi=DATA, rax=1, rdx=2, rbx=3, rcx=4)
        cpu.data[:16] = struct.pack("<QQ", 1, 2)
        cpu.run()
        assert bytes(cpu.data[:16]) == struct.pack("<QQ", 3, 4) and cpu.regs.rflags & FLAG_ZF

    def test_code_across_an_unmapped_page(self) -> None:
        cpu = FakeCpu(bytes.fromhex("f30fb8"), rip=CODE + PAGE - 3)
        cpu.run()
        assert cpu.injected == [(Vector.PF, PF_USER | PF_FETCH)] and cpu.sregs.cr2 == CODE + PAGE

    def test_device_memory_is_unknown(self) -> None:
        cpu = cpu_with("0f1007", rdi=0xFEE00000)
        cpu.mappings.append(Mapping(0xFEE00000, bytearray(PAGE), ram=False))
        with pytest.raises(UnknownInstructionError, match="outside guest memory"):
            cpu.run()
        assert not cpu.injected

    @pytest.mark.parametrize(("code", "kind"), [("0f1004 24", Vector.SS), ("0f1007", Vector.GP)])
    def test_non_canonical(self, code: str, kind: Vector) -> None:
        cpu = cpu_with(code, rsp=1 << 47, rdi=(1 << 47) - 8)  # the second one only ends beyond the hole
        cpu.run()
        assert cpu.injected == [(kind, 0)]


class TestSegmentation:
    def run(self, code: str, bits: int, change: dict[str, int], **registers: int) -> FakeCpu:
        cpu = cpu_with(code, bits=bits, **registers)
        cpu.sregs.ds = msgspec.structs.replace(cpu.sregs.ds, **change)
        cpu.run()
        return cpu

    def test_base_and_16_bit_addressing(self) -> None:
        cpu = cpu_with("f30fb84010", bits=16, rbx=0x1_FFF0, rsi=0x20)  # popcnt ax, [bx+si+10h]: wraps to 20h
        cpu.data[0x20:0x22] = b"\xff\x01"
        cpu.sregs.cs, cpu.regs.rip = Segment(base=CODE, limit=0xFFFF, type=0xB, present=1, s=1), 0
        cpu.sregs.ds = Segment(base=DATA, limit=0xFFFF, type=3, present=1, s=1)
        cpu.run()
        assert (cpu.injected, cpu.regs.rax, cpu.regs.rip) == ([], 9, 5)

    @pytest.mark.parametrize(
        ("change", "offset", "fine"),
        [
            ({"limit": 0x1003}, 0x1000, True),
            ({"limit": 0x1002}, 0x1000, False),
            ({"unusable": 1}, 0, False),
            ({"present": 0}, 0, False),
            ({"type": 0xB}, 0, True),  # readable code
            ({"type": 0x9}, 0, False),  # execute-only code
            ({"type": 0x7, "limit": 0xFFF}, 0x1000, True),  # expand-down
            ({"type": 0x7, "limit": 0x1000}, 0x1000, False),
        ],
    )
    def test_reading(self, change: dict[str, int], offset: int, fine: bool) -> None:
        cpu = self.run("f30fb807", 32, {"base": DATA, **change}, rdi=offset)
        assert cpu.injected == ([] if fine else GP0)

    @pytest.mark.parametrize(("kind", "fine"), [(3, True), (1, False), (0xB, False)])
    def test_writing(self, kind: int, fine: bool) -> None:
        cpu = self.run("0f1107", 32, {"base": DATA, "type": kind}, rdi=0)
        assert cpu.injected == ([] if fine else GP0)

    def test_real_mode_pushes_no_error_code(self) -> None:
        cpu = cpu_with("0f1107", bits=16, rbx=0xFFF8)
        cpu.sregs.cr0 &= ~1
        cpu.sregs.ds = Segment(base=DATA, limit=0xFFFF, type=3, present=1, s=1)
        cpu.run()
        assert cpu.injected == [(Vector.GP, None)]

    def test_vex_needs_protected_mode(self) -> None:
        for code in ("c4e2f0f7c0", "c5f877"):
            cpu = cpu_with(code, bits=16)
            cpu.sregs.cr0 &= ~1
            try:
                cpu.run()
            except UnknownInstructionError:
                continue  # iced reads C4/C5 there as LES/LDS, as the CPU does
            assert cpu.injected == UD


def test_into_without_overflow_goes_on() -> None:
    cpu = cpu_with("ce", bits=32, rflags=2)
    cpu.run()
    assert (cpu.regs.rip, cpu.injected) == (CODE + 1, [])
    assert not cpu.regs.rflags & FLAG_OF
