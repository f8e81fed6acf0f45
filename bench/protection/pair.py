"""Two VMMs of one kind that hold one guest and make checkpoints; and what the kernel says of their processes."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from vmms import Monitor, command, running, wait_for, watch

from protection.records import periods_of, resident_of
from pyvmm.errors import HostError

MEMORY = 128
"""MiB of a guest."""
PATIENT = ("--heartbeat", "250", "--heartbeat-loss", "12")
"""Where no failover is measured: a machine busy with four processes is no reason for one."""
ENTER = 12.0
"""Seconds to enter COLO; a VMM that has not by then never does."""
IDLE = 1.0
"""Seconds that the guest is watched before it is protected."""
CLOCK_TRIES = 4
CLOCK_TOLERANCE = 0.15
"""One round of the ten in IDLE may be on the other side of its end."""
RAM = "/memfd:pyvmm-ram"
Vmms = Literal["pyvmm", "qemu"]


class Pair(NamedTuple):
    """``folder`` has what both leave behind: ``from`` is the primary, ``to`` the secondary."""

    folder: Path
    primary: Monitor
    secondary: Monitor
    idle: float
    """CPU seconds a second that the guest costs, unprotected."""

    def check(self, seconds: float) -> None:
        """Let time pass. PairEnded: they are a pair no more. HostError: one of the two died otherwise."""
        try:
            watch(seconds, self.primary.vmm, self.secondary.vmm)
            for side in (self.primary, self.secondary):
                side.execute("query-status")
        finally:
            for side in (self.primary, self.secondary):
                side.poll()
                if any(name == "COLO_EXIT" for name, _ in side.seen):
                    raise PairEnded(f"not measured: {side.vmm.name}: the pair ended by itself")


class ClockError(HostError):
    """A guest that measured its timer wrongly, again and again."""


class PairEnded(HostError):
    """A failover that nobody asked for."""


@contextlib.contextmanager
def pair(
    vmm: Vmms, words: str, *, mode: str = "hybrid", delay: int, arbiter: str | None = None,
    heartbeat: tuple[str, ...] = PATIENT,
) -> Iterator[Pair | None]:  # fmt: skip
    """A pair whose guest is told ``words``, a checkpoint each ``delay`` ms; ``None``: QEMU's never comes to one.

    HostError: pyvmm's did not; or one of the processes died.
    """
    for _ in range(CLOCK_TRIES):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-bench-"))

            def side(name: str, role: str, folder: str = folder, stack: contextlib.ExitStack = stack) -> Monitor:
                argv = command(vmm, folder, name, words, MEMORY)
                if vmm == "qemu":
                    argv += ["-trace", "colo_send_message", "-trace", "colo_receive_message", "-msg", "timestamp=on"]
                else:
                    argv += ["--colo", role, "--arbiter", arbiter or f"file:{folder}/arbiter", "--colo-mode", mode,
                             "--checkpoint-delay", str(delay), *heartbeat,
                             "--trace", f"colo_*,file={folder}/{name}.trace,format=simple"]  # fmt: skip
                return stack.enter_context(running(f"{vmm}'s {role}", argv, folder, name))

            secondary, primary = side("to", "secondary"), side("from", "primary")
            log = Path(folder, "from.log")
            wait_for(primary.vmm, log, b"round 3:")
            idle, rate = watch_alone(primary, log)
            secondary.vmm.check()
            if not keeps_time(rate, words):
                continue
            for monitor in (primary, secondary) if vmm == "qemu" else (primary,):
                monitor.execute("migrate-set-capabilities", capabilities=[{"capability": "x-colo", "state": True}])
            if vmm == "qemu":
                primary.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "x-checkpoint-delay": delay})
            primary.execute("migrate", uri=f"unix:{folder}/m")
            if not _enters(vmm, primary, secondary):
                yield None
                return
            made = Pair(Path(folder), primary, secondary, idle)
            made.check(max(2 * delay / 1000, 0.5))
            yield made
            return
    raise ClockError(f"not measured: {vmm}'s guest does not keep time, {CLOCK_TRIES} times: this machine is too busy")


def watch_alone(primary: Monitor, log: Path) -> tuple[float, float]:
    """Of an unprotected guest that writes to ``log``: (CPU seconds, periods of its own clock) a second."""
    before, done, began = cpu_seconds(primary.vmm.pid), periods_of(log.read_bytes()), time.monotonic()
    watch(IDLE, primary.vmm)
    seconds = time.monotonic() - began
    done = periods_of(log.read_bytes()) - done
    return (cpu_seconds(primary.vmm.pid) - before) / seconds, done / seconds


def keeps_time(rate: float, words: str) -> bool:
    """Whether the periods of a guest that is told ``words`` are as long as they should. It measures its timer
    as it starts; interrupted there, its periods are twice as long, or half, and so is all it is to do.
    """
    period = int(words.partition("period=")[2].split()[0])
    return period > 100 or abs(rate * period / 1000 - 1) <= CLOCK_TOLERANCE


def _enters(vmm: Vmms, primary: Monitor, secondary: Monitor) -> bool:
    deadline = time.monotonic() + ENTER
    while (info := primary.execute("query-migrate")).get("status") != "colo":
        secondary.vmm.check()
        if info.get("status") == "failed" or (vmm == "pyvmm" and time.monotonic() > deadline):
            raise HostError(f"not measured: {vmm} does not come to a pair: {info}")
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def cpu_seconds(pid: int) -> float:
    """That all threads of ``pid``, which live on, have had of CPUs, their guest's time included; to the nanosecond."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


class Resident(NamedTuple):
    """MiB that a VMM takes of its host: guest memory with all copies of it, and the VMM itself with its buffers."""

    guest: float
    other: float


def resident(pid: int) -> Resident:
    """Of ``pid`` now. A page of a memfd counts whether it is mapped or not: it is memory either way."""
    own, other = resident_of(Path(f"/proc/{pid}/smaps").read_text().splitlines(), RAM)
    files: dict[tuple[int, int], int] = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            path = f"/proc/{pid}/fd/{fd}"
            if os.readlink(path).startswith(RAM):
                status = os.stat(path)
                files[status.st_dev, status.st_ino] = status.st_blocks * 512
    return Resident((own + sum(files.values())) / (1 << 20), other / (1 << 20))
