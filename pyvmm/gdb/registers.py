"""Values of the registers that target_description.py names, of a vCPU that stands still.

Outside 64-bit mode the program counter is shown with the base of CS added: breakpoints, symbols and memory are by
linear address, and GDB knows one kind of address only. In protected mode with flat segments that is EIP itself.
"""

from __future__ import annotations

from pyvmm.arch.x86.control_registers import long_mode
from pyvmm.errors import PyvmmError
from pyvmm.gdb.target_description import Register
from pyvmm.kvm.state import Regs, Sregs
from pyvmm.kvm.vcpu import Vcpu

_X87_AT = {"fctrl": (0, 2), "fstat": (2, 2), "fop": (6, 2), "fioff": (8, 4), "fiseg": (12, 4), "fooff": (16, 4),
           "foseg": (20, 4)}  # fmt: skip
"""Offset and size in XSAVE's legacy region (SDM volume 1, table 13-1)."""
_TAGS_AT, _MXCSR_AT, _ST_AT, _XMM_AT, _XSTATE_BV_AT = 4, 24, 32, 160, 512
_XSTATE_X87, _XSTATE_SSE = 1, 2


class CannotWrite(PyvmmError):
    """The register cannot be set to that; a line for the user."""


def linear_pc(regs: Regs, sregs: Sregs) -> int:
    """Where the vCPU's next instruction is."""
    if long_mode(sregs) and sregs.cs.l:
        return regs.rip
    return (sregs.cs.base + regs.rip) & 0xFFFFFFFF


class RegisterFile:
    """All registers of one vCPU; written back by :meth:`write`. KVM is asked for what is needed."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._regs = vcpu.get_regs()
        self._sregs = vcpu.get_sregs()
        self._xsave: bytearray | None = None

    @property
    def _fpu(self) -> bytearray:
        if self._xsave is None:
            self._xsave = bytearray(self._vcpu.get_xsave())
        return self._xsave

    def read(self, register: Register) -> bytes:
        """Little-endian, as wide as the register is declared."""
        kind, what = register.source
        size = register.bits // 8
        if kind == "st":
            return bytes(self._fpu[_ST_AT + 16 * int(what) :][:10])
        if kind == "xmm":
            return bytes(self._fpu[_XMM_AT + 16 * int(what) :][:16])
        return (self._number(kind, what) & ((1 << register.bits) - 1)).to_bytes(size, "little")

    def _number(self, kind: str, what: str | int) -> int:
        name = str(what)
        if kind == "pc":
            return linear_pc(self._regs, self._sregs)
        if kind == "regs":
            return int(getattr(self._regs, name))
        if kind == "selector":
            return int(getattr(self._sregs, name).selector)
        if kind in ("base", "table"):
            return int(getattr(self._sregs, name).base)
        if kind == "control":
            return int(getattr(self._sregs, name))
        if kind == "msr":
            return self._vcpu.get_msrs([int(what)])[int(what)]
        if kind == "mxcsr":
            return int.from_bytes(self._fpu[_MXCSR_AT : _MXCSR_AT + 4], "little")
        if name == "ftag":
            return self._full_tags()
        at, length = _X87_AT[name]
        return int.from_bytes(self._fpu[at : at + length], "little")

    def _full_tags(self) -> int:
        """Two bits per physical register, as FSAVE has them, made from XSAVE's one (SDM volume 1, 10.5.1.1)."""
        top = self._fpu[3] >> 3 & 7
        tags = 0
        for number in range(8):
            tag = 3
            if self._fpu[_TAGS_AT] >> number & 1:
                value = self._fpu[_ST_AT + 16 * (number - top & 7) :][:10]
                exponent = int.from_bytes(value[8:], "little") & 0x7FFF
                mantissa = int.from_bytes(value[:8], "little")
                tag = 0 if exponent not in (0, 0x7FFF) and mantissa >> 63 else 1 if not exponent | mantissa else 2
            tags |= tag << 2 * number
        return tags

    def write(self, register: Register, value: bytes) -> None:
        """Set it; CannotWrite, or KvmError if KVM refuses the value. ``value`` is as wide as the register."""
        kind, what = register.source
        name, number = str(what), int.from_bytes(value, "little")
        if kind == "regs":
            if name == "rflags":
                number |= 2
            setattr(self._regs, name, number)
            self._vcpu.set_regs(self._regs)
        elif kind == "pc":
            if not (long_mode(self._sregs) and self._sregs.cs.l):
                number = (number - self._sregs.cs.base) & 0xFFFFFFFF
            self._regs.rip = number
            self._vcpu.set_regs(self._regs)
        elif kind == "msr":
            self._vcpu.set_msrs({int(what): number})
        elif kind in ("selector", "base", "table", "control"):
            self._write_special(kind, name, number)
        else:
            self._write_fpu(kind, what, value)

    def _write_special(self, kind: str, name: str, number: int) -> None:
        if kind == "control":
            setattr(self._sregs, name, number)
        elif kind == "selector":
            segment = getattr(self._sregs, name)
            if segment.selector == number:
                return
            if self._sregs.cr0 & 1:
                raise CannotWrite(f"{name} can be set in real mode only: its descriptor would have to be loaded")
            segment.selector, segment.base = number & 0xFFFF, (number & 0xFFFF) << 4
        else:
            getattr(self._sregs, name).base = number
        self._vcpu.set_sregs(self._sregs)

    def _write_fpu(self, kind: str, what: str | int, value: bytes) -> None:
        fpu = self._fpu
        if kind == "st":
            at = _ST_AT + 16 * int(what)
        elif kind == "xmm":
            at = _XMM_AT + 16 * int(what)
        elif kind == "mxcsr":
            at = _MXCSR_AT
        elif what == "ftag":
            tags = int.from_bytes(value, "little")
            at, value = _TAGS_AT, bytes([sum((tags >> 2 * n & 3 != 3) << n for n in range(8))])
        else:
            at, length = _X87_AT[str(what)]
            value = value[:length]
        fpu[at : at + len(value)] = value
        fpu[_XSTATE_BV_AT] |= _XSTATE_SSE if kind in ("xmm", "mxcsr") else _XSTATE_X87
        self._vcpu.set_xsave(fpu)
