"""What each exercise's answer has to do. Each check returns a sentence, or raises NotYet."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pyvmm
from pyvmm.devices.bus import PORT_SPACE, Bus
from pyvmm.errors import DeadlineError, SectionError
from pyvmm.memory.guest_memory import GuestMemory, Region
from pyvmm.native import lib
from pyvmm.virtio.queue import VirtQueue

PAGE = 4096
PAGE_FAULT_STUB = 0x3000 + 16 * 14
"""Where pyvmm.Machine's #PF handler halts (host/probe_layout.py)."""


class NotYet(Exception):
    """What is not right, and what may help."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


def expect(right: bool, what: str, hint: str = "") -> None:
    """NotYet unless ``right``."""
    if not right:
        raise NotYet(what, hint)


def code_of(answer: Any, name: str = "CODE") -> bytes:
    """The machine code that the answer has."""
    code = getattr(answer, name, None)
    expect(isinstance(code, bytes) and len(code) > 0, f"{name} has to be bytes, at least one", "bytes.fromhex(...)")
    assert isinstance(code, bytes)
    return code


def exits(vm: pyvmm.Machine, limit: int = 1000) -> list[Any]:
    """All exits up to the end; NotYet if there is none."""
    try:
        seen = list(vm.steps(limit=limit))
    except DeadlineError as error:
        raise NotYet(f"the guest does not end: {error}", "hlt is f4") from None
    expect(len(seen) < limit, f"the guest has made {limit} exits and goes on", "hlt is f4")
    expect(isinstance(seen[-1], pyvmm.Halt), f"the guest ended with {seen[-1]}, not with hlt")
    return seen


def countdown(answer: Any) -> str:
    """Chapter 1."""
    with pyvmm.Machine(deadline=3) as vm:
        vm.load(code_of(answer))
        written = b"".join(one.data for one in exits(vm) if isinstance(one, pyvmm.PortWrite) and one.port == 0xE9)
    expect(written == b"9876543210", f"it wrote {written!r} to port 0xe9, not b'9876543210'",
           "dec sets the sign flag when 0 becomes -1; a digit is its number plus 0x30")  # fmt: skip
    return "ten digits, and a halt"


def which_mode(answer: Any) -> str:
    """Chapter 2."""
    code = code_of(answer)
    for mode, bits in (("real16", 16), ("prot32", 32), ("long64", 64)):
        with pyvmm.Machine(mode=mode, deadline=3) as vm:  # type: ignore[arg-type]
            vm.load(code)
            exits(vm)
            got = vm.regs.rax & 0xFF
        expect(got == bits, f"in {mode} AL is {got}, not {bits}",
               "b8 takes two bytes of a number in 16-bit code and four in others; 40 is an instruction in 32-bit code"
               " and a prefix in 64-bit code")  # fmt: skip
    return "the same bytes know where they are"


def one_string(answer: Any) -> str:
    """Chapter 3."""
    text = bytes(random.Random(3).choices(b"abcdefgh", k=40))
    with pyvmm.Machine(deadline=3) as vm:
        vm.load(code_of(answer))
        vm.set_regs(rcx=len(text))
        given = reads = 0
        try:
            for one in vm.steps(limit=1000):
                if isinstance(one, pyvmm.PortRead):
                    one.data = text[given : given + one.count].ljust(one.count, b"?")
                    given, reads = given + one.count, reads + 1
        except DeadlineError as error:
            raise NotYet(f"the guest does not end: {error}", "hlt is f4") from None
        got = vm.memory.read(0xA000, len(text))
    expect(got == text, f"at 0xa000 is {got!r}, not {text!r}", "insb puts a byte from port DX at ES:DI")
    expect(reads <= 2, f"that took {reads} exits", "one instruction does it all: rep is f3, insb 6c")
    return f"{len(text)} bytes in {reads} exit{'s' * (reads > 1)}"


def read_only(answer: Any) -> str:
    """Chapter 4."""
    page = 0xB000
    store = b"\xc6\x04\x25" + struct.pack("<I", page) + b"\x07\xf4"  # mov byte [page], 7; hlt
    look = b"\x8a\x04\x25" + struct.pack("<I", page) + b"\xf4"  # mov al, [page]; hlt
    other = b"\xc6\x04\x25" + struct.pack("<I", page + PAGE) + b"\x07\xf4"

    def after(code: bytes) -> int:
        with pyvmm.Machine(mode="long64", deadline=3) as vm:
            vm.load(code)
            vm.memory.write(page, b"\x2a")
            answer.protect(vm, page)
            exits(vm)
            expect(vm.memory.read(page, 1) == b"\x2a", "the guest has written to the page",
                   "bit 1 of the entry; and CR0.WP, or CPL 0 may write wherever it likes")  # fmt: skip
            return vm.regs.rip - 1

    expect(after(store) == PAGE_FAULT_STUB, "the write was no page fault", "bit 1 of the page's entry means: writable")
    expect(after(look) != PAGE_FAULT_STUB, "the page can no longer be read", "bit 0 has to stay")
    expect(after(other) != PAGE_FAULT_STUB, "the next page cannot be written, either", "each page has its own entry")
    return "a write faults, a read does not, and other pages are as they were"


def wakes(answer: Any) -> str:
    """Chapter 5."""
    for count in (1, 5):
        with pyvmm.Machine(deadline=3) as vm:
            vm.load(code_of(answer))
            for _ in range(count + 1):
                try:
                    seen = vm.step()
                except DeadlineError:
                    raise NotYet("it does not halt", "sti; hlt; count; jump back to the hlt") from None
                expect(isinstance(seen, pyvmm.Halt), f"it made the exit {seen}, not a halt")
                expect(bool(vm.regs.rflags >> 9 & 1), "it halts with interrupts off: nothing could ever wake it",
                       "sti is fb, and sets bit 9 of the flags")  # fmt: skip
            got = vm.memory.read(0xA000, 1)[0]
        expect(got == count, f"woken {count} times, it has counted {got} at 0xa000", "inc byte [0xa000] is fe 06 00 a0")
    return "it sleeps, and counts who woke it"


def device(answer: Any) -> str:
    """Chapter 6."""
    made = answer.CountingDoubler()
    ports = Bus("io", PORT_SPACE)
    ports.claim(0x500, 2, made)
    # mov dx,0x500; mov al,21; out dx,al; in al,dx; in al,dx; inc dx; in al,dx; hlt
    code = bytes.fromhex("ba0005 b015 ee ec ec 42 ec f4")
    with pyvmm.Machine(deadline=3) as vm:
        vm.load(code)
        answers = []
        for one in vm.steps(limit=20):
            if isinstance(one, pyvmm.PortWrite):
                ports.write(one.port, one.size, one.value)
            elif isinstance(one, pyvmm.PortRead):
                answers.append(ports.read(one.port, one.size))
                one.answer(answers[-1])
    expect(answers == [42, 42, 2], f"a guest that wrote 21, read twice, then the count, got {answers}, not [42, 42, 2]")
    saved = made.save()
    expect(set(saved) == {"value", "reads"}, f"save() gives {sorted(saved)}, not value and reads",
           "the fields of the DeviceState are what is saved")  # fmt: skip
    twin = answer.CountingDoubler()
    twin.load(saved)
    expect((twin.read(0, 1), twin.read(1, 1)) == (42, 3), "a twin that loads the state answers otherwise")
    for bad in ({"value": 1, "reads": -1}, {"value": 300, "reads": 0}, {"value": 1}):
        with contextlib.suppress(SectionError):
            twin.load(bad)
            raise NotYet(f"load() takes {bad}", "Annotated[int, Meta(ge=0)] and Byte say what a field may be")
    return "it doubles, counts, saves, and refuses nonsense"


@contextlib.contextmanager
def ram() -> Iterator[tuple[GuestMemory, Any]]:
    """64 KiB of a guest's memory, and the native core's table of it."""
    region, table = Region(0, 64 << 10), lib.pv_vm_new()
    try:
        lib.pv_vm_add_region(table, 0, region.size, region.hva, region.dirty.native)
        yield GuestMemory([region]), table
    finally:
        lib.pv_vm_free(table)
        region.close()


def request(answer: Any) -> str:
    """Chapter 7."""
    with ram() as (memory, table):
        queue = VirtQueue(table, 0, 8)
        queue.size, queue.descriptors, queue.driver_area, queue.device_area = 8, 0x1000, 0x2000, 0x3000
        queue.start(0)
        chain = queue.new_chain()
        expect(not queue.pop(chain), "there is something before anything was offered")
        answer.offer_read(memory, sector=5, header=0x4000, data=0x5000, status=0x6000)
        try:
            there = queue.pop(chain)
        except Exception as error:
            raise NotYet(f"the device says: {error}", "a chain ends where NEXT is not set") from None
        expect(there, "the device finds nothing in the ring", "the last thing is the available ring's index, at +2")
        expect(chain.readable == 16, f"the device may read {chain.readable} bytes, not the header's 16",
               "the header is the device's to read: no WRITE flag")  # fmt: skip
        expect(chain.writable == 513, f"the device may write {chain.writable} bytes, not 512 and a status",
               "flag 2 (WRITE) on both")  # fmt: skip
        header = struct.unpack("<IIQ", chain.read(0, 16))
        expect(header == (0, 0, 5), f"the header says {header}, not (0: read, 0, sector 5)")
        chain.write(0, b"D" * 512 + b"\0")
        expect(memory.read(0x5000, 512) == b"D" * 512, "what the device wrote is not at the data's address")
        expect(memory.read(0x6000, 1) == b"\0", "the status is not where it was wanted")
        queue.push(chain, 513)
    return "pyvmm's own queue took it for a read of sector 5"


def startup(answer: Any) -> str:
    """Chapter 8."""
    for address in (0x1000, 0x8000, 0x9F000):
        got = answer.messages(address)
        wanted = [0x4500, 0x4600 | address >> 12]
        what = f"for {address:#x} it sends {[hex(one) for one in got]}, not {[hex(one) for one in wanted]}"
        expect(list(got) == wanted, what, "INIT, then start-up, whose vector is the page's number")
    for bad in (0x8001, 0x100000):
        with contextlib.suppress(ValueError):
            answer.messages(bad)
            raise NotYet(f"{bad:#x} is no page below 1 MiB: ValueError", "the vector has 8 bits, a page 12")
    return "INIT, and a start-up message with the page's number"


class Source:
    """A real guest that counts in one of 16 pages after the other, and which of them were written since one asked."""

    FIRST, COUNT = 0x40, 16

    def __init__(self) -> None:
        # 1: mov ax,si; and ax,15; add ax,0x4000/4; shl... the segment of the page; inc word [0]; inc si; hlt; jmp 1b
        code = bytes.fromhex("89f0 250f00 c1e008 050040 8ed8 ff060000 46 f4 ebed")
        self.vm = pyvmm.Machine(deadline=3)
        self.vm.load(code)
        self.stopped = False
        self.reads_after_stop = 0
        self._seen = self._pages()
        self._dirty: set[int] = set(range(self.COUNT))

    def _pages(self) -> list[bytes]:
        return [self.vm.memory.read((self.FIRST + number) * PAGE, PAGE) for number in range(self.COUNT)]

    def run(self, steps: int) -> None:
        """The guest goes on meanwhile."""
        if not self.stopped:
            for _ in range(steps):
                self.vm.step()
        now = self._pages()
        self._dirty |= {number for number in range(self.COUNT) if now[number] != self._seen[number]}
        self._seen = now

    def stop(self) -> None:
        """It stands still from here on."""
        self.stopped = True

    def dirty(self) -> set[int]:
        """Pages written since this was asked last; all of them at first."""
        self.run(2)
        found, self._dirty = self._dirty, set()
        return found

    def read(self, page: int) -> bytes:
        """A page as it is now. The guest goes on while it is sent."""
        if self.stopped:
            self.reads_after_stop += 1
        content = self.vm.memory.read((self.FIRST + page) * PAGE, PAGE)
        self.run(1 if page % 4 == 0 else 0)
        return content


def precopy(answer: Any) -> str:
    """Chapter 9."""
    source = Source()
    with source.vm:
        got = answer.migrate(source)
        expect(source.stopped, "the guest still runs", "stop() before the last round")
        wanted = dict(enumerate(source._pages()))
        missing = sorted(set(wanted) - set(got))
        expect(not missing, f"pages {missing} never came")
        stale = [number for number in wanted if got[number] != wanted[number]]
        expect(not stale, f"pages {stale} are not as the guest left them", "ask dirty() once more, after stop()")
        few = Source.COUNT // 2
        expect(source.reads_after_stop <= few,
               f"{source.reads_after_stop} pages were sent while the guest stood still; {few} are enough",
               "go round while more than a few are written")  # fmt: skip
    return f"all pages, {source.reads_after_stop} of them while the guest stood still"


def may_stop(answer: Any) -> str:
    """Chapter 10."""
    cases = [
        ((7324, 100_000_000, 300), True), ((7325, 100_000_000, 300), False), ((0, 1000, 0), True),
        ((1, 1000, 0), False), ((1, 4096, 1000), True), ((2, 4096, 1000), False), ((1_000_000, 1 << 40, 10), True),
    ]  # fmt: skip
    for (pages, line, limit), wanted in cases:
        got = bool(answer.may_stop(pages, line, limit))
        expect(got == wanted, f"{pages} pages, {line} bytes/s, {limit} ms: it says {got}, not {wanted}",
               "a page has 4096 bytes, a second 1000 ms")  # fmt: skip
    return "it stops when the rest fits into the downtime, and not before"


def survivor(answer: Any) -> str:
    """Chapter 11."""
    order = ["checkpoint-request", "checkpoint-reply", "vmstate-send", "vmstate-size", "vmstate", "vmstate-received",
             "vmstate-loaded"]  # fmt: skip
    for died in range(len(order) + 1):
        passed = order[:died]
        got = answer.goes_on_from(7, passed)
        wanted = 7 if "vmstate" in passed else 6
        what = f"the primary died behind {passed[-1] if passed else 'checkpoint 6'}: it says {got}, not {wanted}"
        expect(got == wanted, what, "a checkpoint counts once all of it is held and checked, whatever was said of it")
    return "what is held whole counts; what is not never was"


CHECKS: dict[int, Callable[[Any], str]] = {
    1: countdown, 2: which_mode, 3: one_string, 4: read_only, 5: wakes, 6: device, 7: request, 8: startup, 9: precopy,
    10: may_stop, 11: survivor,
}  # fmt: skip
