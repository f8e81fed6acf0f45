"""What ``pyvmm top`` shows: a thread for each machine, so that one that hangs keeps no other back."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.qmp.client import open_client
from pyvmm.qmp.control import running_names
from pyvmm.qmp.sampling import Rates, Sample, rates, sample

MACHINES_MAX = 64
"""At once; those behind in the alphabet are not shown."""
ANSWER = 2.0
"""Seconds until a machine that says nothing is not answering."""
TWICE = 0.5
NAMES = 0.5
"""Seconds between two looks for machines that came or went; each costs every machine a wakeup."""
COLUMNS = (
    "NAME", "STATUS", "CPU %", "EXITS/S", "MOST OF THEM", "WRITTEN/S", "MEMORY", "COLO", "EPOCH", "PAUSE", "QUEUED",
)  # fmt: skip


@dataclass
class Seen:
    """A machine, as far as it is known."""

    name: str
    sample: Sample | None = None
    rates: Rates | None = None
    problem: str | None = None

    def document(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"name": self.name, "problem": self.problem}
        found["sample"] = msgspec.to_builtins(self.sample)
        found["rates"] = msgspec.to_builtins(self.rates)
        return found


def row(seen: Seen) -> tuple[str, ...]:
    """A line of the table."""
    one, rate = seen.sample, seen.rates
    if seen.problem is not None or one is None:
        return (seen.name, "not answering" if seen.problem else "...", *[""] * (len(COLUMNS) - 2))
    colo, stats = one.colo, one.colo_stats
    return (
        seen.name,
        one.status,
        f"{100 * rate.busy:.0f}" if rate else "",
        f"{rate.exits:.0f}" if rate else "",
        ", ".join(f"{kind} {count:.0f}" for kind, count in most(rate)[:2]),
        f"{rate.dirty:.0f}" if rate and rate.dirty is not None else "",
        f"{one.memory >> 20} MiB",
        colo["mode"] if colo and colo["mode"] != "none" else "",
        str(colo["x-epoch"]) if colo and colo["mode"] != "none" else "",
        f"{stats['pause']['median']:.1f} ms" if stats and stats.get("pause") else "",
        str(sum(queue.depth or 0 for queue in one.queues)) if one.queues else "",
    )


def most(rate: Rates | None) -> list[tuple[str, float]]:
    """Exits a second by kind, all vCPUs together, most first, without those that do not happen."""
    total: dict[str, float] = {}
    for cpu in rate.cpus if rate else ():
        for kind, count in cpu.kinds.items():
            total[kind] = total.get(kind, 0.0) + count
    return sorted(((kind, count) for kind, count in total.items() if count >= 0.5), key=lambda entry: -entry[1])


class _Worker:
    """Asks one machine until it has ended, or is to stop."""

    def __init__(self, name: str, interval: float) -> None:
        self.seen = Seen(name)
        self.over = False
        self._interval = interval
        self._stop = threading.Event()
        # A daemon: one that waits for a machine that hangs must not keep the terminal.
        self._thread = threading.Thread(target=self._main, name=f"top:{name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _main(self) -> None:
        name = self.seen.name
        while not self._stop.is_set():
            try:
                with open_client(name, ANSWER) as client:
                    before: Sample | None = None
                    while not self._stop.is_set():
                        after = sample(client)
                        known = rates(before, after) if before is not None else None
                        self.seen = Seen(name, after, known)
                        before = after
                        self._stop.wait(self._interval)
            except PyvmmError as error:
                if not _runs(name):
                    break
                self.seen = Seen(name, problem=str(error))
                self._stop.wait(self._interval)
        self.over = True


def _runs(name: str) -> bool:
    """Or nobody can say."""
    try:
        return name in running_names()
    except (PyvmmError, OSError):
        return True


class Watch:
    """All machines, or those of ``names``; a context manager that ends its threads."""

    def __init__(self, names: list[str], interval: float) -> None:
        self.problem: str | None = None
        """Why nobody can say at present which machines there are; those known are still watched."""
        self._names = names
        self._workers: dict[str, _Worker] = {}
        self._interval = interval
        self._there = running_names()
        if missing := [name for name in names if name not in self._there]:
            raise ConfigError(f"there is no machine {missing[0]!r} (pyvmm list shows those there are)")
        self._stop = threading.Event()
        # Looking takes a lock that a stopped pyvmm may hold: no reason for a screen to stand still.
        self._thread = threading.Thread(target=self._find, name="top", daemon=True)
        self._thread.start()

    def _find(self) -> None:
        while not self._stop.wait(NAMES):
            try:
                self._there = running_names()
                self.problem = None
            except (PyvmmError, OSError) as error:
                self.problem = str(error)

    def look(self) -> list[Seen]:
        """What is known now, by name; machines that came are watched from here on, those that went are gone."""
        there = [name for name in self._there if not self._names or name in self._names][:MACHINES_MAX]
        for name in there:
            if name not in self._workers:
                self._workers[name] = _Worker(name, self._interval)
        for name, worker in list(self._workers.items()):
            if worker.over or name not in there:
                worker.stop()
                del self._workers[name]
                self._there = [one for one in self._there if one != name]  # until it is found again
        return [self._workers[name].seen for name in sorted(self._workers)]

    def look_twice(self) -> list[Seen]:
        """Once, with rates: as soon as every machine has answered twice, or does not answer."""
        self._interval = min(self._interval, TWICE)
        deadline = time.monotonic() + ANSWER + 2 * TWICE
        while True:
            seen = self.look()
            if all(each.rates or each.problem for each in seen) or time.monotonic() > deadline:
                return seen
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for worker in self._workers.values():
            worker.stop()
        until = time.monotonic() + 0.5
        self._thread.join(0.5)
        for worker in self._workers.values():
            worker.join(max(0.0, until - time.monotonic()))
