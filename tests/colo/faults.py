"""One fault in a pair that is being protected, and what may have become of the guest by then.

The guest, a dirtier, says each round it has done, so its own record tells: in periodic mode what was let out was held
by the other side, so the survivor goes on behind it and never says it again, whatever happened and whenever.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import time
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError
from tests.framework import syscall_faults
from tests.framework.migrating import Side, dirtier, free_port
from tests.framework.pairs import check_contiguous, check_goes_on, pairs, rounds_in

DEADLINE = 40.0
ENDING = 5.0
"""Seconds that a side which has lost may take to end; nothing of it is heard meanwhile."""
EARLY = ("before there was a whole checkpoint", "incoming migration failed: the peer closed")
BEAT = 24
"""Bytes that a heartbeat sends; it reads up to 4096."""
FILES = {
    "replication send": "sendto:size!24,port={port}",
    "replication receive": "recvfrom:size!4096,port={port}",
    "heartbeat send": "sendto:size=24,port={port}",
    "heartbeat receive": "recvfrom:size=4096,port={port}",
    "vm": "ioctl:anon_inode:kvm-vm",
    "vcpu": "ioctl:anon_inode:kvm-vcpu:0",
    "memory": "pwrite64:/memfd:pyvmm-ram-low (deleted)",
}
"""What a fault can be at, as a rule's CALL:FILE (tests/framework/syscall_faults.py)."""
ERRORS = {"replication": ("ECONNRESET", "EPIPE"), "heartbeat": ("ECONNRESET",), "memory": ("ENOSPC", "EIO")}


@dataclass(frozen=True)
class Fault:
    """``what`` happens to the ``nth`` call ``at`` (a key of FILES) of ``side``."""

    side: str
    at: str
    what: str
    nth: int
    mode: str

    def __str__(self) -> str:
        return f"{self.mode}-{self.side}-{self.at.replace(' ', '-')}-{self.what}-{self.nth}"


@dataclass(frozen=True)
class Under:
    """A program whose system calls go wrong as ``rule`` says."""

    log: Path
    rules: tuple[str, ...]

    def command(self, *words: str) -> list[str]:
        """For processes.Running."""
        return syscall_faults.command(self.log, [*self.rules], *words)

    def calls(self) -> list[str]:
        """Those that it was, in their order."""
        return self.log.read_text().splitlines() if self.log.exists() else []


def whats(at: str) -> tuple[str, ...]:
    """What may happen there."""
    kind = at.split(" ")[0]
    if kind in ("vm", "vcpu"):
        return "kill", "kill-after", "EIO"
    both = ("kill", "kill-after", "stop", *ERRORS[kind])
    return (*both, "short") if "receive" not in at and kind != "heartbeat" else both


Counts = dict[tuple[str, str], tuple[int, int]]
"""(side, key of FILES): calls before it is to be a pair, and from then on."""


def sample(counts: Counts, number: int, seed: int) -> list[Fault]:
    """``number`` faults, spread over sides, places and kinds; the n-th call by chance, of as many as were counted."""
    chance = random.Random(seed)
    kinds = [(side, at, what) for (side, at), (_, count) in counts.items() if count for what in whats(at)]
    chance.shuffle(kinds)
    faults = []
    for turn in range(number):
        side, at, what = kinds[turn % len(kinds)]
        before, count = counts[side, at]
        faults.append(Fault(side, at, what, before + chance.randrange(count), chance.choice(["periodic", "hybrid"])))
    return faults


def run(folder: Path, fault: Fault) -> str:
    """Make it happen; who has the guest then: ``primary``, ``secondary``, ``both`` (it was survived), ``source``: it
    never was a pair, or ``unprotected``: the primary was killed before it was one. AssertionError if anything was lost,
    said twice, or runs twice.
    """
    port = free_port()
    uri = f"tcp:127.0.0.1:{port}"
    under = Under(folder / "faults", (f"{FILES[fault.at].format(port=port)}:{fault.what}:{fault.nth}:1",))
    delay = ("--colo-mode", fault.mode, "--checkpoint-delay", "30", "--insecure")
    with pairs(folder, dirtier(20, 5, 0)) as pair:
        names = f"{folder.name}-primary", f"{folder.name}-secondary"  # several pairs may live at once
        secondary = pair.secondary(
            "--insecure", uri=uri, name=names[1], inside=under if fault.side == "secondary" else None
        )
        primary = pair.primary(
            None, *delay, "--heartbeat", "100", "--heartbeat-loss", "5",
            name=names[0], inside=under if fault.side == "primary" else None,
        )  # fmt: skip
        with contextlib.suppress(HostError):  # it may die of that at once
            primary.qmp.execute("x-colo-protect", {"uri": uri})
        _until_it_happened(under, primary, secondary)
        if fault.what == "stop":
            time.sleep(2 * syscall_faults.STOP)  # it may be noticed late, and is one fault until then
        owner = survivor = _settle(primary, secondary)
        if owner == "both":  # it was survived; is it still protected?
            _end(primary)
            survivor = _settle(primary, secondary)
        by_primary, by_secondary = rounds_in(_end(primary)), rounds_in(_end(secondary))
        _check_record(fault, survivor, by_primary, by_secondary)
        return owner


