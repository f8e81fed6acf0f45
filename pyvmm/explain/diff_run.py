"""The same few instructions natively and in a guest, one step at a time, each from its own state before.

Both run them at CPL 3 at the same linear addresses::

    0x1000_0000  the code, one page, not writable          0x2000_0000  data, 16 KiB, RDI and RSP point there

Natively that is a child under ptrace (arch/x86/native_oracle.py). In the guest RFLAGS.TF brings a #DB behind each
instruction, whose handler halts; what the CPU pushed then says where it was. An instruction that would be a system call
is not run natively: it would really be one.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec
from iced_x86 import Decoder, Formatter, FormatterSyntax, Instruction, Mnemonic

from pyvmm.arch.x86.control_registers import FLAG_AC, FLAG_DF, FLAG_IF, FLAG_TF, STATUS_FLAGS
from pyvmm.arch.x86.fallback import emulate
from pyvmm.arch.x86.fallback.kvm_context import KvmContext
from pyvmm.arch.x86.faults import Vector
from pyvmm.arch.x86.native_oracle import (
    CODE,
    DATA,
    DATA_SIZE,
    PAGE,
    USER_CS_32,
    USER_CS_64,
    NativeOracle,
    NativeState,
    Signal,
)
from pyvmm.errors import ConfigError, UnknownInstructionError
from pyvmm.host.probe_layout import PAGE_TABLES, RFLAGS_ONE, Mode
from pyvmm.host.probe_vm import End, Ending, ProbeVm
from pyvmm.kvm.state import Regs
from pyvmm.kvm.system import System

STEPS_MAX = 10_000
COMPARED_FLAGS = STATUS_FLAGS | FLAG_DF | FLAG_AC
_CODE_GPA, _DATA_GPA, _TABLES_GPA = 0x60000, 0x70000, 0x80000
_USER_PAGE, _USER_CODE = 0x67, 0x25  # present, user, accessed; and for data writable, dirty
_LEGACY, _HEADER_AT, _YMM_AT, _XSAVE_END = 512, 512, 576, 832  # SDM volume 1, 13.4
_SSE, _AVX = 2, 4
_REALLY_CALLS = {Mnemonic.SYSCALL, Mnemonic.SYSENTER, Mnemonic.INT}
_PUSHES_FLAGS = {Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ}
_LINUX_EMULATES = {Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT, Mnemonic.SMSW, Mnemonic.STR}
"""Where the CPU has UMIP (arch/x86/kernel/umip.c); a step does not stop behind them then."""
_SIGNALS = {
    (4, 0): Vector.UD, (11, 128): Vector.GP, (11, 1): Vector.PF, (11, 2): Vector.PF, (7, 1): Vector.AC,
    (7, 128): Vector.SS, (8, 1): Vector.DE, (5, 128): Vector.BP, (5, 1): Vector.DB,
}  # fmt: skip
"""(signal, si_code) of arch/x86/kernel/traps.c; a si_code of 0 stands for any."""


@dataclass
class Outcome:
    """A CPU after one step. ``end``: why there is no next one."""

    regs: Regs
    xsave: bytes
    data: bytes
    fs_base: int = 0
    gs_base: int = 0
    end: str | None = None

    def vectors(self) -> list[bytes]:
        """XMM0 to 15, and the upper halves of YMM where the state has them; zeros while they are initial."""
        present = self.xsave[_HEADER_AT]
        xmm = self.xsave[160 : 160 + 256] if present & _SSE else bytes(256)
        ymm = self.xsave[_YMM_AT : _YMM_AT + 256] if present & _AVX else bytes(256)
        return [xmm[at : at + 16] + ymm[at : at + 16] for at in range(0, 256, 16)]

    @property
    def mxcsr(self) -> int:
        """Control and status of SSE."""
        return int.from_bytes(self.xsave[24:28], "little") if self.xsave[_HEADER_AT] & (_SSE | _AVX) else 0x1F80


@dataclass
class Step:
    """One instruction on each side. ``differences``: what is not the same behind it and was, or differed otherwise."""

    number: int
    address: int
    instruction: str
    code: bytes
    sides: dict[str, Outcome]
    changes: list[str] = field(default_factory=list)
    """Of the native side, or the guest's where that did not run."""
    differences: list[str] = field(default_factory=list)


