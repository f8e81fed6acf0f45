"""The debugger's breakpoints and watchpoints, and what each is made of on this host.

===========  ==========================================================================================
software     INT3 in guest memory, only while the guest runs: whoever pauses it (a snapshot, a checkpoint,
             the last round of a migration) finds memory as the guest left it.
hardware     A debug register. Where the work-arounds for entering CPL 0 are on they have DR3 and DR2, and
             DR1 catches what that KVM hands to the guest (native/guest_debug.c): DR0 is left. Else four.
watchpoint   A debug register; where KVM emulates CPL 0 it looks at none for data, and 64-bit CPL 3 has no
             use of them: there the vCPUs are stepped and the memory is compared after each instruction.
none         What the host's KVM does not do (host/debug_facilities.py) is refused with a line that says so.
===========  ==========================================================================================

What was asked for as a software breakpoint where nothing is mapped yet becomes a hardware one if a register is free (a
kernel's function before paging is on); a hardware one in 64-bit user code on those hosts becomes a software one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyvmm.arch.x86.user_entry import INT_QUIRK, SYSCALL_QUIRK
from pyvmm.errors import PyvmmError
from pyvmm.gdb.linear_memory import translate
from pyvmm.host.debug_facilities import DebugFacilities
from pyvmm.kvm.state import Sregs
from pyvmm.memory.guest_memory import GuestMemory
from pyvmm.native import lib

INT3 = b"\xcc"
BREAKPOINTS_MAX = 1000
"""Far more than anybody sets, and a bound for who does not mean well."""
WATCHED_MAX = 4096
_NOTHING_COMES = "this host's KVM does not report breakpoints"
_DR7_WRITE, _DR7_ACCESS = 1, 3
_LENGTH_CODES = {1: 0, 2: 1, 4: 3, 8: 2}


class NotAvailable(PyvmmError):
    """The breakpoint cannot be had; the line says why and what to do."""


@dataclass(frozen=True)
class Key:
    """``kind`` is the number in ``Z`` packets: 0 software, 1 hardware, 2 write, 3 read, 4 access."""

    kind: int
    address: int
    size: int


@dataclass
class Planted:
    """A software breakpoint: ``original`` is what its INT3 stands in for, ``None`` while it is not in memory."""

    gpa: int
    original: bytes | None = None


@dataclass(frozen=True)
class DebugRegister:
    """What one debug register holds. ``code``: its bits of DR7, LEN and R/W (SDM volume 3, 17.2.4)."""

    address: int
    code: int
    key: Key


@dataclass(frozen=True)
class Watched:
    """At most 8 bytes that are compared after each instruction."""

    gpa: int
    size: int
    key: Key


class Breakpoints:
    """All of one machine's, for every vCPU."""

    def __init__(self, memory: GuestMemory, quirks: frozenset[str], facilities: DebugFacilities) -> None:
        self._memory = memory
        self._facilities = facilities
        self.traps_to_guest = bool(quirks & {SYSCALL_QUIRK, INT_QUIRK})
        """64-bit CPL 3 runs natively here, and its #BP and #DB go to the guest."""
        self.stepped_watches = not facilities.data or self.traps_to_guest
        self.register_count = 1 if self.traps_to_guest else 4
        self.software: dict[int, Planted] = {}
        """By linear address."""
        self.registers: dict[int, DebugRegister] = {}
        """By number."""
        self.watched: list[Watched] = []
        self._made_of: set[Key] = set()

    # -- setting --------------------------------------------------------------------------------

    def insert(self, key: Key, sregs: Sregs) -> None:
        """Set it; setting it again is harmless. NotAvailable. Translated as a vCPU with ``sregs`` sees it."""
        if key in self._made_of:
            return
        if len(self._made_of) >= BREAKPOINTS_MAX:
            raise NotAvailable(f"at most {BREAKPOINTS_MAX} breakpoints")
        if key.size > WATCHED_MAX:
            raise NotAvailable(f"at most {WATCHED_MAX} bytes can be watched")
        found = translate(self._memory, sregs, key.address)
        in_user_page = found is not None and found.user and bool(sregs.cr0 >> 31)
        if found is not None and (key.kind == 0 or (key.kind == 1 and in_user_page and self.traps_to_guest)):
            if not self._facilities.int3:
                raise NotAvailable(f"{_NOTHING_COMES} (step instead)")
            self._insert_software(key, found.gpa)
        elif key.kind in (0, 1) and not self._facilities.execute:
            raise NotAvailable(f"{_NOTHING_COMES} (step instead)")
        elif key.kind in (0, 1):
            self._insert_registers(key, [(key.address, 1, 0)])
        elif self.stepped_watches and key.kind == 2:
            self._insert_watched(key, sregs)
        elif self.stepped_watches:
            raise NotAvailable("this host's KVM reports no access to memory at CPL 0: only changes can be watched")
        else:
            access = _DR7_WRITE if key.kind == 2 else _DR7_ACCESS
            self._insert_registers(key, [(at, size, access) for at, size in _aligned(key.address, key.size)])
        self._made_of.add(key)

    def _insert_software(self, key: Key, gpa: int) -> None:
        self.software.setdefault(key.address, Planted(gpa))

    def _insert_registers(self, key: Key, wanted: list[tuple[int, int, int]]) -> None:
        free = [number for number in range(self.register_count) if number not in self.registers]
        if len(wanted) > len(free):
            raise NotAvailable(self._no_register(key))
        for number, (address, size, access) in zip(free, wanted, strict=False):
            code = (_LENGTH_CODES[size] << 2 | access) if access else 0
            self.registers[number] = DebugRegister(address, code, key)

    def _no_register(self, key: Key) -> str:
        why = "nothing is mapped there now, and " if key.kind == 0 else ""
        if self.traps_to_guest:
            return f"{why}no debug register is free: here the debugger has one, the others make system calls work"
        return f"{why}not enough of the four debug registers are free"

    def _insert_watched(self, key: Key, sregs: Sregs) -> None:
        pieces = _aligned(key.address, key.size)
        if len(self.watched) + len(pieces) > lib.PV_WATCHES:
            raise NotAvailable(f"at most {lib.PV_WATCHES} times 8 bytes can be watched at once")
        new = []
        for at, size in pieces:
            found = translate(self._memory, sregs, at)
            if found is None:
                raise NotAvailable(f"nothing is mapped at {at:#x}")
            new.append(Watched(found.gpa, size, key))
        self.watched += new

    def remove(self, key: Key) -> None:
        """Take it out; one that is not there is no mistake."""
        if key not in self._made_of:
            return
        self._made_of.remove(key)
        if key.address in self.software and not any(k.address == key.address and k.kind < 2 for k in self._made_of):
            self._lift_one(self.software.pop(key.address))
        self.registers = {n: register for n, register in self.registers.items() if register.key != key}
        self.watched = [watched for watched in self.watched if watched.key != key]

    def clear(self) -> None:
        """Take out all."""
        for key in list(self._made_of):
            self.remove(key)

    # -- in memory, while no vCPU runs ------------------------------------------------------------

    def plant(self) -> None:
        """Put the INT3s in: the vCPUs are about to run."""
        for planted in self.software.values():
            if planted.original is None:
                planted.original = self._memory.read(planted.gpa, 1)
                self._memory.write(planted.gpa, INT3)

    def lift(self) -> None:
        """Put back what was there: the vCPUs stand still. What the guest wrote over one meanwhile stays."""
        for planted in self.software.values():
            self._lift_one(planted)

    def _lift_one(self, planted: Planted) -> None:
        original, planted.original = planted.original, None
        if original is not None and self._memory.read(planted.gpa, 1) == INT3:
            self._memory.write(planted.gpa, original)

    def forget_planted(self) -> None:
        """Memory was replaced: what was planted is gone with it."""
        for planted in self.software.values():
            planted.original = None

    def is_planted(self, address: int) -> bool:
        """Whether an INT3 at linear ``address`` is ours."""
        planted = self.software.get(address)
        return planted is not None and planted.original is not None

    @property
    def dr7(self) -> int:
        """Enable bits (global) and kinds of the registers in use."""
        return sum(2 << 2 * n | register.code << 16 + 4 * n for n, register in self.registers.items())


def _aligned(address: int, size: int) -> list[tuple[int, int]]:
    """``[address, address + size)`` as naturally aligned pieces of 1, 2, 4 or 8 bytes."""
    pieces = []
    while size > 0:
        length = next(n for n in (8, 4, 2, 1) if n <= size and address % n == 0)
        pieces.append((address, length))
        address, size = address + length, size - length
    return pieces
