"""What a port exit costs: served by a Python device, by the native loop, collected by KVM; against a C loop.

The same real-mode guest runs in a pyvmm machine (``build_machine``, real bus, real devices) and under
``pio_exit_loop.c``. It makes one access to a port after the other, unrolled, so that nearly all of its time is
exits. The two take turns of a few milliseconds on the same host CPU: the guest asks a port for its turn, warms up,
marks begin and end by the same port, and there both sides read their clocks. Phases:

python_read   ``in`` from a port whose device is Python
python_write  ``out`` to it
latch_read    ``in`` from the UART's line status, which the native loop answers
sink_write    ``out`` to the UART's data register, collected by the native loop (coalescing switched off)
coalesced     the same with KVM's coalesced ring, as pyvmm runs normally; the C loop uses the ring, too

Times are per access: wall, the vCPU thread's CPU, and for pyvmm the whole process's CPU, since its main loop carries
the collected bytes to the UART's backend (a C loop would have to do that, too, and does not).
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from figures import REPOSITORY, document, figure, main, paired_ratio, verdict

from pyvmm.devices.device import Device
from pyvmm.errors import HostError
from pyvmm.host.profile import load_profile
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig

UNROLLED = 64
ROUNDS = 101
PORT_MARK = 0x300
PORT_COUNTER = 0x310
PORT_SERIAL = 0x3F8
PORT_LINE_STATUS = PORT_SERIAL + 5
MARK_BEGIN, MARK_TURN, MARK_END = 0, 0x4000, 0x8000


class Phase(NamedTuple):
    """``blocks`` times UNROLLED accesses to ``port``, after one block that is not timed."""

    name: str
    direction: str
    port: int
    blocks: int = 8

    @property
    def accesses(self) -> int:
        """How many of them are timed."""
        return self.blocks * UNROLLED


EXITS = (
    Phase("python_read", "in", PORT_COUNTER),
    Phase("python_write", "out", PORT_COUNTER),
    Phase("latch_read", "in", PORT_LINE_STATUS),
    Phase("sink_write", "out", PORT_SERIAL),
)
COALESCED = (Phase("coalesced", "out", PORT_SERIAL, 64),)
TARGETS = {"python_read": 1.35, "python_write": 1.35, "latch_read": 1.1, "sink_write": 1.1}


class Clocks(NamedTuple):
    """Nanoseconds."""

    wall: int
    thread: int
    process: int


class Turn(NamedTuple):
    """What both sides took for one phase of one round."""

    ours: Clocks
    theirs: Clocks


def guest(phases: tuple[Phase, ...]) -> bytes:
    """The image: ROUNDS times (turn, warm-up, begin, accesses, end) for each phase; then debug-exit."""
    code = b"".join(
        mark(MARK_TURN) + accesses(p, 1) + mark(MARK_BEGIN) + accesses(p, p.blocks) + mark(MARK_END) for p in phases
    )
    head = b"\xbd" + struct.pack("<H", ROUNDS)  # mov bp, ROUNDS
    back = b"\x4d\x0f\x85"  # dec bp; jnz ...
    return head + code + back + struct.pack("<h", -(len(code) + 5)) + b"\x31\xc0\xe6\xf4\xf4"  # xor ax,ax; out 0xf4,al


def mark(value: int) -> bytes:
    """mov dx, PORT_MARK; mov ax, value; out dx, ax."""
    return b"\xba" + struct.pack("<H", PORT_MARK) + b"\xb8" + struct.pack("<H", value) + b"\xef"


def accesses(phase: Phase, blocks: int) -> bytes:
    """mov dx, port; mov al, '.'; mov cx, blocks; UNROLLED times in al, dx or out dx, al; dec cx; jnz to the first."""
    access = b"\xec" if phase.direction == "in" else b"\xee"
    head = b"\xba" + struct.pack("<H", phase.port) + b"\xb0.\xb9" + struct.pack("<H", blocks)
    return head + access * UNROLLED + b"\x49\x75" + struct.pack("b", -(UNROLLED + 3))


class Stopwatch(Device):
    """The port of marks: lets the other side go first, then reads the clocks."""

    max_access = 2

    def __init__(self, other: subprocess.Popen[bytes], cpu: int) -> None:
        super().__init__()
        self.turns: list[Turn] = []
        self.problem = ""
        self._other = other
        self._cpu = cpu
        self._theirs = Clocks(0, 0, 0)
        self._begin = Clocks(0, 0, 0)
        self.exits: list[int] = []

    def write(self, offset: int, size: int, value: int) -> None:
        if value == MARK_TURN:
            if not self.turns:
                os.sched_setaffinity(0, {self._cpu})  # of this thread, the vCPU's
            assert self._other.stdin is not None and self._other.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it ended: then there is no line, either
                self._other.stdin.write(b"t")
                self._other.stdin.flush()
            words = self._other.stdout.readline().split()
            if len(words) != 3:
                self.problem = "the C loop gave up"
                words = [b"0", b"1", b"1"]
            self.exits.append(int(words[0]))
            self._theirs = Clocks(int(words[1]), int(words[2]), int(words[2]))
        elif value == MARK_BEGIN:
            self._begin = clocks()
        else:
            took = Clocks(*(end - begin for begin, end in zip(self._begin, clocks(), strict=True)))
            self.turns.append(Turn(took, self._theirs))


def clocks() -> Clocks:
    """Now."""
    return Clocks(time.monotonic_ns(), time.thread_time_ns(), time.process_time_ns())


class Counter(Device):
    """What the C loop does with a port: count reads, keep what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.written = bytearray()

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return self.reads & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append(value)


