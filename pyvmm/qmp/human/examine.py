"""``x`` and ``xp``: memory as QEMU's monitor shows it.

``x/COUNT FORMAT SIZE ADDRESS``: format x, d, u, o, c or i; size b, h, w, g. The address is a sum of numbers and
registers (``$rip``, ``$rsp+8``). What is not said is 1, x, w.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pyvmm.kvm.state import Regs
from pyvmm.machine.crash_report import code_bits
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.qmp.command_set.memory import read_linear

COUNT_MAX = 65536
_SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}
_TERM = re.compile(r"\s*([+-])?\s*(?:\$([a-z0-9]+)|(0[xX][0-9a-fA-F]+|[0-9]+))\s*")
_ALIASES = {"pc": "rip", "sp": "rsp", "fp": "rbp", "eflags": "rflags"}
_LONGEST_INSTRUCTION = 15

Reader = Callable[[int, int], bytes | None]


class BadExpression(Exception):
    """Text for the user."""


def examine(machine: Machine, words: str, *, physical: bool, cpu: int) -> list[str]:
    """The lines of ``x`` or ``xp`` (``physical``) with arguments ``words``; BadExpression."""
    form, _, rest = words.strip().partition(" ") if words.startswith("/") else ("", "", words)
    count, letter, size = _parse_form(form[1:])
    with machine.standing_still():
        vcpu = machine.vcpus[cpu]
        sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
        address = parse_address(rest, regs)

        def linear(at: int, length: int) -> bytes | None:
            pieces = []
            while length:
                piece = min(length, PAGE_SIZE - at % PAGE_SIZE)
                data = read_linear(machine.memory, sregs, at, piece)
                if data is None:
                    return None
                pieces.append(data)
                at, length = at + piece, length - piece
            return b"".join(pieces)

        def gpa(at: int, length: int) -> bytes | None:
            return machine.memory.read(at, length) if machine.memory.contains(at, length) else None

        read = gpa if physical else linear
        if letter == "i":
            return _instructions(read, address, count, code_bits(sregs))
        return dump_lines(read, address, count, letter, size)


def _parse_form(form: str) -> tuple[int, str, int]:
    digits = re.match(r"[0-9]*", form)
    assert digits is not None
    count = int(digits[0]) if digits[0] and len(digits[0]) < 10 else COUNT_MAX + 1 if digits[0] else 1
    if count > COUNT_MAX:
        raise BadExpression(f"at most {COUNT_MAX} items at once")
    letter, size = "x", 0
    for mark in form[digits.end() :]:
        if mark in "xduoci":
            letter = mark
        elif mark in _SIZES:
            size = _SIZES[mark]
        else:
            raise BadExpression(f"invalid char in format: '{mark}'")
    return count, letter, 1 if letter == "c" else size or 4


def parse_address(text: str, regs: Regs) -> int:
    """The value of an expression."""
    at, value = 0, 0
    if not text.strip():
        raise BadExpression("unexpected end of expression")
    while at < len(text):
        term = _TERM.match(text, at)
        if term is None or (at > 0 and term[1] is None):
            raise BadExpression(f"invalid char '{text[at:].strip()[:1]}' in expression")
        sign, register, number = term.groups()
        if register is None:
            if len(number) > 40:
                raise BadExpression("number too large")
            amount = int(number, 16 if number[:2] in ("0x", "0X") else 8 if _octal(number) else 10)
        else:
            name = _ALIASES.get(register, register)
            if name not in Regs.__struct_fields__:
                raise BadExpression("unknown register")
            amount = getattr(regs, name)
        value += -amount if sign == "-" else amount
        at = term.end()
    return value & ((1 << 64) - 1)


def _octal(number: str) -> bool:
    return len(number) > 1 and number[0] == "0" and not set(number) & {"8", "9"}


def dump_lines(read: Reader, address: int, count: int, letter: str, size: int) -> list[str]:
    """``count`` items of ``size`` bytes; ends with the first line that cannot be read."""
    lines: list[str] = []
    per_line = (8 if size == 1 else 16) // size
    while count > 0:
        items = min(count, per_line)
        data = read(address, items * size)
        if data is None:
            return [*lines, f"{address:016x}: Cannot access memory"]
        values = [data[at : at + size] for at in range(0, len(data), size)]
        lines.append(f"{address:016x}:" + "".join(" " + _item(value, letter) for value in values))
        address = (address + items * size) & ((1 << 64) - 1)
        count -= items
    return lines


def _item(data: bytes, letter: str) -> str:
    bits = 8 * len(data)
    value = int.from_bytes(data, "little")
    if letter == "x":
        return f"0x{value:0{bits // 4}x}"
    if letter == "o":
        return (f"0{value:o}" if value else "0").rjust((bits + 2) // 3)
    if letter == "c":
        special = {0x27: "\\'", 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r"}.get(value)
        plain = chr(value) if 32 <= value <= 126 else "\\x" + data[:1].hex()
        return f"'{special or plain}'"
    signed = int.from_bytes(data, "little", signed=True)
    return f"{signed if letter == 'd' else value:>{(bits * 10 + 32) // 33}}"


def _instructions(read: Reader, address: int, count: int, bits: int) -> list[str]:
    from iced_x86 import Decoder, Formatter, FormatterSyntax

    formatter = Formatter(FormatterSyntax.GAS)
    lines: list[str] = []
    for _ in range(count):
        # As many bytes as there are: the last instruction before a hole is shorter than the longest.
        code = next((d for n in range(_LONGEST_INSTRUCTION, 0, -1) if (d := read(address, n)) is not None), None)
        if code is None:
            return [*lines, f"{address:#010x}: unable to read memory"]
        instruction = Decoder(bits, code, ip=address).decode()
        length = max(1, instruction.len)
        lines.append(f"{address:#010x}:  {code[:length].hex(' '):<24} {formatter.format(instruction)}")
        address += length
    return lines
