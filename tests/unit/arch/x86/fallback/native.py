"""The same instruction on the host's CPU and in the fallback, and how their outcomes are compared."""

from __future__ import annotations

import functools
import random
import signal

from pyvmm.arch.x86.control_registers import FLAG_AC, FLAG_DF, STATUS_FLAGS
from pyvmm.arch.x86.fallback.flags import UNDEFINED_FLAGS
from pyvmm.arch.x86.fallback.xsave_image import AVX, MXCSR_MASK_AT, ST_AT, XMM_AT, XsaveImage
from pyvmm.arch.x86.faults import Vector
from pyvmm.arch.x86.native_oracle import NativeOracle, NativeResult, NativeState
from tests.unit.arch.x86.fallback.fake_cpu import FakeCpu
from tests.unit.arch.x86.fallback.instruction_forms import GPR

SI_KERNEL = 128
# How Linux reports an exception to user space (arch/x86/kernel/traps.c): signal and si_code.
SIGNALS: dict[int, tuple[int, tuple[int, ...]]] = {
    Vector.UD: (signal.SIGILL, (2,)),
    Vector.GP: (signal.SIGSEGV, (SI_KERNEL,)),
    Vector.PF: (signal.SIGSEGV, (1, 2)),
    Vector.SS: (signal.SIGBUS, (SI_KERNEL,)),
    Vector.AC: (signal.SIGBUS, (1,)),
    Vector.MF: (signal.SIGFPE, tuple(range(1, 9))),
}
X87_INITIAL = b"\x7f\x03".ljust(24, b"\0")
_NOT_RANDOM = (9, 17, 18)
"""PKRU is rights to memory; AMX's configuration has to make sense, and its tiles need leave of Linux (arch_prctl)."""
COMPARED_FLAGS = STATUS_FLAGS | FLAG_DF | FLAG_AC


class Host:
    """The oracle with what the fallback must know about the same CPU."""

    def __init__(self, oracle: NativeOracle) -> None:
        self.oracle = oracle
        self.cpuid = functools.cache(oracle.cpuid)
        regs = oracle.run(b"\x0f\x01\xd0", NativeState(regs=FakeCpu(b"").regs)).state.regs  # xgetbv(0)
        self.xcr0 = regs.rax | regs.rdx << 32
        touched = oracle.run(b"\x0f\x57\xc0", NativeState(regs=FakeCpu(b"").regs)).state.xsave  # xorps: SSE in use
        self.mxcsr_mask = touched[MXCSR_MASK_AT : MXCSR_MASK_AT + 4]

    def component(self, number: int) -> tuple[int, int]:
        size, offset, _, _ = self.cpuid(0xD, number)
        return offset, size

    def image(self, state: bytes) -> XsaveImage:
        return XsaveImage(state, self.component)

    def random_state(self, seed: int) -> bytes:
        """Extended state with content, sometimes with components left initial.

        AVX never is: on one host (a nested one), a signal that met initial upper YMM halves in about 1 of 2000
        cases brought back those of an earlier state, which says nothing about any instruction.
        """
        chance = random.Random(seed)
        image = self.image(bytes(self.oracle.xsave_size))
        for number in range(2, 62):
            at, size = image.span(number)
            if not size or not self.xcr0 >> number & 1 or number in _NOT_RANDOM:
                continue
            if number == AVX or chance.random() < 0.7:
                image.data[at : at + size] = chance.randbytes(size)
        if chance.random() < 0.8:
            image.data[XMM_AT : XMM_AT + 256] = chance.randbytes(256)
        image.data[MXCSR_MASK_AT : MXCSR_MASK_AT + 4] = self.mxcsr_mask
        image.mxcsr = chance.choice([0x1F80, 0x1F80, 0x9FC0, 0x1FBF, 0x7F80])
        if chance.random() < 0.7:
            image.set_uint(0, 2, chance.choice([0x37F, 0x27F, 0xF7F]))
            image.set_uint(2, 2, chance.randrange(8) << 11 | chance.choice([0, 0x4700, 0x3F]))
            image.set_uint(4, 1, chance.randrange(256))
            for i in range(8):
                image.data[ST_AT + 16 * i : ST_AT + 16 * i + 10] = chance.randbytes(10)
        return image.finish()

    def cpu(self, code: bytes, state: NativeState, data: bytes, *, bits: int = 64) -> FakeCpu:
        """The fallback's CPU in the same state."""
        cpu = FakeCpu(code, bits=bits, data=data)
        cpu.regs = state.regs
        cpu.sregs.fs.base = cpu.sregs.gs.base = 0
        fs, gs = (type(cpu.sregs.fs)(**_fields(cpu.sregs.fs)) for _ in range(2))
        fs.base, gs.base = state.fs_base, state.gs_base
        cpu.sregs.fs, cpu.sregs.gs = fs, gs
        cpu.xsave = state.xsave or bytes(self.oracle.xsave_size)
        cpu.xcr0 = self.xcr0
        cpu.cpuid_source = self.cpuid
        return cpu


