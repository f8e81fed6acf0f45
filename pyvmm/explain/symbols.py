"""Names of addresses, from an ELF image's symbol table; none for anything else."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

REACH = 1 << 16
"""How far behind a symbol that says no size an address may lie and still be told by its name."""
SYMBOLS_MAX = 1 << 20


class Symbols:
    """``pairs``: (address, size or 0, name)."""

    def __init__(self, pairs: list[tuple[int, int, str]] | None = None) -> None:
        self._pairs = sorted(pairs or [])
        self._starts = [at for at, _, _ in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, address: int) -> str | None:
        """``main`` or ``main+0x12``."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        start, size, name = self._pairs[index]
        if address - start >= (size or REACH):
            return None
        return name if address == start else f"{name}+{address - start:#x}"

    def start(self, address: int) -> int | None:
        """Where the function that ``address`` is in begins."""
        index = bisect_right(self._starts, address) - 1
        return self._starts[index] if index >= 0 and self.name(address) is not None else None

    def address(self, name: str) -> int | None:
        """Where ``name`` is."""
        return next((at for at, _, known in self._pairs if known == name), None)


def symbols_of(path: str) -> Symbols:
    """The symbols in ``path``: functions and labels; empty if it is no ELF or is stripped."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    pairs: list[tuple[int, int, str]] = []
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"\x7fELF":
                return Symbols()
            for section in ELFFile(file).iter_sections():
                if isinstance(section, SymbolTableSection):
                    for symbol in section.iter_symbols():
                        if _is_label(symbol):
                            pairs.append((symbol["st_value"], symbol["st_size"], symbol.name))
                        if len(pairs) > SYMBOLS_MAX:
                            return Symbols(pairs)
    except (OSError, ELFError, ValueError, AssertionError):  # an image that can be loaded may have a broken table
        return Symbols()
    return Symbols(pairs)


def _is_label(symbol: Any) -> bool:
    kind, section = symbol["st_info"]["type"], symbol["st_shndx"]
    return bool(symbol.name) and kind in ("STT_FUNC", "STT_NOTYPE") and section not in ("SHN_UNDEF", "SHN_ABS")
