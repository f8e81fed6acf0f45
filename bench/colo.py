"""COLO of the same bare-metal dirtier under pyvmm and under QEMU's microvm, both sides on this machine, taking turns.

For each number of pages that the guest writes each 100 ms, a checkpoint each 500 ms, hybrid:

- ``pause``: for how long the primary's guest stands still for one, from its STOP event to its RESUME event.
- ``received``: from checkpoint-request to vmstate-received, both by the primary's trace; not the first one.
- ``told``: from x-colo-lost-heartbeat at the secondary until the guest runs there and COLO is over.
- ``cpu``: CPU time of both processes for one checkpoint, beyond what the guest takes by itself.
- ``resident``: the secondary's memory at most, with all of its VMM; ``guest``: of this, guest memory and its copies.
- ``rounds``: of the guest, a second; ten if it comes to all that it is to do.
- ``memcpy``: one copy of those pages in this process, as cold as a checkpoint finds them; the pause is held to it.

And of pyvmm alone, QEMU having nobody who would notice: ``killed``, from SIGKILL of the primary until the guest runs in
the secondary, by mode and arbiter; ``silent``, the same from SIGSTOP, when connections stay open; with the usual
heartbeat, and counted with them the ``alarms`` that nobody gave. ``work``: a guest that works half of the time and
writes 1,000 pages a second, against itself unprotected.

Takes about eight minutes. ``--table`` prints the README's table of what was measured, or of a FILE with an earlier
document.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from figures import document, figure, main, paired_ratio, verdict
from protection.etcd import etcd_server
from protection.pair import MEMORY, Vmms
from protection.table import table
from protection.watched import (
    DELAY,
    Checkpoints,
    Death,
    calibrated,
    checkpoints,
    death,
    memcpy,
    protected,
    unprotected,
)
from vmms import end_on_signals

from pyvmm.errors import HostError

PAGES = (100, 1000, 4000, 16000)
ROUNDS = 3
DEATHS = 5
ALL_OF_IT = 29_000
"""Pages: nearly all of the guest's memory, for what a secondary takes at most."""
PAUSE_TARGET = {1000: 5.0, 4000: 10.0, 16000: 40.0}
DEATH_CASES: tuple[tuple[Death, str, str, float], ...] = (
    ("killed", "hybrid", "file", 50.0), ("killed", "hybrid", "etcd", 50.0), ("killed", "periodic", "file", 50.0),
    ("killed", "periodic", "etcd", 50.0), ("silent", "hybrid", "file", 350.0), ("silent", "periodic", "file", 350.0),
)  # fmt: skip
WORK_CASES = (("hybrid", 500, 0.95), ("periodic", 100, 0.85))
Part = tuple[dict[str, Any], dict[str, Any]]
"""Figures; those held to targets."""


def at_least(value: float, target: float) -> dict[str, Any]:
    """A figure held to a target that is a minimum."""
    return {"value": value, "target_at_least": target, "met": value >= target}


def resident_bound(pages: int, largest: float) -> float:
    """MiB that a secondary may take: 1.1 times the guest's memory, what it dirtied, and one incoming checkpoint."""
    return 1.1 * MEMORY + pages / 256 + largest


def of_checkpoints(pages: int, rounds: int) -> Part:
    """Figures and targets of one size; who begins changes each round."""
    ours: list[Checkpoints] = []
    theirs: list[Checkpoints | None] = []
    copies: list[float] = []
    for turn in range(rounds):
        order: tuple[Vmms, ...] = ("pyvmm", "qemu") if turn % 2 == 0 else ("qemu", "pyvmm")
        for vmm in order:
            say(f"{pages} pages, round {turn + 1}: {vmm}")
            one = checkpoints(vmm, pages)
            if vmm == "qemu":
                theirs.append(one)
            else:
                assert one is not None
                ours.append(one)
        copies.append(memcpy(pages))
    entered = [one for one in theirs if one is not None]

    def both(name: str, unit: str = "ms") -> dict[str, Any]:
        def pooled(of: list[Checkpoints]) -> list[float]:
            values = [getattr(one, name) for one in of]
            return [value for some in values for value in some] if isinstance(values[0], list) else values

        other: Any = figure(pooled(entered), unit) if entered else "never enters COLO"
        return {"pyvmm": figure(pooled(ours), unit), "qemu": other}

    found: dict[str, Any] = {"pause": both("pauses")} | {name: both(name) for name in ("received", "told", "cpu")}
    found |= {name: both(name, "MiB") for name in ("resident", "guest")}
    found["rounds"] = both("rounds", "a second")
    found |= {"memcpy": figure(copies, "ms", 3), "qemu_entered": f"{len(entered)} of {rounds}"}
    copied, largest = median(copies), max(one.largest for one in ours)
    allowed = min(PAUSE_TARGET.get(pages, 1e9), 2.5 * copied + 2)
    targets = {
        f"pause_{pages}": verdict(found["pause"]["pyvmm"].median, round(allowed, 2)),
        f"told_{pages}": verdict(found["told"]["pyvmm"].median, 10.0),
        f"resident_{pages}": verdict(found["resident"]["pyvmm"].most, round(resident_bound(pages, largest), 1)),
    }
    if entered:
        targets[f"received_{pages}"] = verdict(found["received"]["pyvmm"].median, found["received"]["qemu"].median)
    return {f"{name}_{pages}": value for name, value in found.items()}, targets


