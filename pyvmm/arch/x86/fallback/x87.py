"""x87 control instructions, FWAIT, EMMS, and the MMX view of the x87 registers.

Source: Intel SDM volume 1, sections 8.1 (environment) and 9.5-9.6 (MMX on x87 registers); volume 2 per
instruction; volume 3, section 2.5 (CR0's MP, EM, TS and NE).
"""

from __future__ import annotations

from pyvmm.arch.x86.control_registers import CR0_EM, CR0_MP, CR0_NE, CR0_TS
from pyvmm.arch.x86.fallback.execution import Execution
from pyvmm.arch.x86.fallback.registry import handles
from pyvmm.arch.x86.fallback.xsave_image import FCW_INIT, MXCSR_AT, ST_AT
from pyvmm.arch.x86.faults import CpuFault, Vector, undefined

FCW_AT, FSW_AT, FTW_AT = 0, 2, 4
FSW_SUMMARY = 1 << 7
FSW_BUSY = 1 << 15
FSW_TOP = 7 << 11
EXCEPTIONS = 0x3F
FCW_WRITABLE = 0x1F3F
FCW_ALWAYS_SET = 0x40


def require_x87(x: Execution) -> None:
    """#NM if the x87 is emulated or belongs to another task."""
    if x.sregs.cr0 & (CR0_EM | CR0_TS):
        raise CpuFault(Vector.NM)


def require_mmx(x: Execution) -> None:
    """MMX's checks, and a pending x87 exception is raised first."""
    if x.sregs.cr0 & CR0_EM:
        raise undefined()
    if x.sregs.cr0 & CR0_TS:
        raise CpuFault(Vector.NM)
    raise_pending(x)


def raise_pending(x: Execution) -> None:
    """#MF if an unmasked x87 exception waits."""
    if x.fpu.uint(FSW_AT, 2) & FSW_SUMMARY:
        if not x.sregs.cr0 & CR0_NE:
            raise x.unknown("x87 exception by external interrupt, CR0.NE = 0")
        raise CpuFault(Vector.MF)


def update_summary(x: Execution) -> None:
    """FSW.ES and .B follow the unmasked exceptions."""
    status, control = x.fpu.uint(FSW_AT, 2), x.fpu.uint(FCW_AT, 2)
    status &= ~(FSW_SUMMARY | FSW_BUSY)
    if status & ~control & EXCEPTIONS:
        status |= FSW_SUMMARY | FSW_BUSY
    x.fpu.set_uint(FSW_AT, 2, status)


@handles("wait")
def wait(x: Execution) -> None:
    """FWAIT: raise what is pending. TS counts only together with MP."""
    if x.sregs.cr0 & CR0_MP and x.sregs.cr0 & CR0_TS:
        raise CpuFault(Vector.NM)
    raise_pending(x)


@handles("fninit")
def fninit(x: Execution) -> None:
    """Control word 37FH, all else zero, all registers empty; their contents stay."""
    require_x87(x)
    x.fpu.data[:MXCSR_AT] = FCW_INIT.to_bytes(2, "little") + bytes(MXCSR_AT - 2)


@handles("fnclex")
def fnclex(x: Execution) -> None:
    """Clear the exception flags, SF, ES and B."""
    require_x87(x)
    x.fpu.set_uint(FSW_AT, 2, x.fpu.uint(FSW_AT, 2) & 0x7F00)


@handles("fnstcw")
def fnstcw(x: Execution) -> None:
    """Store the control word."""
    require_x87(x)
    x.store(x.operands[0], x.fpu.uint(FCW_AT, 2))


@handles("fnstsw")
def fnstsw(x: Execution) -> None:
    """Store the status word in memory or AX."""
    require_x87(x)
    x.store(x.operands[0], x.fpu.uint(FSW_AT, 2))


@handles("fldcw")
def fldcw(x: Execution) -> None:
    """Load the control word; unmasking a flagged exception makes it pending."""
    require_x87(x)
    raise_pending(x)
    x.fpu.set_uint(FCW_AT, 2, x.load(x.operands[0]) & FCW_WRITABLE | FCW_ALWAYS_SET)
    update_summary(x)


@handles("emms")
def emms(x: Execution) -> None:
    """All x87 registers empty."""
    require_mmx(x)
    enter_mmx(x)
    x.fpu.set_uint(FTW_AT, 1, 0)


def enter_mmx(x: Execution) -> None:
    """What every MMX instruction does to the x87: top of stack 0, all tags valid.

    The image holds ST(i), MMX names physical registers: moving the top to 0 rotates the image.
    """
    image = x.fpu
    status = image.uint(FSW_AT, 2)
    top = (status & FSW_TOP) >> 11
    slots = [bytes(image.data[ST_AT + 16 * i : ST_AT + 16 * i + 16]) for i in range(8)]
    for i in range(8):
        image.data[ST_AT + 16 * i : ST_AT + 16 * i + 16] = slots[(i - top) % 8]
    image.set_uint(FSW_AT, 2, status & ~FSW_TOP)
    image.set_uint(FTW_AT, 1, 0xFF)


def load_mm(x: Execution, number: int) -> int:
    """64 bits of an MMX register; call :func:`enter_mmx` first."""
    return x.fpu.uint(ST_AT + 16 * number, 8)


def store_mm(x: Execution, number: int, value: int) -> None:
    """Set it; the exponent above it becomes all ones."""
    x.fpu.set_uint(ST_AT + 16 * number, 10, value | 0xFFFF << 64)
