"""What is told: one happening of a guest, and how many like it follow each other."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = {
    "port": "an access to an I/O port",
    "memory": "an access to memory that is a device's, or nobody's",
    "mode": "a CPU's mode, its paging, CPL or a bit of CR0, CR4, EFER changed",
    "interrupt": "an interrupt or exception was taken",
    "work-around": "pyvmm did what this host's KVM does not",
    "step": "one instruction (with --step)",
    "walk": "the way through the page tables (with --walk)",
    "end": "the guest is over",
}
SAMPLE = 60
"""Values of joined events that are shown."""


@dataclass
class Event:
    """``place``: linear address of the instruction and its name; ``values``: what was read or written, in order.

    Events in a row that differ in their values only are one: a string sent byte by byte is a string.
    """

    kind: str
    seconds: float
    cpu: int
    text: str
    address: int | None = None
    symbol: str | None = None
    instruction: str | None = None
    device: str | None = None
    details: list[str] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    meaning: str = ""
    """Of the first value."""
    characters: bool = False
    """The values are text."""
    write: bool = False
    count: int = 1

    def continues(self, other: Event) -> bool:
        """Whether ``other`` came from the same place and says the same, but for its value."""
        same = (self.kind, self.cpu, self.text, self.address, self.device, self.details)
        return same == (other.kind, other.cpu, other.text, other.address, other.device, other.details) and (
            self.characters or self.values == other.values
        )

    def join(self, other: Event) -> None:
        """Take ``other`` in. Values beyond a sample are counted only."""
        self.count += other.count
        if self.characters and len(self.values) < SAMPLE:
            self.values += other.values

    @property
    def what(self) -> str:
        """The sentence."""
        text = self.text
        if self.characters:
            shown = bytes(value & 0xFF for value in self.values).decode("latin-1").encode("unicode_escape").decode()
            text += f' {"<-" if self.write else "->"} "{shown}{"..." if self.count > len(self.values) else ""}"'
        elif self.values:
            text += f" {'<-' if self.write else '->'} {self.values[0]:#x}"
            text += f" ({self.meaning})" if self.meaning else ""
        return text + (f"  [{self.count} times]" if self.count > 1 else "")

    @property
    def place(self) -> str:
        """``main+0x12``, or the address."""
        if self.address is None:
            return ""
        return self.symbol or f"{self.address:#x}"
