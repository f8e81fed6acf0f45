"""The measurements, one pair each; times in milliseconds, sizes in MiB."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from vmms import Monitor, command, running, wait_for, watch

from protection.pair import (
    CLOCK_TRIES,
    MEMORY,
    ClockError,
    Pair,
    PairEnded,
    Vmms,
    cpu_seconds,
    keeps_time,
    pair,
    resident,
    watch_alone,
)
from protection.records import (
    pauses,
    pyvmm_messages,
    qemu_messages,
    ran_at,
    rounds_of,
    sizes,
    until_received,
)
from pyvmm.errors import HostError
from pyvmm.native import ffi

DELAY = 500
WATCHED = 4.0
"""Seconds that checkpoints are watched."""
SAMPLES = 20
"""Of the secondary's memory, over a second: two checkpoints."""
PAGE = 4096
FIRST_PAGE = 8 << 20
"""Where the dirtier's pages begin (guests/dirtier/main.c)."""
LAST_LEVEL = 64 << 20
"""Bytes that are certainly more than a CPU's last level of cache keeps of something else."""
TRIES = 4
"""For a death: pairs that end by themselves, with the short heartbeat on a busy machine, are counted and made anew."""


class Checkpoints(NamedTuple):
    """What one pair's checkpoints cost."""

    pauses: list[float]
    received: list[float]
    told: float
    """From x-colo-lost-heartbeat at the secondary until the guest runs there as its own."""
    cpu: float
    """CPU milliseconds of both processes for one checkpoint, beyond what the guest costs unprotected (twice, as the
    replica does the same)."""
    resident: float
    """The secondary's, at most."""
    guest: float
    """Of this: memory of the guest and copies of it."""
    largest: float
    """MiB of the largest checkpoint; 0 if the VMM does not say."""
    rounds: float
    """Of the guest, a second: ten, if it comes to all it is told to do."""


def checkpoints(vmm: Vmms, pages: int, period: int = 100) -> Checkpoints | None:
    """Of a guest that writes ``pages`` each ``period`` ms. ``None``: QEMU never makes one."""
    with pair(vmm, f"pages={pages} period={period} rounds=0", delay=DELAY) as made:
        if made is None:
            return None
        primary, secondary = made.primary, made.secondary
        pids = primary.vmm.pid, secondary.vmm.pid
        primary.seen.clear()
        done = len(rounds_of((made.folder / "from.log").read_bytes()))
        before, began = sum(map(cpu_seconds, pids)), time.monotonic()
        watch(WATCHED, primary.vmm, secondary.vmm)
        used, seconds = sum(map(cpu_seconds, pids)) - before, time.monotonic() - began
        done = len(rounds_of((made.folder / "from.log").read_bytes())) - done
        made.check(0)
        stood_still = pauses(primary.seen)
        memory = []
        for _ in range(SAMPLES):
            memory.append(resident(pids[1]))
            made.check(0.05)
        largest, received = _from_traces(vmm, made)
        if not stood_still or not received:
            raise HostError(f"not measured: {vmm} made no checkpoint in {WATCHED:g} s")
        return Checkpoints(
            stood_still, received, _told(secondary), 1000 * (used - 2 * made.idle * seconds) / len(stood_still),
            max(sum(sample) for sample in memory), max(sample.guest for sample in memory), largest, done / seconds,
        )  # fmt: skip


def _from_traces(vmm: Vmms, made: Pair) -> tuple[float, list[float]]:
    if vmm == "qemu":
        return 0.0, until_received(qemu_messages((made.folder / "from.err").read_text().splitlines()))
    trace = (made.folder / "from.trace").read_text().splitlines()
    return max(sizes(trace), default=0) / (1 << 20), until_received(pyvmm_messages(trace))


def _told(secondary: Monitor) -> float:
    is_running = secondary.execute("query-status")["running"]
    since = time.time() * 1000
    secondary.execute("x-colo-lost-heartbeat")
    return _until_it_ran(secondary, is_running, since)


def _until_it_ran(survivor: Monitor, is_running: bool, since: float) -> float:
    while (at := ran_at(survivor.seen, running=is_running, since=since)) is None:
        survivor.next_event()
    if not survivor.execute("query-status")["running"]:
        raise HostError(f"not measured: {survivor.vmm.name} took over, but its guest does not run")
    return at - since


Death = Literal["killed", "silent"]


