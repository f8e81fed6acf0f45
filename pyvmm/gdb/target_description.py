"""What the debugger is told about the registers: one table per CPU mode gives the XML and the order of ``g``.

Source: GDB's manual, appendix G.2 (format), G.5.16 (features of i386 and x86-64; the names and their order are GDB's).

Three tables: 64-bit, 32-bit (``i386``) and real mode (``i8086``). GDB asks once per connection, so the table is chosen
when it connects (server.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from pyvmm.arch.x86.control_registers import CONTROL_BITS

ARCHITECTURES = {"x86-64": "i386:x86-64", "i386": "i386", "i8086": "i8086"}
"""What a user may ask for -> GDB's name."""

MSR_KERNEL_GS_BASE = 0xC0000102


@dataclass(frozen=True)
class Register:
    """``source`` says where the value is (registers.py): a kind and what of it."""

    name: str
    bits: int
    type: str
    source: tuple[str, str | int]


_GENERAL_64 = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
_GENERAL_32 = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")
_X87 = ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
_FLAGS = {"eflags": (4, "eflags"), "cr0_bits": (8, "cr0"), "cr4_bits": (8, "cr4"), "efer_bits": (8, "efer")}
"""GDB's type -> its size in bytes, and whose bits it has."""
_VECTOR_TYPES = """<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/>
<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/>
<field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>
"""


def _core(wide: bool) -> list[Register]:
    registers = [
        Register(name, 64 if wide else 32, "data_ptr" if name[1:] in ("bp", "sp") else "int64" if wide else "int32",
                 ("regs", name if wide else f"r{name[1:]}"))
        for name in (_GENERAL_64 if wide else _GENERAL_32)
    ]  # fmt: skip
    registers.append(Register("rip" if wide else "eip", 64 if wide else 32, "code_ptr", ("pc", "")))
    registers.append(Register("eflags", 32, "eflags", ("regs", "rflags")))
    registers += [Register(name, 32, "int32", ("selector", name)) for name in _SEGMENTS]
    registers += [Register(f"st{n}", 80, "i387_ext", ("st", n)) for n in range(8)]
    return registers + [Register(name, 32, "int", ("x87", name)) for name in _X87]


def _sse(wide: bool) -> list[Register]:
    registers = [Register(f"xmm{n}", 128, "vec128", ("xmm", n)) for n in range(16 if wide else 8)]
    return [*registers, Register("mxcsr", 32, "int", ("mxcsr", ""))]


def _system(wide: bool) -> list[Register]:
    bases = ("cs", "ds", "es", "ss") if wide else ("cs", "ds", "es", "ss", "fs", "gs")
    pointer = 64 if wide else 32  # as wide as GDB takes the architecture's data_ptr to be
    registers = [Register(f"{name}_base", pointer, "data_ptr", ("base", name)) for name in bases]
    if wide:
        registers.append(Register("k_gs_base", 64, "data_ptr", ("msr", MSR_KERNEL_GS_BASE)))
    registers += [Register(f"{name}_base", pointer, "data_ptr", ("table", name)) for name in ("gdt", "idt")]
    registers += [Register(f"{name}_base", pointer, "data_ptr", ("base", name)) for name in ("tr", "ldt")]
    types = {"cr0": "cr0_bits", "cr4": "cr4_bits", "efer": "efer_bits"}
    registers += [
        Register(name, 64, types.get(name, "int64"), ("control", name))
        for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
    ]
    return registers


def _features(wide: bool) -> dict[str, list[Register]]:
    features = {"org.gnu.gdb.i386.core": _core(wide), "org.gnu.gdb.i386.sse": _sse(wide)}
    if wide:
        features["org.gnu.gdb.i386.segments"] = [
            Register(f"{name}_base", 64, "int", ("base", name)) for name in ("fs", "gs")
        ]
    return {**features, "org.pyvmm.x86.system": _system(wide)}


class TargetDescription:
    """``architecture``: a key of ARCHITECTURES."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.features = _features(architecture == "x86-64")
        self.registers = [register for feature in self.features.values() for register in feature]

    def xml(self) -> str:
        """``target.xml``."""
        parts = [
            '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">',
            f"<architecture>{ARCHITECTURES[self.architecture]}</architecture>",
        ]
        for name, registers in self.features.items():
            used = {register.type for register in registers}
            parts.append(f'<feature name="{name}">')
            parts += [_flags_xml(flags) for flags in _FLAGS if flags in used]
            parts += [_VECTOR_TYPES] if "vec128" in used else []
            parts += [f'<reg name="{r.name}" bitsize="{r.bits}" type="{r.type}"/>' for r in registers]
            parts.append("</feature>")
        return "\n".join([*parts, "</target>"])


def _flags_xml(name: str) -> str:
    size, register = _FLAGS[name]
    fields = "".join(
        f'<field name="{bit.name}" start="{bit.shift}" end="{bit.shift}"/>' for bit in CONTROL_BITS[register]
    )
    return f'<flags id="{name}" size="{size}">{fields}</flags>'