@contextlib.contextmanager
def c_loop(image: str, cpu: int, *, coalesce: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The C loop, compiled and started; it waits for its first turn."""
    folder = REPOSITORY / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "pio_exit_loop"
    source = Path(__file__).with_name("pio_exit_loop.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(source)], check=True)
    command = [str(program), image, str(cpu), *(["coalesce"] if coalesce else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def run(phases: tuple[Phase, ...], *, coalesce: bool) -> dict[str, list[Turn]]:
    """One life of the guest on both sides; turns by phase, without the first round."""
    cpu = max(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        image = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-bench-")), "pio.bin")
        Path(image).write_bytes(guest(phases))
        other = stack.enter_context(c_loop(image, cpu, coalesce=coalesce))
        config = MachineConfig(image=image, memory=1 << 20, serial="null", timeout=30.0)
        machine = stack.enter_context(build_machine(config, frozenset(load_profile().quirks)))
        received = bytearray()
        machine.backend.observe = received.extend
        if not coalesce:
            machine.vm.unregister_coalesced(PORT_SERIAL, 1, pio=True)
        stopwatch, counter = Stopwatch(other, cpu), Counter()
        machine.ports.claim(PORT_MARK, 2, stopwatch)
        machine.ports.claim(PORT_COUNTER, 1, counter)
        ending = machine.run()
        problem = stopwatch.problem or check(phases, counter, received, stopwatch.exits, coalesce)
        if ending.kind != "debug-exit":
            problem = f"the guest ended by {ending.kind} ({ending.reason})"
        native = int(machine.vcpus[0].native.native_exits)
    expected = sum(p.accesses * ROUNDS for p in phases if p.port in (PORT_SERIAL, PORT_LINE_STATUS))
    if not coalesce and native < expected:
        problem = problem or f"the native loop served {native} exits, not {expected}"
    if problem:
        raise HostError(f"not measured: {problem}")
    return {p.name: stopwatch.turns[len(phases) + i :: len(phases)] for i, p in enumerate(phases)}


def check(phases: tuple[Phase, ...], counter: Counter, received: bytearray, exits: list[int], coalesce: bool) -> str:
    """What did not happen as it should have, for the figures to mean anything."""

    def total(direction: str, port: int) -> int:
        return ROUNDS * sum(p.accesses + UNROLLED for p in phases if (p.direction, p.port) == (direction, port))

    if counter.reads != total("in", PORT_COUNTER) or len(counter.written) != total("out", PORT_COUNTER):
        return f"the Python device had {counter.reads} reads and {len(counter.written)} writes"
    if bytes(received) != b"." * total("out", PORT_SERIAL):
        return f"{len(received)} bytes of serial output arrived"
    if not coalesce and exits != [p.accesses + 1 for p in phases] * ROUNDS:  # the end mark is an exit, too
        return "the C loop had another number of exits"
    return ""


def compare(turns: list[Turn], phase: Phase) -> dict[str, Any]:
    """All figures of one phase."""

    def each(side: str, clock: str) -> list[float]:
        return [getattr(getattr(turn, side), clock) / phase.accesses / 1e3 for turn in turns]

    wall, wall_c = each("ours", "wall"), each("theirs", "wall")
    cpu, cpu_c = each("ours", "thread"), each("theirs", "thread")
    return {
        "pyvmm_wall": figure(wall, "us"),
        "c_wall": figure(wall_c, "us"),
        "pyvmm_vcpu_cpu": figure(cpu, "us"),
        "pyvmm_process_cpu": figure(each("ours", "process"), "us"),
        "c_cpu": figure(cpu_c, "us"),
        "ratio_wall": paired_ratio(wall, wall_c),
        "ratio_cpu": paired_ratio(cpu, cpu_c),
    }


def measure() -> dict[str, Any]:
    """Both guests."""
    install_kick_signal()
    turns = run(EXITS, coalesce=False) | run(COALESCED, coalesce=True)
    figures = {phase.name: compare(turns[phase.name], phase) for phase in (*EXITS, *COALESCED)}
    return document(
        what="one port access of a real-mode guest, by who serves it",
        against="the same guest under a minimal VMM in C (pio_exit_loop.c, gcc -O2)",
        figures=figures,
        ratio={name: figures[name]["ratio_wall"].median for name in figures},
        target={name: verdict(figures[name]["ratio_wall"].median, most) for name, most in TARGETS.items()},
    )


if __name__ == "__main__":
    main(measure)