def compare(first: Outcome, second: Outcome, names: tuple[str, str]) -> list[str]:
    """A line for each thing that differs."""
    if (first.end or second.end) and first.end != second.end:
        return [f"{names[0]}: {first.end or 'goes on'}; {names[1]}: {second.end or 'goes on'}"]
    said = []
    for name in Regs.__struct_fields__:
        a, b = getattr(first.regs, name), getattr(second.regs, name)
        if name == "rflags":
            a, b = a & COMPARED_FLAGS, b & COMPARED_FLAGS
        if a != b:
            said.append(f"{name}: {names[0]} {a:#x}, {names[1]} {b:#x}")
    for number, (x, y) in enumerate(zip(first.vectors(), second.vectors(), strict=True)):
        if x != y:
            said.append(f"ymm{number}: {names[0]} {x[::-1].hex()}, {names[1]} {y[::-1].hex()}")
    for name in ("mxcsr", "fs_base", "gs_base"):
        if (a := getattr(first, name)) != (b := getattr(second, name)):
            said.append(f"{name}: {names[0]} {a:#x}, {names[1]} {b:#x}")
    if first.data != second.data:
        at = next(i for i in range(0, DATA_SIZE, 8) if first.data[i : i + 8] != second.data[i : i + 8])
        a, b = (int.from_bytes(side.data[at : at + 8], "little") for side in (first, second))
        said.append(f"memory at {DATA + at:#x}: {names[0]} {a:#x}, {names[1]} {b:#x}")
    return said