def _fields(record: object) -> dict[str, int]:
    return {name: getattr(record, name) for name in type(record).__struct_fields__}  # type: ignore[attr-defined]


def assert_same_registers(cpu: FakeCpu, native: NativeResult, mnemonic: str) -> None:
    """General registers, RIP, segment bases, and the flags that the architecture defines."""
    regs = native.state.regs
    ours = {name: hex(getattr(cpu.regs, name)) for name in (*GPR, "rip")}
    theirs = {name: hex(getattr(regs, name)) for name in (*GPR, "rip")}
    assert ours == theirs
    defined = COMPARED_FLAGS & ~UNDEFINED_FLAGS.get(mnemonic, 0)
    assert hex(cpu.regs.rflags & defined) == hex(regs.rflags & defined)
    assert (cpu.sregs.fs.base, cpu.sregs.gs.base) == (native.state.fs_base, native.state.gs_base)


def assert_same_fault(cpu: FakeCpu, native: NativeResult, *, area: int = 1) -> None:
    """Neither faulted, or both did with the same exception, and with the same CR2.

    Saving an ``area`` of several parts, each CPU has its own order: then CR2 is somewhere in it.
    """
    if native.signal is None:
        assert not cpu.injected
        return
    assert cpu.injected, f"the CPU raised {native.signal}"
    vector = cpu.injected[0][0]
    number, codes = SIGNALS[vector]
    if vector in (Vector.AC, Vector.PF) and native.signal.number != number:
        # Both apply and each CPU has its own order (SDM volume 3, table 6-2, last row).
        number, codes = SIGNALS[Vector.PF if vector == Vector.AC else Vector.AC]
        assert native.signal.number == number and native.signal.code in codes
        return
    assert native.signal.number == number and native.signal.code in codes, (cpu.injected, native.signal)
    if cpu.injected[0][0] == Vector.PF:
        assert native.signal.address - cpu.sregs.cr2 in range(area), (hex(cpu.sregs.cr2), native.signal)


TOP = 7 << 11


def assert_same_state(host: Host, ours: bytes, theirs: bytes, *, mmx_fault: bool = False) -> None:
    """x87, MXCSR, XMM and every extended component; initial and merely equal to initial are the same.

    With ``mmx_fault`` an MMX instruction faulted: some CPUs have set TOP to 0 by then, others have not.
    """
    mine, native = host.image(ours), host.image(theirs)
    if mmx_fault and not int.from_bytes(native.data[2:4], "little") & TOP:
        status = int.from_bytes(mine.data[2:4], "little")
        top = status >> 11 & 7
        mine.data[2:4] = (status & ~TOP).to_bytes(2, "little")
        stack = bytes(mine.data[ST_AT : ST_AT + 128])  # ST0 first, that is, register number TOP
        mine.data[ST_AT : ST_AT + 128] = stack[16 * (8 - top) :] + stack[: 16 * (8 - top)]
    assert mine.data[:24].hex() == native.data[:24].hex(), "x87 environment"
    # What an all-empty x87 stack holds is meaningless, and CPUs that save nothing of an initial x87 lose it.
    for i in range(8 if mine.data[:24] != X87_INITIAL else 0):
        at = ST_AT + 16 * i
        assert mine.data[at : at + 10].hex() == native.data[at : at + 10].hex(), f"ST{i}"
    assert hex(mine.mxcsr) == hex(native.mxcsr)
    for i in range(16):
        assert hex(mine.vector(i, 32)) == hex(native.vector(i, 32)), f"YMM{i}"
    for number in range(2, 62):
        at, size = native.span(number)
        assert mine.data[at : at + size] == native.data[at : at + size], f"component {number}"
