"""Turns what a guest does into events: looks at the vCPU at each exit, and tells what is new."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from pyvmm.arch.x86.page_walk import levels
from pyvmm.devices.bus import Bus
from pyvmm.errors import KvmError
from pyvmm.explain.events import Event
from pyvmm.explain.instructions import Access, Found, Reader
from pyvmm.explain.interrupts import Served
from pyvmm.explain.modes import Mode, changes, mode_of
from pyvmm.explain.symbols import Symbols
from pyvmm.gdb.registers import linear_pc
from pyvmm.kvm.state import Regs, Sregs
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.memory.guest_memory import GuestMemory

TEXT_REGISTERS = frozenset({"THR", "CONSOLE", "LETTER"})
"""What is written there is text, and told as such."""


class Narrator:
    """One for a machine. Its methods are called in vCPU threads, or in the loop's while no vCPU runs.

    ``emulated``: whether KVM's emulator carries out the guest kernel's code here; ``walks``: linear addresses whose way
    through the page tables is told whenever it is another one.
    """

    def __init__(
        self,
        memory: GuestMemory,
        symbols: Symbols,
        tell: Callable[[Event], None],
        *,
        emulated: bool,
        walks: Sequence[int] = (),
    ) -> None:
        self._memory = memory
        self.symbols = symbols
        self._tell = tell
        self._emulated = emulated
        self._walks = walks
        self.current: Found | None = None
        """The instruction that is being stepped over, which spares looking for it."""
        self.reader = Reader(memory, symbols)
        self._modes: dict[int, Mode] = {}
        self._ways: dict[tuple[int, int], list[str]] = {}
        self._served: dict[int, Served] = {}
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """The guest runs from now on."""
        self._began = time.monotonic()

    # -- what happens -----------------------------------------------------------------------------

    def accessed(self, vcpu: Vcpu, bus: Bus, port: bool, write: bool, address: int, size: int, value: int) -> None:
        """An access came to a bus: ``value`` was written, or is what was read."""
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        cause = self.current or self.reader.cause(
            regs, sregs, Access(port, write, address, size), emulated=self._emulated and sregs.ss.dpl != 3
        )
        self.looked(vcpu, regs, sregs, cause)
        event = self._event("port" if port else "memory", vcpu.index, "", cause, regs, sregs)
        event.write = write
        event.values = [value]
        owner = bus.owner(address)
        where = f"port {address:#x}" if port else f"GPA {address:#x}"
        if owner is None:
            event.text = f"{where}: nobody is there"
        else:
            device, offset = owner.device, owner.offset + address - owner.base
            event.device = device.section_id
            register = device.register_at(offset, write=write)
            title = device.registers.title if device.registers is not None else device.section_id
            if not port:
                title = f"{device.section_id} ({title})"
            if register is None:
                event.text = f"{where}: {title}, offset {offset:#x}"
            else:
                event.text = f"{where}: {title}, {register.name} ({register.text})"
                shifted = value << 8 * max(0, offset - register.offset) if register.size > size else value
                event.meaning = register.describe(shifted)
                event.characters = write and register.name in TEXT_REGISTERS and size == 1
        self._give(event)

    def worked_around(self, vcpu: Vcpu, text: str) -> None:
        """The instruction fallback carried ``text`` out; RIP is behind it."""
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        self.looked(vcpu, regs, sregs)
        event = self._event("work-around", vcpu.index, f"KVM cannot emulate this; pyvmm did: {text}", None, regs, sregs)
        self._give(event)

    def stepped(
        self, vcpu: Vcpu, done: Found, before: Regs, regs: Regs, sregs: Sregs, taken: tuple[int, str] | None
    ) -> None:
        """``done`` was carried out; ``taken``: vector and name of what was taken behind it."""
        event = self._event("step", vcpu.index, "", done, before, sregs)
        moved = [name for name in Regs.__struct_fields__ if name not in ("rip", "rsp", "rflags")]
        said = [f"{name}={getattr(regs, name):#x}" for name in moved if getattr(regs, name) != getattr(before, name)]
        event.text = " ".join(said)
        self._give(event)
        if taken is not None:
            self._give(self._event("interrupt", vcpu.index, f"vector {taken[0]:#04x}: {taken[1]}", None, regs, sregs))
        self.looked(vcpu, regs, sregs, interrupts=False)

    def looked(
        self, vcpu: Vcpu, regs: Regs, sregs: Sregs, at: Found | None = None, *, interrupts: bool = True
    ) -> None:
        """Tell what is different from the last look at this vCPU, and was seen ``at`` an instruction."""
        index, mode = vcpu.index, mode_of(regs, sregs)
        last = self._modes.get(index)
        self._modes[index] = mode
        if last is None:
            self._give(self._event("mode", index, f"begins in {mode}", at, regs, sregs))
        elif said := changes(last, mode):
            event = self._event("mode", index, said[0], at, regs, sregs)
            event.instruction = None  # it is only where the change was seen
            event.details = said[1:]
            self._give(event)
        for address in self._walks:
            way = list(levels(self._memory, sregs, address))
            if self._ways.get((index, address)) != way:
                self._ways[index, address] = way
                name = self.symbols.name(address)
                event = self._event("walk", index, f"{address:#x}{f' ({name})' if name else ''}", at, regs, sregs)
                event.instruction, event.details = None, way
                self._give(event)
        if interrupts:
            self._interrupts(vcpu, regs, sregs)

    def _interrupts(self, vcpu: Vcpu, regs: Regs, sregs: Sregs) -> None:
        served = self._served.setdefault(vcpu.index, Served())
        try:
            fresh = served.look(vcpu)
        except KvmError:  # a machine without local APICs
            return
        for text in fresh:
            self._give(self._event("interrupt", vcpu.index, text, None, regs, sregs))

    def ended(self, text: str) -> None:
        """The guest is over."""
        self._give(Event("end", time.monotonic() - self._began, 0, text))

    # -- making events ----------------------------------------------------------------------------

    def _event(self, kind: str, cpu: int, text: str, found: Found | None, regs: Regs, sregs: Sregs) -> Event:
        address = found.address if found is not None else linear_pc(regs, sregs)
        return Event(
            kind, time.monotonic() - self._began, cpu, text, address, self.symbols.name(address),
            found.text if found is not None else None,
        )  # fmt: skip

    def _give(self, event: Event) -> None:
        with self._lock:
            self._tell(event)