def death(how: Death, mode: str, arbiter: str | None = None) -> tuple[float, int]:
    """(milliseconds until the guest runs in pyvmm's secondary as its own, pairs that ended by themselves before), with
    pyvmm's own heartbeat. ``killed``: SIGKILL of the primary; ``silent``: SIGSTOP, its connections stay open.
    """
    delay = DELAY if mode == "hybrid" else 100
    for alarms in range(TRIES):
        with (
            contextlib.suppress(PairEnded),
            pair("pyvmm", "pages=100 period=100 rounds=0", mode=mode, delay=delay, arbiter=arbiter, heartbeat=())
            as made,
        ):  # fmt: skip
            assert made is not None
            made.check(random.uniform(0.1, 0.1 + delay / 1000))  # anywhere between two checkpoints, or in one
            is_running = made.secondary.execute("query-status")["running"]
            since = time.time() * 1000
            made.primary.vmm.kill() if how == "killed" else made.primary.vmm.stop()
            return _until_it_ran(made.secondary, is_running, since), alarms
    raise HostError(f"not measured: {TRIES} pairs ended by themselves: this machine is too busy for the heartbeat")


# -- a guest that works ---------------------------------------------------------------------------

PERIOD = 50
BUSY = 22.0
"""Milliseconds of each period that the guest works; with its console line, half of it."""
WORKED = 8.0
"""Seconds that it is watched."""


class Rate(NamedTuple):
    """``rounds`` a second; ``work``: milliseconds that a round's work takes, on average."""

    rounds: float
    work: float


def calibrated() -> int:
    """``work=`` of the dirtier that makes a guest work for BUSY ms of each PERIOD."""
    turns = 5_000
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        argv = command("pyvmm", folder, "from", _words(turns), MEMORY)
        with running("pyvmm", argv, folder, "from") as alone:
            wait_for(alone.vmm, Path(folder, "from.log"), b"round 20:")
            took = min(took for _, took in rounds_of(Path(folder, "from.log").read_bytes()))
    return int(turns * BUSY / took)


def _words(turns: int) -> str:
    return f"pages={PERIOD} period={PERIOD} rounds=0 work={turns}"  # 1,000 pages a second


def unprotected(turns: int) -> Rate:
    """The guest alone."""
    words = _words(turns)
    for _ in range(CLOCK_TRIES):
        with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
            argv, log = command("pyvmm", folder, "from", words, MEMORY), Path(folder, "from.log")
            with running("pyvmm", argv, folder, "from") as alone:
                wait_for(alone.vmm, log, b"round 3:")
                if keeps_time(watch_alone(alone, log)[1], words):
                    return _rate(log, alone)
    raise ClockError("not measured: the guest does not keep time: this machine is too busy")


def protected(turns: int, mode: str, delay: int) -> Rate:
    """The guest as a pair's."""
    with pair("pyvmm", _words(turns), mode=mode, delay=delay) as made:
        assert made is not None
        rate = _rate(made.folder / "from.log", made.primary, made.secondary)
        made.check(0)
        return rate


def _rate(log: Path, *sides: Monitor) -> Rate:
    """From the arrival of a line to that of another: in periodic mode they come with the checkpoints."""

    def arrival() -> tuple[float, list[tuple[int, float]]]:
        size = log.stat().st_size
        until = time.monotonic() + 5
        while log.stat().st_size == size:
            if time.monotonic() > until:
                raise HostError("not measured: the guest says nothing any more")
            time.sleep(0.001)
        return time.monotonic(), rounds_of(log.read_bytes())

    began, before = arrival()
    watch(WORKED, *(side.vmm for side in sides))
    ended, after = arrival()
    new = after[len(before) :]
    return Rate((after[-1][0] - before[-1][0]) / (ended - began), sum(took for _, took in new) / len(new))


# -- what any copy costs --------------------------------------------------------------------------


def memcpy(pages: int, rounds: int = 7) -> float:
    """Milliseconds for a copy of so many pages as a checkpoint finds them: next to one another in a memory as large as
    the guest's, a word of each just written, the rest of them and of the buffer in no cache.
    """
    size, memory = pages * PAGE, MEMORY << 20
    fd = os.memfd_create("source")
    try:
        os.ftruncate(fd, memory)
        source = mmap.mmap(fd, memory)
    finally:
        os.close(fd)
    other, staging = mmap.mmap(-1, LAST_LEVEL), mmap.mmap(-1, size)
    for made in (source, other, staging):
        made[:] = os.urandom(1 << 20) * (len(made) >> 20) + bytes(len(made) & 0xFFFFF)
    out, into = ffi.from_buffer(source) + FIRST_PAGE, ffi.from_buffer(staging)
    times = []
    for number in range(rounds):
        zlib.crc32(other)
        for at in range(FIRST_PAGE, FIRST_PAGE + size, PAGE):
            source[at] = number
        began = time.perf_counter()
        ffi.memmove(into, out, size)
        times.append(time.perf_counter() - began)
    del out, into
    return 1000 * median(times)