class DiffRun:
    """Owns the traced child and a VM. ``bits``: 64 or 32; ``fallback``: have the instruction fallback do it, too.

    HostError: no usable KVM, or no child may be traced.
    """

    def __init__(self, code: bytes, regs: Regs, data: bytes = b"", *, bits: int = 64, fallback: bool = False) -> None:
        if not 0 < len(code) <= PAGE:
            raise ConfigError(f"{len(code)} bytes of code: 1 to {PAGE} of them can be run")
        if len(data) > DATA_SIZE:
            raise ConfigError(f"{len(data)} bytes of data: at most {DATA_SIZE}")
        self._code, self._bits, self._fallback = code, bits, fallback
        self._formatter = Formatter(FormatterSyntax.INTEL)
        self._formatter.hex_prefix, self._formatter.hex_suffix = "0x", ""
        self._formatter.space_after_operand_separator = True
        self._oracle = NativeOracle()
        try:
            self._system = System()
            try:
                self._probe = ProbeVm(self._system, deadline=5.0)
            except BaseException:
                self._system.close()
                raise
        except BaseException:
            self._oracle.close()
            raise
        xsave = self._oracle.run(b"\x0f\x57\xc0", NativeState(regs=Regs()), steps=1).state.xsave  # xorps xmm0, xmm0
        began = msgspec.structs.replace(regs, rip=CODE, rflags=RFLAGS_ONE)
        self._first = Outcome(began, xsave, data.ljust(DATA_SIZE, b"\0"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._probe.close()
        self._system.close()
        self._oracle.close()

    def steps(self, limit: int = STEPS_MAX) -> Iterator[Step]:
        """Until RIP leaves the code on either side, something ends, or they are at different places."""
        sides, known = {"native": self._first, "guest": self._first}, list[str]()
        for number in range(1, limit + 1):
            at = sides["native"].regs.rip
            if sides["guest"].regs.rip != at or not CODE <= at < CODE + len(self._code):
                return
            instruction = Decoder(self._bits, self._code[at - CODE :], ip=at).decode()
            code = self._code[at - CODE : at - CODE + max(instruction.len, 1)]
            text = "(no instruction)" if instruction.is_invalid else self._formatter.format(instruction)
            before = sides
            native = self._native(before["native"], instruction)
            sides = {"native": native, "guest": self._guest(before["guest"], instruction)}
            step = Step(number, at, text, code, dict(sides))
            step.differences = compare(sides["native"], sides["guest"], ("native", "guest"))
            if self._fallback:
                step.sides["fallback"] = found = self._interpreted(before["guest"])
                if found.end is None or "is not known" not in found.end:
                    step.differences += compare(sides["guest"], found, ("guest", "fallback"))
            seen, step.differences = step.differences, [each for each in step.differences if each not in known]
            known = seen
            step.changes = _changes(before["native"], sides["native"])
            yield step
            if any(side.end for side in sides.values()):
                return

    # -- the sides ------------------------------------------------------------------------------

    def _native(self, before: Outcome, instruction: Instruction) -> Outcome:
        skipped = (
            "not run: it would be a system call" if instruction.mnemonic in _REALLY_CALLS
            else "not run: Linux emulates it" if instruction.mnemonic in _LINUX_EMULATES else None
        )  # fmt: skip
        if skipped is not None:
            return dataclasses.replace(before, end=skipped)
        state = NativeState(regs=before.regs, fs_base=before.fs_base, gs_base=before.gs_base, xsave=before.xsave)
        cs = USER_CS_64 if self._bits == 64 else USER_CS_32
        result = self._oracle.run(self._code[before.regs.rip - CODE :], state, before.data, steps=1, cs=cs)
        after = result.state
        end = _signal_text(result.signal) if result.signal is not None else None
        data = _without_our_flag(instruction, after.regs, result.data, end)
        return Outcome(after.regs, after.xsave, data, after.fs_base, after.gs_base, end)

    def _place(self, before: Outcome) -> None:
        """Code, data and what maps them; a VM that ended oddly was replaced by a fresh one."""
        memory = self._probe.memory
        directory = PAGE_TABLES + 0x2000
        for number, (linear, gpa, pages, flags) in enumerate(
            ((CODE, _CODE_GPA, 1, _USER_CODE), (DATA, _DATA_GPA, DATA_SIZE // PAGE, _USER_PAGE))
        ):
            table = _TABLES_GPA + PAGE * number
            memory.write_uint(directory + 8 * (linear >> 21), 8, table | _USER_PAGE)
            memory.write(table, struct.pack(f"<{pages}Q", *(gpa + PAGE * page | flags for page in range(pages))))
        memory.write(_CODE_GPA, self._code.ljust(PAGE, b"\0"))
        memory.write(_DATA_GPA, before.data)
        vcpu = self._probe.vcpu
        vcpu.set_xcrs({0: self._oracle.xcr0 & 7 or 1})
        image = bytearray(vcpu.get_xsave())
        image[:_XSAVE_END] = before.xsave[:_XSAVE_END]
        image[_HEADER_AT : _HEADER_AT + 64] = (before.xsave[_HEADER_AT] & 7).to_bytes(64, "little")
        image[_XSAVE_END:] = bytes(len(image) - _XSAVE_END)
        vcpu.set_xsave(bytes(image))

    @property
    def _mode(self) -> Mode:
        return Mode.USER64 if self._bits == 64 else Mode.USER32

    def _guest(self, before: Outcome, instruction: Instruction) -> Outcome:
        self._place(before)
        regs = msgspec.structs.replace(before.regs, rflags=before.regs.rflags | FLAG_TF | FLAG_IF)
        ending = self._probe.run_from(self._mode, regs, fs_base=before.fs_base, gs_base=before.gs_base)
        memory, after = self._probe.memory, msgspec.structs.replace(ending.regs)
        data = memory.read(_DATA_GPA, DATA_SIZE)
        end: str | None = None
        if ending.end is End.EXCEPTION:
            frame = after.rsp + (8 if ending.vector in _ERROR_CODES else 0)
            after.rip, _, flags, after.rsp, _ = struct.unpack("<5Q", memory.read(frame, 40))
            after.rflags = flags & ~FLAG_TF
            if ending.vector != Vector.DB:
                end = _exception_text(ending)
        else:
            end = ending.text
        sregs = self._probe.vcpu.get_sregs()
        seen = _without_our_flag(instruction, after, data, end)
        return Outcome(after, self._probe.vcpu.get_xsave(), seen, sregs.fs.base, sregs.gs.base, end)

    def _interpreted(self, before: Outcome) -> Outcome:
        self._place(before)
        vcpu = self._probe.enter(self._mode, before.regs, before.fs_base, before.gs_base)
        end: str | None = None
        try:
            emulate(KvmContext(vcpu, self._probe.memory))
        except UnknownInstructionError:
            end = "is not known to it: KVM and the CPU do it everywhere"
        else:
            events = vcpu.get_events()
            if events.exception_injected or events.exception_pending:
                end = f"#{Vector(events.exception_nr).name}"
                end += f" at {vcpu.get_sregs().cr2:#x}" if events.exception_nr == Vector.PF else ""
        sregs = vcpu.get_sregs()
        data = self._probe.memory.read(_DATA_GPA, DATA_SIZE)
        return Outcome(vcpu.get_regs(), vcpu.get_xsave(), data, sregs.fs.base, sregs.gs.base, end)


def _without_our_flag(instruction: Instruction, regs: Regs, data: bytes, end: str | None) -> bytes:
    """Flags that were pushed have the TF that steps, and some kernels leave it there."""
    at = regs.rsp - DATA + 1
    if end is not None or instruction.mnemonic not in _PUSHES_FLAGS or not 0 < at < DATA_SIZE:
        return data
    return data[:at] + bytes((data[at] & ~(FLAG_TF >> 8) & 0xFF,)) + data[at + 1 :]


_ERROR_CODES = frozenset({8, 10, 11, 12, 13, 14, 17, 21})


def _changes(before: Outcome, after: Outcome) -> list[str]:
    said = [
        f"{name}={getattr(after.regs, name):#x}"
        for name in Regs.__struct_fields__
        if name not in ("rip", "rflags") and getattr(after.regs, name) != getattr(before.regs, name)
    ]
    if (before.regs.rflags ^ after.regs.rflags) & COMPARED_FLAGS:
        said.append(f"rflags={after.regs.rflags & COMPARED_FLAGS:#x}")
    for number, (x, y) in enumerate(zip(before.vectors(), after.vectors(), strict=True)):
        if x != y:
            said.append(f"xmm{number}={y[15::-1].hex()}")
    if before.data != after.data:
        at = next(i for i in range(0, DATA_SIZE, 8) if before.data[i : i + 8] != after.data[i : i + 8])
        said.append(f"[{DATA + at:#x}]={int.from_bytes(after.data[at : at + 8], 'little'):#x}")
    return said + ([after.end] if after.end else [])


def _exception_text(ending: Ending) -> str:
    try:
        name = f"#{Vector(ending.vector).name}"
    except ValueError:
        return f"vector {ending.vector:#x}"
    return f"{name} at {ending.cr2:#x}" if ending.vector == Vector.PF else name


def _signal_text(seen: Signal) -> str:
    vector = _SIGNALS.get((seen.number, seen.code), _SIGNALS.get((seen.number, 0)))
    if vector is None and seen.number == 8:
        vector = Vector.XM
    if vector is None:
        return f"signal {seen.number}, code {seen.code}"
    return f"#{vector.name} at {seen.address:#x}" if vector is Vector.PF else f"#{vector.name}"
