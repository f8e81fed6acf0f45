"""A session against any client: whatever is sent, each packet gets one answer, and nothing but it changes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import StateError
from pyvmm.gdb.breakpoints import Breakpoints, Key
from pyvmm.gdb.debugger import Debugger, Motion
from pyvmm.gdb.packets import escape, expand_runs, unescape
from pyvmm.gdb.session import READ_MAX, Session, SessionEnd
from pyvmm.gdb.stops import Stop
from pyvmm.gdb.target_description import ARCHITECTURES, TargetDescription
from pyvmm.host.debug_facilities import DebugFacilities
from pyvmm.host.probe_layout import Mode, special_registers
from pyvmm.kvm.state import Dtable, Regs, Segment, Sregs
from pyvmm.memory.guest_memory import GuestMemory, Region

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine

MEMORY = 1 << 16


def real_mode() -> Sregs:
    segment = Segment()
    segments: dict[str, Any] = dict.fromkeys(("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"), segment)
    reset = Sregs(
        **segments,
        gdt=Dtable(), idt=Dtable(), cr0=0, cr2=0, cr3=0, cr4=0, cr8=0, efer=0, apic_base=0xFEE00900,
    )  # fmt: skip
    return special_registers(Mode.REAL16, reset, 0)


class FakeVcpu:
    def __init__(self, index: int) -> None:
        self.index = index
        self.regs, self.sregs, self.xsave = Regs(rip=0x7C00), real_mode(), bytes(4096)

    def get_regs(self) -> Regs:
        return self.regs

    def set_regs(self, regs: Regs) -> None:
        self.regs = regs

    def get_sregs(self) -> Sregs:
        return self.sregs

    def set_sregs(self, sregs: Sregs) -> None:
        self.sregs = sregs

    def get_xsave(self) -> bytes:
        return self.xsave

    def set_xsave(self, xsave: bytes) -> None:
        self.xsave = bytes(xsave)

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        return dict.fromkeys(indices, 0)

    def set_msrs(self, values: dict[int, int]) -> None:
        pass


class FakeMachine:
    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.vcpus = [FakeVcpu(0), FakeVcpu(1)]

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        yield


class FakeDebugger:
    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self.breakpoints = Breakpoints(machine.memory, frozenset(), DebugFacilities(execute=True, data=True, int3=True))
        self.running = False
        self.block_interrupts = True
        self.last_stop = Stop(0)
        self.motions: list[dict[int, Motion]] = []

    def insert(self, key: Key, cpu: int) -> None:
        self.breakpoints.insert(key, self._machine.vcpus[cpu].get_sregs())

    def remove(self, key: Key) -> None:
        self.breakpoints.remove(key)

    def go(self, motions: Mapping[int, Motion]) -> None:
        self.motions.append(dict(motions))
        if len(self.motions) % 2:
            raise StateError("not now")

    def interrupt(self) -> None:
        pass

    def kill(self) -> None:
        pass


class Wire:
    """A session and what it sends."""

    def __init__(self, memory: GuestMemory, architecture: str = "x86-64") -> None:
        self.machine = FakeMachine(memory)
        self.debugger = FakeDebugger(self.machine)
        self.sent = b""
        self.description = TargetDescription(architecture)
        machine, debugger = cast("Machine", self.machine), cast("Debugger", self.debugger)
        self.session = Session(machine, debugger, self.description, self._take, lambda line, cpu: [line] * 3)

    def _take(self, data: bytes) -> None:
        self.sent += data

    def ask(self, payload: bytes) -> list[bytes]:
        """The packets that answer it."""
        raw = escape(payload)
        self.sent = b""
        self.session.receive(b"$%s#%02x" % (raw, sum(raw) & 0xFF))
        answers = []
        for frame in re.findall(rb"\$([^#]*)#[0-9a-f]{2}", self.sent):
            expanded = expand_runs(frame)
            assert expanded is not None
            answer = unescape(expanded)
            assert answer is not None
            answers.append(answer)
        return answers


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    region = Region(0, MEMORY, "session")
    yield GuestMemory([region])
    region.close()


NUMBER = st.sampled_from(["0", "1", "4", "7c00", "ffff", "10000", "ffffffffffffffff", "-1", "", "x", "f" * 40, "2000"])
PIECES = st.lists(NUMBER | st.sampled_from([",", ":", ";", "=", "+", "0cc0", "c", "s:1", "s:9", "C05"]), max_size=7)
NAMES = st.sampled_from(
    ["m", "M", "x", "X", "g", "G", "p", "P", "z0", "Z0", "Z1", "Z2", "Z4", "z4", "?", "H", "Hg", "Hc", "T", "vCont",
     "vCont;", "vKill", "c", "s", "S", "C", "q", "Q", "qC", "qSupported", "qXfer:features:read:target.xml:",
     "qRcmd,", "!", "bs", "qThreadExtraInfo,", "qqemu.sstep", "Qqemu.sstep=", "Qqemu.PhyMemMode:",
     "qfThreadInfo", "QStartNoAckMode"]
)  # fmt: skip
PACKETS = st.binary(max_size=20) | st.builds(lambda name, rest: (name + "".join(rest)).encode(), NAMES, PIECES)


@settings(max_examples=200)
@given(packets=st.lists(PACKETS, max_size=12))
def test_each_packet_is_answered_once_whatever_it_is(memory: GuestMemory, packets: list[bytes]) -> None:
    wire = Wire(memory)
    try:
        for packet in packets:
            answers = wire.ask(packet)
            told = [answer for answer in answers if not answer.startswith(b"O") or answer == b"OK"]
            resumed = packet[:1] in (b"c", b"C", b"s", b"S") or packet.startswith(b"vCont;")
            assert len(told) == 1 or (resumed and not told), (packet, answers)
            assert all(len(answer) <= 2 * READ_MAX + 16 for answer in answers)
            assert len(wire.debugger.breakpoints.registers) <= 4
    except SessionEnd:
        assert packet[:1] in (b"D", b"k")


@given(data=st.binary(max_size=400))
def test_any_bytes(memory: GuestMemory, data: bytes) -> None:
    with contextlib.suppress(SessionEnd):
        Wire(memory).session.receive(data)


@given(at=st.integers(0, MEMORY + 100), size=st.integers(0, 5000), data=st.binary(max_size=300))
def test_memory_is_read_as_written_and_its_end_is_one(memory: GuestMemory, at: int, size: int, data: bytes) -> None:
    wire = Wire(memory)
    fits = at + len(data) <= MEMORY
    (answer,) = wire.ask(b"X%x,%x:%s" % (at, len(data), data))
    assert (answer == b"OK") == (fits or not data)
    if fits:
        assert wire.ask(b"m%x,%x" % (at, len(data))) == [data.hex().encode()]
    (answer,) = wire.ask(b"m%x,%x" % (at, size))
    if at < MEMORY:
        assert bytes.fromhex(answer.decode()) == memory.read(at, min(size, MEMORY - at))
    else:
        assert answer == (b"E0e" if size else b"")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_come_in_the_order_and_width_of_the_description(memory: GuestMemory, architecture: str) -> None:
    wire = Wire(memory, architecture)
    xml, more = b"", b"m"
    while more == b"m":
        (piece,) = wire.ask(b"qXfer:features:read:target.xml:%x,400" % len(xml))
        more, xml = piece[:1], xml + piece[1:]
    tree = ElementTree.fromstring(xml)
    bits = [int(register.attrib["bitsize"]) for register in tree.iter("reg")]
    types = {"int", "int32", "int64", "code_ptr", "data_ptr", "i387_ext"}
    types |= {each.attrib["id"] for kind in ("flags", "union") for each in tree.iter(kind)}
    assert {register.attrib["type"] for register in tree.iter("reg")} <= types
    (values,) = wire.ask(b"g")
    assert len(values) == sum(bits) // 4
    for number, width in enumerate(bits):
        (value,) = wire.ask(b"p%x" % number)
        assert len(value) == width // 4
    assert wire.ask(b"p%x" % len(bits))[0][:1] == b"E"
    assert wire.ask(b"G" + values) == [b"OK"] and wire.ask(b"g") == [values]


@given(number=st.integers(0, 60), value=st.binary(min_size=16, max_size=16))
def test_a_register_holds_what_was_written(memory: GuestMemory, number: int, value: bytes) -> None:
    wire = Wire(memory)
    register = wire.description.registers[number]
    if register.name == "ftag" or register.source[0] == "selector":
        return  # not every value can be
    new = value[: register.bits // 8]
    if register.source[0] == "x87":
        new = new[:2] + bytes(len(new) - 2) if register.name in ("fctrl", "fstat", "fop") else new
    if register.name == "eflags":
        new = bytes([new[0] | 2]) + new[1:]
    if register.name == "rip":
        new = new[:4] + bytes(4)
    assert wire.ask(b"P%x=%s" % (number, new.hex().encode())) == [b"OK"]
    assert wire.ask(b"p%x" % number) == [new.hex().encode()]


def test_real_mode_shows_the_linear_program_counter(memory: GuestMemory) -> None:
    wire = Wire(memory, "i8086")
    wire.machine.vcpus[0].sregs.cs.base = 0x7C0 << 4
    wire.machine.vcpus[0].regs.rip = 5
    assert wire.ask(b"p8") == [(0x7C05).to_bytes(4, "little").hex().encode()]
    assert wire.ask(b"P8=107c0000") == [b"OK"] and wire.machine.vcpus[0].regs.rip == 0x10


def test_what_vcont_means(memory: GuestMemory) -> None:
    wire = Wire(memory)
    for packet in (b"vCont;s:2", b"vCont;s:1;c", b"vCont;c", b"vCont;S05:1;c:2", b"c"):
        wire.ask(packet)
    step, run = Motion.STEP, Motion.RUN
    both = {0: run, 1: run}
    assert wire.debugger.motions == [{1: step}, {0: step, 1: run}, both, {0: step, 1: run}, both]


def test_an_answer_that_got_lost_comes_again_but_not_for_ever(memory: GuestMemory) -> None:
    wire = Wire(memory)
    frame = wire.ask(b"qC") and wire.sent[1:]
    wire.sent = b""
    wire.session.receive(b"-")
    assert wire.sent == frame
    with pytest.raises(SessionEnd):
        wire.session.receive(b"-" * 100)
