"""Symbols of an ELF image, for crash reports and tools: which function is this address in?

Read through pyelftools, on demand and never on the way to the first guest instruction. Symbols are an
aid: a file whose symbol table is damaged or absent just has none.
"""

from __future__ import annotations

import bisect
import struct

_ENTRY = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}
_NAMED_TYPES = (0, 1, 2)  # STT_NOTYPE (assembly labels), STT_OBJECT, STT_FUNC
_NAME_MAX = 256


class SymbolTable:
    """Symbols in address order."""

    def __init__(self, symbols: list[tuple[int, int, str]]) -> None:
        """``symbols``: (address, size in bytes or 0 if unknown, name)."""
        self._symbols = sorted(symbols)
        self._addresses = [s[0] for s in self._symbols]

    def __len__(self) -> int:
        return len(self._symbols)

    def lookup(self, address: int) -> tuple[str, int] | None:
        """(name, offset) of the symbol ``address`` lies in; ``None`` if before all or behind a sized one."""
        index = bisect.bisect_right(self._addresses, address) - 1
        if index < 0:
            return None
        start, size, name = self._symbols[index]
        if size and address >= start + size:
            return None
        return name, address - start

    def address(self, name: str) -> int | None:
        """Where ``name`` is."""
        return next((address for address, _, other in self._symbols if other == name), None)


def read_symbols(path: str) -> SymbolTable:
    """The symbols of the ELF file at ``path``; an empty table if it has none that can be read."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            elf = ELFFile(file)
            section = elf.get_section_by_name(".symtab")
            if section is None or section["sh_type"] != "SHT_SYMTAB":
                return SymbolTable([])
            strings = elf.get_section(section["sh_link"])
            # A section's size is what the file claims, and reading allocates it first.
            if any(s["sh_offset"] + s["sh_size"] > size for s in (section, strings)):
                return SymbolTable([])
            return SymbolTable(_decode(section.data(), strings.data(), elf.elfclass))
    except (ELFError, OSError, ValueError, KeyError, AttributeError, AssertionError, TypeError, struct.error):
        return SymbolTable([])  # whatever pyelftools makes of a damaged file


def _decode(table: bytes, strings: bytes, bits: int) -> list[tuple[int, int, str]]:
    entry = _ENTRY[bits]
    symbols = []
    for fields in entry.iter_unpack(table[: len(table) // entry.size * entry.size]):
        if bits == 64:
            name_at, info, _, section, address, size = fields
        else:
            name_at, address, size, info, _, section = fields
        if section == 0 or info & 0xF not in _NAMED_TYPES:
            continue
        end = strings.find(b"\0", name_at, name_at + _NAME_MAX)
        if name_at < len(strings) and end > name_at:
            symbols.append((address, size, strings[name_at:end].decode("utf-8", "replace")))
    return symbols
