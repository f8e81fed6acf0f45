"""What a crashed guest looked like: registers, the code around RIP, its disassembly."""

from __future__ import annotations

from typing import Any

from pyvmm.errors import GuestMemoryError, KvmError
from pyvmm.kvm.state import Regs, Sregs
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory

_CODE_BEFORE = 16
_CODE_AFTER = 48
_LINES = 8


def crash_report(vcpu: Vcpu, memory: GuestMemory) -> dict[str, Any]:
    """JSON-ready facts about a vCPU that stands still: ``registers``, ``mode``, ``code``, ``disassembly``."""
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except KvmError as error:
        return {"cpu": vcpu.index, "problem": str(error)}
    bits = code_bits(sregs)
    linear = (sregs.cs.base + regs.rip) & ((1 << 64) - 1 if bits == 64 else (1 << 32) - 1)
    code = _read_code(vcpu, memory, linear, _CODE_AFTER)
    before = _read_code(vcpu, memory, max(0, linear - _CODE_BEFORE), min(_CODE_BEFORE, linear))
    return {
        "cpu": vcpu.index,
        "mode": f"{bits}-bit, CPL {sregs.ss.dpl if bits != 16 or sregs.cr0 & 1 else 0}",
        "registers": _registers(regs, sregs),
        "code_before": before.hex(" "),
        "code": code.hex(" "),
        "disassembly": disassemble(code, regs.rip, bits),
    }


def code_bits(sregs: Sregs) -> int:
    """16, 32 or 64: how the CPU decodes what CS:RIP points at."""
    if sregs.cs.l and sregs.efer & (1 << 10):
        return 64
    return 32 if sregs.cs.db else 16


def disassemble(code: bytes, rip: int, bits: int) -> list[str]:
    """The first instructions of ``code``, one string each."""
    from iced_x86 import Decoder, Formatter, FormatterSyntax

    formatter = Formatter(FormatterSyntax.INTEL)
    lines: list[str] = []
    for instruction in Decoder(bits, code, ip=rip):
        if len(lines) == _LINES or (instruction.is_invalid and lines):
            break
        at = instruction.ip - rip
        raw = code[at : at + instruction.len].hex(" ")
        lines.append(f"{instruction.ip:#x}: {raw:<24} {formatter.format(instruction)}")
    return lines


def text_lines(crash: dict[str, Any]) -> list[str]:
    """The report for a terminal."""
    if "problem" in crash:
        return [f"cpu {crash['cpu']}: {crash['problem']}"]
    lines = [f"cpu {crash['cpu']}, {crash['mode']}"]
    items = [f"{name} {value}" for name, value in crash["registers"].items()]
    lines += ["  " + "  ".join(items[i : i + 4]) for i in range(0, len(items), 4)]
    lines += [f"  code {crash['code'] or '(not mapped)'}"]
    return lines + [("  -> " if i == 0 else "     ") + line for i, line in enumerate(crash["disassembly"])]


def _read_code(vcpu: Vcpu, memory: GuestMemory, linear: int, size: int) -> bytes:
    """Up to ``size`` bytes at a linear address; shorter where the mapping ends."""
    out = b""
    while len(out) < size:
        at = linear + len(out)
        piece = min(size - len(out), PAGE_SIZE - at % PAGE_SIZE)
        gpa = vcpu.translate(at)
        if gpa is None:
            break
        try:
            out += memory.read(gpa, piece)
        except GuestMemoryError:
            break
    return out


def _registers(regs: Regs, sregs: Sregs) -> dict[str, str]:
    general = {name: f"{getattr(regs, name):016x}" for name in Regs.__struct_fields__}
    segments = {
        name: f"{s.selector:04x}:{s.base:x}"
        for name, s in ((n, getattr(sregs, n)) for n in ("cs", "ds", "es", "fs", "gs", "ss", "tr"))
    }
    control = {name: f"{getattr(sregs, name):x}" for name in ("cr0", "cr2", "cr3", "cr4", "efer")}
    tables = {name: f"{t.base:x}+{t.limit:x}" for name, t in (("gdt", sregs.gdt), ("idt", sregs.idt))}
    return general | segments | control | tables
