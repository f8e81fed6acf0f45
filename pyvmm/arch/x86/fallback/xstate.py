"""FXSAVE, XSAVE and their relatives, XGETBV/XSETBV, LDMXCSR/STMXCSR.

Source: Intel SDM volume 1, chapter 13 (13.4 formats, 13.6 XINUSE, 13.7-13.12 the instructions) and section
10.5; volume 2 per instruction; volume 3, section 2.6 (XCR0).
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.arch.x86.control_registers import CR0_EM, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, EFER_FFXSR
from pyvmm.arch.x86.fallback.execution import Execution
from pyvmm.arch.x86.fallback.registry import handles
from pyvmm.arch.x86.fallback.x87 import FCW_ALWAYS_SET, FCW_AT, FCW_WRITABLE, update_summary
from pyvmm.arch.x86.fallback.xsave_image import (
    AVX,
    EXTENDED_AT,
    HI16_ZMM,
    MXCSR_AT,
    MXCSR_INIT,
    OPMASK,
    SSE,
    ST_AT,
    X87,
    XMM_AT,
    XSTATE_BV_AT,
    ZMM_HI256,
)
from pyvmm.arch.x86.faults import CpuFault, Vector, general_protection, undefined

RAX, RCX, RDX = 0, 1, 2
MSR_XSS = 0xDA0
COMPACT = 1 << 63
_REGISTER_BYTES = {AVX: 16, ZMM_HI256: 32}  # per vector register
_MPX = 3 << 3
_AVX512 = 7 << OPMASK


def require_sse(x: Execution) -> None:
    """The checks of every SSE instruction (SDM volume 3, table 14-1)."""
    if x.sregs.cr0 & CR0_EM or not x.sregs.cr4 & CR4_OSFXSR:
        raise undefined()
    if x.sregs.cr0 & CR0_TS:
        raise CpuFault(Vector.NM)


def require_avx(x: Execution) -> None:
    """The checks of VEX-encoded vector instructions (SDM volume 2, section 2.4)."""
    needed = 1 << SSE | 1 << AVX
    if not x.protected or not x.sregs.cr4 & CR4_OSXSAVE or x.xcr0 & needed != needed:
        raise undefined()
    if x.sregs.cr0 & CR0_TS:
        raise CpuFault(Vector.NM)


def _require_xsave(x: Execution) -> None:
    if not x.sregs.cr4 & CR4_OSXSAVE:
        raise undefined()
    if x.sregs.cr0 & CR0_TS:
        raise CpuFault(Vector.NM)


def _check_mxcsr(x: Execution, value: int) -> None:
    if value & ~x.fpu.mxcsr_mask:
        raise general_protection()


# -- the legacy region -----------------------------------------------------------------------------


def _x87_environment(x: Execution, wide: bool) -> bytes:
    """Bytes 23:0 of the image as stored. Without REX.W the pointers are 32 bits plus selectors.

    The selectors are stored as 0, as CPUs that deprecate FCS and FDS do (CPUID.7.0:EBX[13]): KVM exchanges
    the state in the 64-bit format, which has no place for them.
    """
    data = bytes(x.fpu.data[:MXCSR_AT])
    if wide:
        return data
    return data[:12] + bytes(4) + data[16:20] + bytes(4)


def _load_x87(x: Execution, environment: bytes, registers: bytes, wide: bool) -> None:
    """The reverse of :func:`_x87_environment`, and ST0-ST7 (10 of 16 bytes each)."""
    if not wide:
        environment = environment[:12] + bytes(4) + environment[16:20] + bytes(4)
    image = x.fpu
    image.data[:MXCSR_AT] = environment
    image.data[5] = 0  # reserved
    for i in range(8):
        image.data[ST_AT + 16 * i : ST_AT + 16 * i + 16] = registers[16 * i : 16 * i + 10] + bytes(6)
    image.set_uint(FCW_AT, 2, image.uint(FCW_AT, 2) & FCW_WRITABLE | FCW_ALWAYS_SET)
    update_summary(x)


def _xmm_bytes(x: Execution) -> int:
    """Outside 64-bit mode XMM8-15 neither exist nor change."""
    return 16 * (16 if x.bits == 64 else 8)


def _skips_xmm(x: Execution) -> bool:
    """AMD's fast FXSAVE (AMD64 APM volume 2, section 11.4.4): no XMM, no MXCSR at CPL 0 in 64-bit mode."""
    return bool(x.sregs.efer & EFER_FFXSR) and x.bits == 64 and x.cpl == 0