def of_all_memory() -> Part:
    """A guest that has touched nearly all of its memory, and writes it again and again."""
    say("nearly all memory")
    one = checkpoints("pyvmm", ALL_OF_IT, period=1000)
    assert one is not None
    bound = round(resident_bound(ALL_OF_IT, one.largest), 1)
    return {"resident_all": figure([one.resident], "MiB", 1), "guest_all": figure([one.guest], "MiB", 1)}, {
        "resident_all": verdict(round(one.resident, 1), bound)
    }


def of_deaths(count: int) -> Part:
    """The primary's."""
    found: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder, etcd_server(Path(folder)) as etcd:
        seen: dict[str, list[tuple[float, int]]] = {}
        for turn in range(count):
            for how, mode, arbiter, _ in DEATH_CASES:
                key = f"{how}_{mode}_{arbiter}"
                say(f"{key}, round {turn + 1}")
                seen.setdefault(key, []).append(death(how, mode, etcd if arbiter == "etcd" else None))
    for how, mode, arbiter, target in DEATH_CASES:
        key = f"{how}_{mode}_{arbiter}"
        times = figure([took for took, _ in seen[key]], "ms")
        found[key] = {"pyvmm": times, "alarms": sum(alarms for _, alarms in seen[key])}
        targets[key] = verdict(times.median, target)
    return found, targets


def of_work(rounds: int) -> Part:
    """A guest that works half of the time."""
    turns = calibrated()
    alone, pairs = [], {mode: [] for mode, _, _ in WORK_CASES}  # type: ignore[var-annotated]
    for turn in range(rounds):
        say(f"work, round {turn + 1}")
        alone.append(unprotected(turns))
        for mode, delay, _ in WORK_CASES:
            pairs[mode].append(protected(turns, mode, delay))
    found: dict[str, Any] = {"work_unprotected": {
        "rounds": figure([rate.rounds for rate in alone], "a second"), "work": figure([r.work for r in alone], "ms"),
    }}  # fmt: skip
    targets: dict[str, Any] = {}
    for mode, delay, target in WORK_CASES:
        of = pairs[mode]
        throughput = paired_ratio([rate.rounds for rate in of], [rate.rounds for rate in alone])
        # The guest rests half of the time and can make up for what it lost: so its speed while it works, too.
        speed = paired_ratio([rate.work for rate in alone], [rate.work for rate in of])
        found[f"work_{mode}"] = {"delay": delay, "throughput": throughput, "speed": speed}
        targets[f"work_{mode}"] = at_least(throughput.median, target)
    return found, targets


def measure(pages: tuple[int, ...] = PAGES, rounds: int = ROUNDS, deaths: int = DEATHS) -> dict[str, Any]:
    """All of it."""
    for program in ("qemu-system-x86_64", "etcd"):
        if shutil.which(program) is None:
            raise HostError(f"not measured: {program} is not installed (make packages)")
    began = time.monotonic()
    figures: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    failed: list[str] = []
    for part in parts(pages, rounds, deaths):
        try:
            more, held = part()
        except HostError as error:  # the others' figures are as good as ever
            failed.append(str(error))
            continue
        figures |= more
        targets |= held
    if not figures:
        raise HostError("; ".join(failed))
    return document(
        what=f"COLO of guests/dirtier with {MEMORY} MiB, so many pages each 100 ms, a checkpoint each {DELAY} ms",
        against="qemu-system-x86_64 -accel kvm -M microvm with x-colo, the same guest and period",
        date=time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()), seconds=round(time.monotonic() - began),
        pages=[count for count in pages if f"pause_{count}" in figures], figures=figures, ratio={}, target=targets,
        not_measured=failed,
    )  # fmt: skip


def parts(pages: tuple[int, ...], rounds: int, deaths: int) -> list[Callable[[], Part]]:
    return [
        *(functools.partial(of_checkpoints, count, rounds) for count in pages),
        of_all_memory,
        functools.partial(of_deaths, deaths),
        functools.partial(of_work, rounds),
    ]


def say(what: str) -> None:
    """How far it is, for somebody who waits."""
    if sys.stderr.isatty():
        print(what, file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="COLO of pyvmm and of QEMU")
    parser.add_argument("--table", nargs="?", const="", metavar="FILE", help="print Markdown; FILE: of that document")
    parser.add_argument("--save", metavar="FILE", help="write the document to FILE, too")
    parser.add_argument("--pages", type=int, nargs="+", default=list(PAGES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--deaths", type=int, default=DEATHS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    def measured() -> dict[str, Any]:
        found = measure(tuple(args.pages), args.rounds, args.deaths)
        if args.save:
            Path(args.save).write_bytes(msgspec.json.format(msgspec.json.encode(found)))
        return found

    if args.table is None:
        main(measured)
    elif args.table:
        print(table(msgspec.json.decode(Path(args.table).read_bytes())))
    else:
        with contextlib.suppress(BrokenPipeError):
            print(table(msgspec.json.decode(msgspec.json.encode(measured()))))


if __name__ == "__main__":
    end_on_signals()
    run(arguments())
