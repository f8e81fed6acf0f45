"""FXSAVE, XSAVE and relatives: against the CPU at CPL 3, and their checks and privileged forms on a fake CPU."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.control_registers import CR0_EM, CR0_TS, CR4_OSFXSR, CR4_OSXSAVE, EFER_FFXSR
from pyvmm.arch.x86.fallback.xsave_image import AVX, EXTENDED_AT, MXCSR_INIT, SSE, ST_AT, X87, XMM_AT, XSTATE_BV_AT
from pyvmm.arch.x86.faults import Vector
from pyvmm.arch.x86.native_oracle import CODE, DATA, NativeState
from pyvmm.errors import UnknownInstructionError
from pyvmm.kvm.state import Regs
from tests.unit.arch.x86.fallback.fake_cpu import FakeCpu
from tests.unit.arch.x86.fallback.instruction_forms import cpu_flags
from tests.unit.arch.x86.fallback.native import Host, assert_same_fault, assert_same_registers, assert_same_state

AREA = 0x3000  # more than any area, AMX's tiles included
SAVES = {  # opcode with [rdi], the CPU flag it needs, compacted
    "xsave": ("0fae27", "xsave", False),
    "xsave64": ("480fae27", "xsave", False),
    "xsaveopt": ("0fae37", "xsaveopt", False),
    "xsaveopt64": ("480fae37", "xsaveopt", False),
    "xsavec": ("0fc727", "xsavec", True),
    "xsavec64": ("480fc727", "xsavec", True),
}
RESTORES = {"xrstor": "0fae2f", "xrstor64": "480fae2f"}
PKRU = 1 << 9  # loading a random one could lock the tests' own data away
COMPACT = 1 << 63
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
seeds = st.integers(0, 1 << 32)
masks = st.one_of(st.integers(0, 0xFF), st.sampled_from([7, 0xE7, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1))


def layout(host: Host, area: bytes) -> dict[int, tuple[int, int]]:
    """Offset and size of each extended component in ``area``, read as its header says."""
    xcomp = int.from_bytes(area[XSTATE_BV_AT + 8 : XSTATE_BV_AT + 16], "little")
    places, at = {}, EXTENDED_AT
    for number in range(2, 62):
        offset, size = host.component(number)
        if not size or not host.xcr0 >> number & 1:
            continue
        if not xcomp & COMPACT:
            places[number] = (offset, size)
        elif xcomp >> number & 1:
            if host.cpuid(0xD, number)[2] & 2:
                at = -(-at // 64) * 64
            places[number] = (at, size)
            at += size
    return places


def content(host: Host, area: bytes, saved: int) -> dict[str, bytes]:
    """What restoring ``saved`` from ``area`` would give: initial state is the same stored or only flagged."""
    present = int.from_bytes(area[XSTATE_BV_AT : XSTATE_BV_AT + 8], "little")
    compact = bool(area[XSTATE_BV_AT + 15] & 0x80)
    found = {"header": area[XSTATE_BV_AT + 8 : EXTENDED_AT]}
    if saved & 1 << X87:
        initial = (b"\x7f\x03".ljust(24, b"\0"), bytes(128))
        stored = (area[:24], b"".join(area[i : i + 10] + bytes(6) for i in range(ST_AT, XMM_AT, 16)))
        found["x87"], found["st"] = stored if present & 1 << X87 else initial
    if saved & 1 << SSE:
        found["xmm"] = area[XMM_AT : XMM_AT + 256] if present & 1 << SSE else bytes(256)
    if compact and saved & 1 << SSE:
        # A CPU may take SSE for used though it is as at the beginning; then MXCSR is written, as what it would be.
        found["mxcsr"] = area[24:28] if present & 1 << SSE else MXCSR_INIT.to_bytes(4, "little")
    elif not compact and saved & (1 << SSE | 1 << AVX):
        found["mxcsr"] = area[24:28]
    for number, (at, size) in layout(host, area).items():
        if saved >> number & 1:
            found[str(number)] = area[at : at + size] if present >> number & 1 else bytes(size)
    found["rest of xstate_bv"] = (present & ~saved).to_bytes(8, "little")
    return found


@pytest.mark.parametrize("name", SAVES)
@quick
@given(seed=seeds, mask=masks, shift=st.sampled_from([0, 0, 0, 0, 64, 32, 1]))
def test_saving_as_the_cpu(host: Host, name: str, seed: int, mask: int, shift: int) -> None:
    code, flag, compact = SAVES[name]
    if flag not in cpu_flags():
        pytest.skip(f"the host CPU lacks {flag}")
    garbage = bytearray(random.Random(seed + 1).randbytes(AREA))
    if not compact:  # XCOMP_BV is not written, and it says how the area is to be read
        garbage[shift + XSTATE_BV_AT + 8 : shift + XSTATE_BV_AT + 16] = bytes(8)
    before = bytes(garbage)
    regs = Regs(rip=CODE, rdi=DATA + shift, rax=mask & 0xFFFFFFFF | 5 << 32, rdx=mask >> 32)
    state = NativeState(regs=regs, xsave=host.random_state(seed))

    native = host.oracle.run(bytes.fromhex(code), state, before, steps=1)
    cpu = host.cpu(bytes.fromhex(code), state, before)
    cpu.run()

    assert_same_fault(cpu, native)
    assert_same_registers(cpu, native, name)
    if cpu.injected:
        assert bytes(cpu.data[:AREA]) == native.data == before
        return
    saved = mask & host.xcr0
    ours, theirs = bytes(cpu.data[shift:AREA]), native.data[shift:]
    assert content(host, ours, saved) == content(host, theirs, saved)
    for number, (at, size) in layout(host, theirs).items():
        if not saved >> number & 1:
            assert ours[at : at + size] == theirs[at : at + size] == before[shift + at : shift + at + size]
    for start, end, asked in ((0, 24, 1 << X87), (ST_AT, XMM_AT, 1 << X87), (XMM_AT, XMM_AT + 256, 1 << SSE)):
        if not saved & asked:
            assert ours[start:end] == theirs[start:end] == before[shift + start : shift + end]
    assert ours[464:512] == theirs[464:512] == before[shift + 464 : shift + 512]


def make_area(host: Host, seed: int, *, compact: bool, present: int) -> bytearray:
    """A valid area that holds the components ``present``; bytes that mean nothing are random."""
    chance = random.Random(seed)
    image = host.image(host.random_state(seed))
    area = bytearray(chance.randbytes(AREA))
    area[:XSTATE_BV_AT] = image.data[:XSTATE_BV_AT]
    area[464:512] = chance.randbytes(48)
    area[XSTATE_BV_AT:EXTENDED_AT] = bytes(64)
    area[XSTATE_BV_AT : XSTATE_BV_AT + 8] = present.to_bytes(8, "little")
    if compact:
        held = present | chance.getrandbits(8) & host.xcr0 & ~PKRU
        area[XSTATE_BV_AT + 8 : EXTENDED_AT - 48] = (held | COMPACT).to_bytes(8, "little")
    for number, (at, size) in layout(host, bytes(area)).items():
        source, _ = image.span(number)
        area[at : at + size] = image.data[source : source + size]
    return area


@pytest.mark.parametrize("name", RESTORES)
@quick
@given(
    seed=seeds,
    mask=masks,
    present=st.integers(0, 0xFF),
    compact=st.booleans(),
    damage=st.one_of(st.none(), st.tuples(st.integers(XSTATE_BV_AT, EXTENDED_AT - 1), st.integers(0, 255))),
    mxcsr=st.one_of(st.none(), st.sampled_from([0x1F80, 0xFFFF, 0x10000, 0xFFFFFFFF])),
)
def test_restoring_as_the_cpu(
    host: Host, name: str, seed: int, mask: int, present: int, compact: bool, damage: object, mxcsr: int | None
) -> None:
    if compact and "xsavec" not in cpu_flags():
        pytest.skip("the host CPU lacks xsavec")
    code = bytes.fromhex(RESTORES[name])
    area = make_area(host, seed, compact=compact, present=present & host.xcr0 & ~PKRU)
    if isinstance(damage, tuple):
        area[damage[0]] = damage[1]
    if mxcsr is not None:
        area[24:28] = mxcsr.to_bytes(4, "little")
    mask &= ~PKRU
    regs = Regs(rip=CODE, rdi=DATA, rax=mask & 0xFFFFFFFF, rdx=mask >> 32)
    state = NativeState(regs=regs, xsave=host.random_state(seed + 1))

    native = host.oracle.run(code, state, bytes(area), steps=1)
    cpu = host.cpu(code, state, bytes(area))
    cpu.run()

    assert_same_fault(cpu, native)
    assert_same_registers(cpu, native, name)
    assert bytes(cpu.data[:AREA]) == native.data == area
    if cpu.injected and mxcsr is not None and mxcsr > 0xFFFF:
        return  # #GP for an MXCSR that cannot be, and some CPUs have loaded a part by then
    assert_same_state(host, cpu.xsave, native.state.xsave)


@pytest.mark.parametrize("code", ["0fae07", "480fae07"], ids=["fxsave", "fxsave64"])
@quick
@given(seed=seeds, shift=st.sampled_from([0, 0, 0, 16, 8]))
def test_fxsave_as_the_cpu(host: Host, code: str, seed: int, shift: int) -> None:
    before = random.Random(seed).randbytes(AREA)
    state = NativeState(regs=Regs(rip=CODE, rdi=DATA + shift), xsave=host.random_state(seed))
    native = host.oracle.run(bytes.fromhex(code), state, before, steps=1)
    cpu = host.cpu(bytes.fromhex(code), state, before)
    cpu.run()
    assert_same_fault(cpu, native)
    assert_same_registers(cpu, native, "fxsave")
    # Bytes 463:416 are reserved: CPUs write them or not.
    assert cpu.data[: shift + 416].hex() == native.data[: shift + 416].hex()
    assert bytes(cpu.data[shift + 464 : AREA]) == native.data[shift + 464 :]


@pytest.mark.parametrize("code", ["0fae0f", "480fae0f"], ids=["fxrstor", "fxrstor64"])
@quick
@given(seed=seeds, shift=st.sampled_from([0, 0, 0, 16, 8]), mxcsr=st.sampled_from([0x1F80, 0x1F80, 0xFFFF, 0x80000000]))
def test_fxrstor_as_the_cpu(host: Host, code: str, seed: int, shift: int, mxcsr: int) -> None:
    area = bytearray(random.Random(seed).randbytes(shift)) + make_area(host, seed, compact=False, present=3)[:512]
    area[shift + 24 : shift + 28] = mxcsr.to_bytes(4, "little")
    state = NativeState(regs=Regs(rip=CODE, rdi=DATA + shift), xsave=host.random_state(seed + 1))
    native = host.oracle.run(bytes.fromhex(code), state, bytes(area), steps=1)
    cpu = host.cpu(bytes.fromhex(code), state, bytes(area))
    cpu.run()
    assert_same_fault(cpu, native)
    assert_same_registers(cpu, native, "fxrstor")
    assert_same_state(host, cpu.xsave, native.state.xsave)


@quick
@given(seed=seeds, index=st.sampled_from([0, 1, 2, 0xFFFFFFFF, 1 << 32]))
def test_xgetbv_as_the_cpu(host: Host, seed: int, index: int) -> None:
    if index == 1 and "xgetbv1" not in cpu_flags():
        pytest.skip("the host CPU lacks xgetbv1")
    state = NativeState(regs=Regs(rip=CODE, rax=(1 << 64) - 1, rcx=index), xsave=host.random_state(seed))
    native = host.oracle.run(b"\x0f\x01\xd0", state, steps=1)
    cpu = host.cpu(b"\x0f\x01\xd0", state, b"")
    cpu.run()
    assert_same_fault(cpu, native)
    if index == 1:  # whether x87 and SSE are tracked is the CPU's choice (SDM volume 1, section 13.6)
        cpu.regs.rax |= 3
        native.state.regs.rax |= 3
    assert_same_registers(cpu, native, "xgetbv")


# -- on a fake CPU: privileged forms, modes, and what the operating system switched off -------------


def kernel(code: str, *, bits: int = 64, **registers: int) -> FakeCpu:
    cpu = FakeCpu(bytes.fromhex(code), cpl=0, bits=bits)
    for name, value in registers.items():
        setattr(cpu.regs, name, value)
    image = bytearray(4096)
    image[:2], image[24:28] = b"\x7f\x03", MXCSR_INIT.to_bytes(4, "little")
    image[XMM_AT:416] = bytes(range(256))
    image[EXTENDED_AT : EXTENDED_AT + 256] = bytes(range(255, -1, -1))
    image[XSTATE_BV_AT] = 7
    cpu.xsave = bytes(image)
    return cpu


@pytest.mark.parametrize("wide", ["", "48"])
def test_xsaves_and_xrstors_round_trip(wide: str) -> None:
    cpu = kernel(f"{wide}0fc72f", rdi=DATA, rax=7)
    cpu.run()
    assert not cpu.injected
    assert cpu.data[XSTATE_BV_AT : XSTATE_BV_AT + 16] == (6).to_bytes(8, "little") + (7 | COMPACT).to_bytes(8, "little")
    assert bytes(cpu.data[XMM_AT:416]) == bytes(range(256))
    saved = bytes(cpu.data)
    back = kernel(f"{wide}0fc71f", rdi=DATA, rax=7)
    back.mappings[1].data[:] = saved
    back.xsave = bytes(4096)
    back.run()
    assert not back.injected
    assert back.xsave[XMM_AT:416] == bytes(range(256))
    assert back.xsave[EXTENDED_AT : EXTENDED_AT + 256] == bytes(range(255, -1, -1))


@pytest.mark.parametrize("code", ["0fc72f", "480fc72f", "0fc71f", "480fc71f"])
def test_xsaves_and_xrstors_are_privileged(code: str) -> None:
    cpu = kernel(code, rdi=DATA, rax=7)
    cpu.sregs = FakeCpu(b"").sregs  # CPL 3
    cpu.run()
    assert cpu.injected == [(Vector.GP, 0)]


def test_xrstors_refuses_the_standard_format() -> None:
    cpu = kernel("0fc71f", rdi=DATA, rax=7)
    cpu.run()
    assert cpu.injected == [(Vector.GP, 0)]


def test_supervisor_components_are_not_pretended() -> None:
    cpu = kernel("0fc72f", rdi=DATA, rax=0xFFFFFFFF)
    cpu.msrs[0xDA0] = 1 << 11
    with pytest.raises(UnknownInstructionError, match="component 11"):
        cpu.run()


@pytest.mark.parametrize(
    ("value", "index", "fine"),
    [(1, 0, True), (3, 0, True), (7, 0, True), (2, 0, False), (5, 0, False), (7, 1, False), (15, 0, False)],
)
def test_xsetbv(value: int, index: int, fine: bool) -> None:
    cpu = kernel("0f01d1", rax=value, rcx=index)
    cpu.xcr0 = 0x80
    cpu.run()
    assert (cpu.injected, cpu.xcr0) == (([], value) if fine else ([(Vector.GP, 0)], 0x80))


@pytest.mark.parametrize(
    ("value", "fine"), [(0xE7, True), (0x67, False), (0xE3, False), (0x1F, True), (0xF, False), (0x17, False)]
)
def test_xsetbv_wants_avx512_and_mpx_whole(value: int, fine: bool) -> None:
    cpu = kernel("0f01d1", rax=value)
    cpu.cpuid_source = lambda leaf, subleaf: (0xFF, 0, 0, 0)
    cpu.run()
    assert bool(cpu.injected) is not fine


def test_xsetbv_is_privileged() -> None:
    cpu = FakeCpu(bytes.fromhex("0f01d1"))
    cpu.regs.rax = 7
    cpu.run()
    assert cpu.injected == [(Vector.GP, 0)]


XSAVE_CODES = ["0fae27", "0fae37", "0fc727", "0fc72f", "0fae2f", "0fc71f", "0f01d0", "0f01d1"]


@pytest.mark.parametrize("code", XSAVE_CODES)
def test_without_osxsave_all_are_undefined(code: str) -> None:
    cpu = kernel(code, rdi=DATA, rax=7)
    cpu.sregs.cr4 &= ~CR4_OSXSAVE
    cpu.run()
    assert cpu.injected == [(Vector.UD, None)]


OTHER_STATE_CODES = ["0fae07", "0fae0f", "0fae17", "0fae1f", "dbe3", "d93f", "0f77", "0f2807"]


@pytest.mark.parametrize("code", XSAVE_CODES[:6] + OTHER_STATE_CODES)
def test_task_switched_is_no_math(code: str) -> None:
    cpu = kernel(code, rdi=DATA, rax=7)
    cpu.sregs.cr0 |= CR0_TS
    cpu.run()
    assert cpu.injected == [(Vector.NM, None)]
    assert not any(cpu.data) and cpu.regs.rip == CODE


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("0fae07", Vector.NM),
        ("dbe3", Vector.NM),
        ("d93f", Vector.NM),
        ("0f77", Vector.UD),
        ("0f2807", Vector.UD),
        ("0f6ec0", Vector.UD),
        ("0fae17", Vector.UD),
    ],
)
def test_x87_emulation(code: str, vector: Vector) -> None:
    cpu = kernel(code, rdi=DATA)
    cpu.sregs.cr0 |= CR0_EM
    cpu.run()
    assert cpu.injected == [(vector, None)]


def test_fwait_needs_both_mp_and_ts() -> None:
    cpu = kernel("9b")
    cpu.sregs.cr0 |= CR0_TS
    cpu.run()
    assert cpu.injected == [(Vector.NM, None)]
    cpu = kernel("9b")
    cpu.sregs.cr0 = (cpu.sregs.cr0 | CR0_TS) & ~2
    cpu.run()
    assert not cpu.injected and cpu.regs.rip == CODE + 1


def test_sse_needs_osfxsr_and_avx_needs_its_state() -> None:
    cpu = kernel("0f2807", rdi=DATA)
    cpu.sregs.cr4 &= ~CR4_OSFXSR
    cpu.run()
    assert cpu.injected == [(Vector.UD, None)]
    for change in ("xcr0", "osxsave"):
        cpu = kernel("c5fc2807", rdi=DATA)
        if change == "xcr0":
            cpu.xcr0 = 3
        else:
            cpu.sregs.cr4 &= ~CR4_OSXSAVE
        cpu.run()
        assert cpu.injected == [(Vector.UD, None)]


@pytest.mark.parametrize("code", ["0fae07", "0fae27", "0fc727"], ids=["fxsave", "xsave", "xsavec"])
def test_outside_64_bit_mode_eight_registers_are_saved(code: str) -> None:
    cpu = kernel(code, bits=32, rdi=DATA, rax=7)
    cpu.data[:2048] = b"\xee" * 2048
    cpu.data[XSTATE_BV_AT:EXTENDED_AT] = bytes(64)
    cpu.run()
    assert not cpu.injected
    assert bytes(cpu.data[XMM_AT : XMM_AT + 128]) == bytes(range(128))
    assert bytes(cpu.data[XMM_AT + 128 : 416]) == b"\xee" * 128
    if code != "0fae07":
        assert bytes(cpu.data[EXTENDED_AT : EXTENDED_AT + 128]) == bytes(range(255, 127, -1))
        assert bytes(cpu.data[EXTENDED_AT + 128 : EXTENDED_AT + 256]) == b"\xee" * 128


@pytest.mark.parametrize("code", ["0fae0f", "0fae2f"], ids=["fxrstor", "xrstor"])
def test_outside_64_bit_mode_eight_registers_are_loaded(code: str) -> None:
    cpu = kernel(code, bits=32, rdi=DATA, rax=7)
    cpu.run()
    assert not cpu.injected
    assert cpu.xsave[XMM_AT : XMM_AT + 128] == bytes(128)
    assert cpu.xsave[XMM_AT + 128 : 416] == bytes(range(128, 256))


def test_amd_fast_fxsave_leaves_xmm_alone() -> None:
    cpu = kernel("0fae07", rdi=DATA)
    cpu.sregs.efer |= EFER_FFXSR
    cpu.run()
    assert bytes(cpu.data[XMM_AT:416]) == bytes(256)


def test_a_page_fault_half_way_changes_nothing() -> None:
    cpu = kernel("0fae27", rdi=DATA + 0x4000 - 576, rax=7)
    cpu.run()
    assert [v for v, _ in cpu.injected] == [Vector.PF]
    assert cpu.sregs.cr2 == DATA + 0x4000
    assert not any(cpu.data) and cpu.regs.rip == CODE


def test_pending_x87_exception() -> None:
    for code in ("9b", "d93f", "0f77"):
        cpu = kernel(code, rdi=DATA)
        image = bytearray(cpu.xsave)
        image[0:4] = (0x37E).to_bytes(2, "little") + (0x8081).to_bytes(2, "little")
        cpu.xsave = bytes(image)
        cpu.run()
        assert cpu.injected == [(Vector.MF, None)] or code == "d93f"  # fnstcw does not wait