@handles("fxsave", "fxsave64")
def fxsave(x: Execution) -> None:
    """512 bytes, of which reserved ones and the 48 for software are not written."""
    if x.sregs.cr0 & (CR0_EM | CR0_TS):
        raise CpuFault(Vector.NM)
    base = x.linear(x.memory(0), 512, write=True, align=16)
    x.queue_write(base, _x87_environment(x, x.decoded.mnemonic == "fxsave64"), x.privilege)
    x.queue_write(base + ST_AT, bytes(x.fpu.data[ST_AT:XMM_AT]), x.privilege)
    mxcsr = x.fpu.mxcsr.to_bytes(4, "little") + x.fpu.mxcsr_mask.to_bytes(4, "little")
    x.queue_write(base + MXCSR_AT, mxcsr, x.privilege)
    if not _skips_xmm(x):
        x.queue_write(base + XMM_AT, bytes(x.fpu.data[XMM_AT : XMM_AT + _xmm_bytes(x)]), x.privilege)


@handles("fxrstor", "fxrstor64")
def fxrstor(x: Execution) -> None:
    """#GP(0) for reserved bits of MXCSR; nothing is loaded then."""
    if x.sregs.cr0 & (CR0_EM | CR0_TS):
        raise CpuFault(Vector.NM)
    data = x.load_bytes(x.memory(0), 512, align=16)
    mxcsr = int.from_bytes(data[MXCSR_AT : MXCSR_AT + 4], "little")
    _check_mxcsr(x, mxcsr)
    _load_x87(x, data[:MXCSR_AT], data[ST_AT:XMM_AT], x.decoded.mnemonic == "fxrstor64")
    if not _skips_xmm(x):
        x.fpu.mxcsr = mxcsr
        x.fpu.data[XMM_AT : XMM_AT + _xmm_bytes(x)] = data[XMM_AT : XMM_AT + _xmm_bytes(x)]


@handles("ldmxcsr", "vldmxcsr")
def ldmxcsr(x: Execution) -> None:
    """#GP(0) for reserved bits."""
    (require_avx if x.decoded.vex else require_sse)(x)
    value = x.load(x.operands[0])
    _check_mxcsr(x, value)
    x.fpu.mxcsr = value


@handles("stmxcsr", "vstmxcsr")
def stmxcsr(x: Execution) -> None:
    """Store MXCSR."""
    (require_avx if x.decoded.vex else require_sse)(x)
    x.store(x.operands[0], x.fpu.mxcsr)


# -- XSAVE -----------------------------------------------------------------------------------------


def _requested(x: Execution, *, supervisor: bool) -> int:
    """RFBM: what EDX:EAX asks for and XCR0 (or XCR0 | IA32_XSS) has switched on."""
    enabled = x.xcr0
    if supervisor:
        x.require_kernel()
        enabled |= x.context.get_msr(MSR_XSS)
    rfbm = (x.gpr(RAX, 4) | x.gpr(RDX, 4) << 32) & enabled
    _require_standard(x, rfbm)
    return rfbm


def _require_standard(x: Execution, components: int) -> None:
    """Supervisor components are in no KVM_GET_XSAVE image, so they cannot be saved here."""
    for number in _extended(components):
        if not x.fpu.span(number)[1]:
            raise x.unknown(f"state component {number}")


