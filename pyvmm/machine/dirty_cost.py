"""What it costs to ask KVM which pages a guest wrote: a real guest writes a given share of its memory, again and again.

The guest is guests/dirtier with the pages spread evenly, the worst case for whoever makes runs of them. Each time it
has written all of its pages it is stopped; then the harvest, and the choice of runs to send, are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyvmm.errors import DeadlineError, HostError, PyvmmError
from pyvmm.host.dirty_log import Method
from pyvmm.host.profile import load_profile
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import PAGE_SIZE

FIRST_PAGE = 8 << 20
"""Where the dirtier begins to write."""
SPARE = FIRST_PAGE + (2 << 20)
"""Bytes it cannot write: what is below, and the tables at the end."""
LEAST_MEMORY = 16 << 20
MOST_MEMORY = 3 << 30
"""What the dirtier maps."""
ROUND_DEADLINE = 60.0

Reference = Callable[[Machine], int]
"""Does the same work in another way and says how many pages there were; what it takes is timed."""


@dataclass(frozen=True)
class HarvestCost:
    """Seconds of each round, ``pages`` found by each; the reference's rounds in ``against``."""

    method: Method
    memory: int
    percent: float
    pages: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    against: list[float] = field(default_factory=list)
    problem: str | None = None
    """Why there are not as many rounds as wanted."""


def measure_harvest(
    image: Path, method: Method, memory: int, percent: float, rounds: int, reference: Reference | None = None
) -> HarvestCost:
    """``percent`` (0 to 100) of ``memory`` bytes written between harvests, ``reference`` taking turns with pyvmm's.

    A host that cannot do it is a ``problem`` of the result; ImageError, ConfigError, HostError if no guest can run.
    """
    cost = HarvestCost(method, memory, percent)
    wanted = min(int(memory // PAGE_SIZE * percent / 100), (memory - SPARE) // PAGE_SIZE)
    pages = max(wanted, 1)
    stride = max((memory - SPARE) // PAGE_SIZE // pages, 1)
    config = MachineConfig(
        image=str(image), memory=memory, append=f"pages={pages} stride={stride} period=20 rounds=0", dirty_log=method,
        serial="null",
    )  # fmt: skip
    install_kick_signal()
    with build_machine(config, frozenset(load_profile().quirks)) as machine:
        if machine.dirty.method != method:
            return replace(cost, problem="this host's KVM has no dirty rings")
        last = FIRST_PAGE + (pages - 1) * stride * PAGE_SIZE
        machine.start()
        _write_all(machine, last)
        machine.pause()
        machine.dirty.start()
        try:
            for _ in range(rounds + 1):  # the first is not counted: it finds all that the start left
                _one_round(machine, cost, last if wanted else None, reference)
        except (HostError, DeadlineError):
            raise
        except PyvmmError as error:
            cost = replace(cost, problem=str(error))
        finally:
            machine.dirty.stop()
    for each in (cost.pages, cost.seconds, cost.against):
        del each[:1]
    return cost


def _one_round(machine: Machine, cost: HarvestCost, last: int | None, reference: Reference | None) -> None:
    reaped = machine.dirty.reaping
    _let_write(machine, last)
    before = machine.dirty.reaping - reaped  # a vCPU that fills its ring has it emptied on the way
    began = time.perf_counter()
    sets = machine.dirty.harvest()
    runs = [page_set.native_runs() for page_set in sets if page_set.count]
    cost.seconds.append(time.perf_counter() - began + before)
    found = sum(page_set.count for page_set in sets)
    cost.pages.append(found)
    del runs
    if reference is None:
        return
    _let_write(machine, last)
    began = time.perf_counter()
    others = reference(machine)
    cost.against.append(time.perf_counter() - began)
    if len(cost.pages) > 1 and abs(found - others) > 64:  # the kernel's own pages come and go
        raise HostError(f"not measured: {found} pages were harvested, {others} by the reference")


def _let_write(machine: Machine, last: int | None) -> None:
    """Let the guest write each of its pages at least once, the one at ``last`` behind the others; it stands then."""
    if last is not None:
        machine.resume()
        _write_all(machine, last)
        machine.pause()


def _write_all(machine: Machine, last: int) -> None:
    """Two writes of the last page: between them were those of all the others."""
    deadline = time.monotonic() + ROUND_DEADLINE
    for _ in range(2):
        stamp = machine.memory.read(last, 8)
        while machine.memory.read(last, 8) == stamp:
            if machine.ending is not None:
                raise HostError(f"the dirtier ended by {machine.ending.kind} ({machine.ending.reason})")
            if time.monotonic() > deadline:
                raise DeadlineError(f"the dirtier did not write its pages within {ROUND_DEADLINE:.0f} s")
            machine.loop.run_once(0.005)