def _alive(side: Side) -> bool:
    return side.process.poll() is None


def _until_it_happened(under: Under, primary: Side, secondary: Side) -> None:
    deadline = time.monotonic() + DEADLINE
    while not under.calls():
        assert time.monotonic() < deadline, "the call never came"
        assert _alive(primary) or _alive(secondary), (primary.finish(), secondary.finish())
        _read(primary)
        _read(secondary)
        time.sleep(0.01)


def _read(side: Side) -> None:
    assert side.process.stdout is not None
    while select.select([side.process.stdout], [], [], 0)[0]:
        piece = os.read(side.process.stdout.fileno(), 65536)
        if not piece:
            return
        side.output += piece


def _settle(primary: Side, secondary: Side) -> str:
    """Wait until it is decided, and the guest has gone on for some rounds then."""
    deadline = time.monotonic() + DEADLINE
    both_since = 0.0
    before: int | None = None
    while time.monotonic() < deadline:
        roles = {name: _role(side) for name, side in (("primary", primary), ("secondary", secondary))}
        alone = [name for name, (role, running) in roles.items() if role == "none" and running]
        if len(alone) == 2 and _was_pair(secondary):  # the one that has lost may be about to end
            both_since = both_since or time.monotonic()
            assert time.monotonic() < both_since + ENDING, "both have the guest"
            continue
        dead = [name for name, (role, _) in roles.items() if role == "dead"]
        if roles["primary"][0] == "primary" and roles["secondary"][0] == "secondary":
            epoch = _epoch(primary)
            if before is None or before < 1:
                before = epoch
            elif epoch >= before + 3 and _goes_on(primary):  # it is a pair still, not one that has not noticed yet
                return "both"
        elif len(dead) == 2:
            problems = [side.finish()[2].decode() for side in (primary, secondary)]
            # A primary that was killed before the first checkpoint was whole was not protected yet.
            assert any(early in problems[1] for early in EARLY), f"nobody has the guest: {problems}"
            assert not problems[0]
            return "unprotected"
        elif alone and dead:
            assert _goes_on({"primary": primary, "secondary": secondary}[alone[0]])
            return alone[0]
        elif roles["primary"][0] == "dead" and roles["secondary"][0] == "waiting":
            return "unprotected"
        elif alone == ["primary"] and roles["secondary"][0] == "waiting":
            assert _goes_on(primary)
            return "source"
        time.sleep(0.02)
    raise AssertionError(f"it is never decided: {roles}")


def _role(side: Side) -> tuple[str, bool]:
    """(role, whether its guest runs); ``dead``: its process has ended, ``waiting``: for a primary."""
    if _alive(side):
        with contextlib.suppress(Exception):
            status = side.qmp.execute("query-status")["status"]
            role = side.qmp.execute("query-colo-status")["mode"]
            return "waiting" if status == "inmigrate" else str(role), status == "running"
        deadline = time.monotonic() + 5
        while _alive(side) and time.monotonic() < deadline:  # it was ending
            time.sleep(0.02)
    return ("dead", False) if not _alive(side) else ("busy", False)


def _epoch(side: Side) -> int:
    with contextlib.suppress(HostError):
        return int(side.qmp.execute("query-colo-status")["x-epoch"])
    return 0


def _was_pair(secondary: Side) -> bool:
    return _epoch(secondary) > 0


def _goes_on(side: Side) -> bool:
    before, deadline = len(rounds_in(side.output)), time.monotonic() + 10
    while time.monotonic() < deadline and _alive(side):
        _read(side)
        if len(rounds_in(side.output)) > before + 3:
            return True
        time.sleep(0.02)
    return False


def _end(side: Side) -> bytes:
    if _alive(side):
        side.kill()
    if not side.process.stdout or side.process.stdout.closed:  # read to its end already
        return side.output
    side.output += side.finish()[1]
    return side.output


def _check_record(fault: Fault, owner: str, by_primary: list[int], by_secondary: list[int]) -> None:
    for rounds in (by_primary, by_secondary):
        if rounds:
            check_contiguous(rounds)
    if by_primary:
        assert by_primary[0] == 1, by_primary
    if owner == "unprotected":
        assert fault.side == "primary"
        assert "kill" in fault.what or fault.at in ("vm", "vcpu")  # its machine died of it
    if owner != "secondary":
        assert not by_secondary, f"the {owner} has the guest, and the secondary says {by_secondary}"
    elif fault.mode == "periodic":
        check_goes_on(by_primary, by_secondary)