def _extended(components: int) -> Iterator[int]:
    return (number for number in range(2, 62) if components >> number & 1)


def _existing(x: Execution, number: int) -> int:
    """Bytes of an extended component that exist in this mode: outside 64-bit mode registers 8-15 do not."""
    size = x.fpu.span(number)[1]
    if x.bits == 64:
        return size
    if number == HI16_ZMM:
        return 0
    return 8 * _REGISTER_BYTES[number] if number in _REGISTER_BYTES else size


def _places(x: Execution, components: int, *, compact: bool) -> dict[int, int]:
    """Offset in memory of each extended component: fixed, or one after the other (SDM 13.4.3)."""
    if not compact:
        return {number: x.fpu.span(number)[0] for number in _extended(components)}
    places, at = {}, EXTENDED_AT
    for number in _extended(components):
        _, size, ecx = x.xsave_component_layout(number)
        if ecx & 2:
            at = -(-at // 64) * 64
        places[number] = at
        at += size
    return places


@handles("xsave", "xsave64", "xsaveopt", "xsaveopt64", "xsavec", "xsavec64", "xsaves", "xsaves64")
def xsave(x: Execution) -> None:
    """All four ways of saving. The "modified" optimisation is never used: it only ever allows not to write."""
    _require_xsave(x)
    name = x.decoded.mnemonic.removesuffix("64")
    wide = x.decoded.mnemonic.endswith("64")
    rfbm = _requested(x, supervisor=name == "xsaves")
    base = x.linear(x.memory(0), EXTENDED_AT, write=True, align=64)
    in_use = x.fpu.in_use()
    if name != "xsave" and x.fpu.mxcsr != MXCSR_INIT:
        in_use |= 1 << SSE  # these three count MXCSR to SSE
    compact = name in ("xsavec", "xsaves")
    written = rfbm if name == "xsave" else rfbm & in_use

    def put(offset: int, data: bytes | bytearray) -> None:
        if data:
            x.queue_write(base + offset, bytes(data), x.privilege)

    if written >> X87 & 1:
        put(0, _x87_environment(x, wide))
        put(ST_AT, x.fpu.data[ST_AT:XMM_AT])
    if (written >> SSE & 1) if compact else rfbm & (1 << SSE | 1 << AVX):
        put(MXCSR_AT, x.fpu.mxcsr.to_bytes(4, "little") + x.fpu.mxcsr_mask.to_bytes(4, "little"))
    if written >> SSE & 1:
        put(XMM_AT, x.fpu.data[XMM_AT : XMM_AT + _xmm_bytes(x)])
    places = _places(x, rfbm, compact=compact)
    for number in _extended(written):
        at = x.fpu.span(number)[0]
        put(places[number], x.fpu.data[at : at + _existing(x, number)])

    if compact:
        put(XSTATE_BV_AT, (in_use & rfbm).to_bytes(8, "little") + (rfbm | COMPACT).to_bytes(8, "little"))
    else:
        before = int.from_bytes(x.context.read(base + XSTATE_BV_AT, 8, x.privilege), "little")
        put(XSTATE_BV_AT, (before & ~rfbm | in_use & rfbm).to_bytes(8, "little"))


@handles("xrstor", "xrstor64", "xrstors", "xrstors64")
def xrstor(x: Execution) -> None:
    """Restore from the standard or the compacted format; a bad header is #GP(0) and changes nothing."""
    _require_xsave(x)
    supervisor = x.decoded.mnemonic.startswith("xrstors")
    rfbm = _requested(x, supervisor=supervisor)
    base = x.linear(x.memory(0), EXTENDED_AT, write=False, align=64)
    area = x.context.read(base, EXTENDED_AT, x.privilege)
    state, layout, compact = _check_header(x, area, supervisor=supervisor)
    mxcsr = int.from_bytes(area[MXCSR_AT : MXCSR_AT + 4], "little")
    loads_mxcsr = bool(rfbm & state & 1 << SSE if compact else rfbm & (1 << SSE | 1 << AVX))
    if loads_mxcsr:
        _check_mxcsr(x, mxcsr)
    places = _places(x, layout if compact else rfbm, compact=compact)
    # Everything is read before anything is loaded, so a page fault comes first.
    extended = {
        number: x.context.read(base + places[number], _existing(x, number), x.privilege)
        for number in _extended(rfbm & state)
        if _existing(x, number)
    }
    if rfbm & 1 << X87:
        if state & 1 << X87:
            _load_x87(x, area[:MXCSR_AT], area[ST_AT:XMM_AT], x.decoded.mnemonic.endswith("64"))
        else:
            x.fpu.initialise(X87)
    if rfbm & 1 << SSE:
        size = _xmm_bytes(x)
        x.fpu.data[XMM_AT : XMM_AT + size] = area[XMM_AT : XMM_AT + size] if state & 1 << SSE else bytes(size)
    if loads_mxcsr:
        x.fpu.mxcsr = mxcsr
    elif compact and rfbm & 1 << SSE:
        x.fpu.mxcsr = MXCSR_INIT  # the compacted format counts MXCSR to SSE, whose initial state this is
    for number in _extended(rfbm):
        at, size = x.fpu.span(number)[0], _existing(x, number)
        x.fpu.data[at : at + size] = extended.get(number, bytes(size))


def _check_header(x: Execution, area: bytes, *, supervisor: bool) -> tuple[int, int, bool]:
    """(XSTATE_BV, XCOMP_BV without its format bit, whether compacted); #GP(0) as SDM 13.8 and 13.12 say."""
    header = area[XSTATE_BV_AT:EXTENDED_AT]
    state = int.from_bytes(header[:8], "little")
    layout = int.from_bytes(header[8:16], "little")
    enabled = x.xcr0 | (x.context.get_msr(MSR_XSS) if supervisor else 0)
    if layout & COMPACT:
        layout &= ~COMPACT
        if layout & ~enabled or state & ~layout or any(header[16:]):
            raise general_protection()
        _require_standard(x, layout)
        return state, layout, True
    if supervisor or state & ~enabled or any(header[8:24]):
        raise general_protection()
    return state, 0, False


# -- XCR0 ------------------------------------------------------------------------------------------


@handles("xgetbv")
def xgetbv(x: Execution) -> None:
    """ECX = 0: XCR0; ECX = 1: XCR0 & XINUSE."""
    if not x.sregs.cr4 & CR4_OSXSAVE:
        raise undefined()
    index = x.gpr(RCX, 4)
    if index > 1:
        raise general_protection()
    value = x.xcr0
    if index == 1:
        value &= x.fpu.in_use() | (1 << SSE if x.fpu.mxcsr != MXCSR_INIT else 0)
    x.set_gpr(RAX, 4, value)
    x.set_gpr(RDX, 4, value >> 32)


@handles("xsetbv")
def xsetbv(x: Execution) -> None:
    """Only XCR0 exists; combinations that the architecture forbids are #GP(0)."""
    if not x.sregs.cr4 & CR4_OSXSAVE:
        raise undefined()
    x.require_kernel()
    value = x.gpr(RAX, 4) | x.gpr(RDX, 4) << 32
    eax, _, _, edx = x.context.cpuid(0xD, 0)
    avx512 = value & _AVX512
    if (
        x.gpr(RCX, 4)
        or value & ~(eax | edx << 32)
        or not value & 1 << X87
        or (value & 1 << AVX and not value & 1 << SSE)
        or value & _MPX not in (0, _MPX)
        or avx512 not in (0, _AVX512)
        or (avx512 and not value & 1 << AVX)
    ):
        raise general_protection()
    x.new_xcr0 = value
