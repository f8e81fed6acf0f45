"""Interrupts that a guest takes. KVM delivers them by itself, so they are seen by what they leave behind.

Between exits: a vector whose in-service bit is new, in the local APIC (Intel SDM volume 3, 11.8.4) or in the 8259s. One
that came and was ended between two looks leaves nothing; with ``--step`` every one is seen, by where RIP went.
"""

from __future__ import annotations

from pyvmm.arch.x86.control_registers import long_mode
from pyvmm.explain.instructions import LENGTH_MAX, Reader
from pyvmm.gdb.linear_memory import read_memory
from pyvmm.kvm.state import Regs, Sregs
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.memory.guest_memory import GuestMemory

EXCEPTIONS = {
    0: "#DE divide error", 1: "#DB debug", 2: "NMI", 3: "#BP breakpoint", 4: "#OF overflow", 5: "#BR bound range",
    6: "#UD invalid opcode", 7: "#NM no FPU", 8: "#DF double fault", 10: "#TS invalid TSS",
    11: "#NP segment not present", 12: "#SS stack fault", 13: "#GP general protection", 14: "#PF page fault",
    16: "#MF x87 error", 17: "#AC alignment", 18: "#MC machine check", 19: "#XM SIMD error",
    21: "#CP control protection",
}  # fmt: skip
_ISR = 0x100


class Served:
    """The vectors a vCPU's local APIC has in service, from look to look."""

    def __init__(self) -> None:
        self._known: frozenset[int] = frozenset()

    def look(self, vcpu: Vcpu) -> list[str]:
        """A sentence for each that is new."""
        page = vcpu.get_lapic()
        now = frozenset(
            32 * word + bit
            for word in range(8)
            for bit in range(32)
            if int.from_bytes(page[_ISR + 16 * word : _ISR + 16 * word + 4], "little") >> bit & 1
        )
        fresh, self._known = now - self._known, now
        return [f"the local APIC has vector {vector:#04x} in service" for vector in sorted(fresh)]


def taken(reader: Reader, before: Regs, regs: Regs, sregs: Sregs, natural: int) -> tuple[int, str] | None:
    """Vector and name of what was taken, if RIP went to a gate's handler and the stack grew.

    ``natural``: where RIP would have gone by itself. Some KVMs tell of the step only behind the handler's first
    instruction.
    """
    if regs.rip == natural or regs.rsp == before.rsp:
        return None
    for vector, handler in _gates(reader.memory, sregs):
        behind = regs.rip - handler
        if behind == 0 or (0 < behind <= LENGTH_MAX and reader.length(regs, sregs, handler) == behind):
            if vector == 14:
                return vector, f"{EXCEPTIONS[14]} at {sregs.cr2:#x}"
            return vector, EXCEPTIONS.get(vector, "interrupt")
    return None


def _gates(memory: GuestMemory, sregs: Sregs) -> list[tuple[int, int]]:
    """(vector, offset of its handler) of all present gates (SDM volume 3, 6.11 and 6.14.1); real mode: the IVT."""
    if not sregs.cr0 & 1:
        raw = read_memory(memory, sregs, sregs.idt.base, min(sregs.idt.limit + 1, 1024))
        return [(at // 4, int.from_bytes(raw[at : at + 2], "little")) for at in range(0, len(raw) - 3, 4)]
    size = 16 if long_mode(sregs) else 8
    raw = read_memory(memory, sregs, sregs.idt.base, min(sregs.idt.limit + 1, 256 * size))
    found = []
    for at in range(0, len(raw) - size + 1, size):
        gate = raw[at : at + size]
        if gate[5] & 0x80:
            offset = int.from_bytes(gate[0:2] + gate[6:8] + (gate[8:12] if size == 16 else b""), "little")
            found.append((at // size, offset))
    return found
