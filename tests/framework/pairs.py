"""Two real ``pyvmm`` that protect one guest."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.framework.migrating import Side, dirtier

PAGES, PERIOD = 50, 20
EPOCH_ROUNDS = 60
"""More than a guest of these tests does in an epoch and the time that a checkpoint takes."""
PAIR_DEADLINE = 60.0
ROUND = rb"(?m:^)round ([0-9]+): [0-9]+ pages in [0-9]+ us(?:, late by [0-9]+)?\r?"
PATIENT = ("--heartbeat", "250", "--heartbeat-loss", "12")
"""What is not about time must not fail for want of it; the last of an option counts."""


@dataclass
class Pair:
    """``arbiter`` as ``--arbiter`` takes it. Everything else about the two is in ``options`` of :meth:`start`."""

    folder: Path
    stack: contextlib.ExitStack
    arbiter: str
    guest: tuple[str, ...]
    sides: list[Side] = field(default_factory=list)
    """All there were, in their order."""

    def secondary(self, *options: str, uri: str = "", name: str = "", **more: Any) -> Side:
        """A process that waits; ``uri`` defaults to a socket named like it."""
        name = name or f"side{len(self.sides)}"
        side = Side(
            self.folder, name, *self.guest, "--colo", "secondary", "--incoming", uri or self.uri_of(name),
            "--arbiter", self.arbiter, *options, **more,
        )  # fmt: skip
        self.sides.append(self.stack.enter_context(side))
        side.wait_for("inmigrate")
        return side

    def primary(self, peer: Side | str | None, *options: str, name: str = "", **more: Any) -> Side:
        """A process whose guest is to be protected by ``peer``."""
        name = name or f"side{len(self.sides)}"
        uri = self.uri_of(peer.name) if isinstance(peer, Side) else peer
        told = ("--peer", uri) if uri is not None else ()
        words = ("--colo", "primary", *told, "--arbiter", self.arbiter, *PATIENT)
        side = Side(self.folder, name, *self.guest, *words, *options, **more)
        self.sides.append(self.stack.enter_context(side))
        return side

    def start(self, *options: str, **more: Any) -> tuple[Side, Side]:
        """(primary, secondary), protected."""
        secondary = self.secondary(**more)
        primary = self.primary(secondary, *options, **more)
        wait_protected(primary)
        return primary, secondary

    def uri_of(self, name: str) -> str:
        """Where the side called ``name`` waits."""
        return f"unix:{self.folder / name}.s"


@contextlib.contextmanager
def pairs(folder: Path, guest: tuple[str, ...] | None = None, arbiter: str = "") -> Iterator[Pair]:
    """A :class:`Pair` whose processes end with the block."""
    with contextlib.ExitStack() as stack:
        yield Pair(folder, stack, arbiter or f"file:{folder}/arbiter", guest or dirtier(PAGES, PERIOD, 0))


def colo_status(side: Side) -> dict[str, Any]:
    """query-colo-status."""
    answer = side.qmp.execute("query-colo-status")
    assert isinstance(answer, dict)
    return answer


def colo_stats(side: Side) -> dict[str, Any]:
    """query-colo-stats."""
    answer = side.qmp.execute("query-colo-stats")
    assert isinstance(answer, dict)
    return answer


def wait_protected(primary: Side, epoch: int = 1, seconds: float = PAIR_DEADLINE) -> None:
    """Until checkpoint ``epoch`` is in the secondary."""
    deadline = time.monotonic() + seconds
    while (now := colo_status(primary))["mode"] != "primary" or now["x-epoch"] < epoch:
        assert time.monotonic() < deadline, (now, primary.qmp.execute("query-migrate"))
        time.sleep(0.01)


def wait_alone(side: Side, seconds: float = 30) -> dict[str, Any]:
    """Until ``side`` is nobody's other side any more, and runs; query-colo-status."""
    deadline = time.monotonic() + seconds
    while (now := colo_status(side))["mode"] != "none" or side.status() != "running":
        assert time.monotonic() < deadline, (now, side.status())
        time.sleep(0.01)
    return now


def check_same_memory(primary: Side, secondary: Side) -> None:
    """All of it, with the guest stopped by hand and that in the secondary."""
    size, content = int(primary.qmp.execute("query-memory-size-summary")["base-memory"]), []
    for side in (primary, secondary):
        file = side.path.parent / f"{side.name}.ram"
        side.qmp.execute("pmemsave", {"val": 0, "size": size, "filename": str(file)})
        content.append(file.read_bytes())
    one, other = content
    assert [at for at in range(0, size, 4096) if one[at : at + 4096] != other[at : at + 4096]] == []


def rounds_in(output: bytes) -> list[int]:
    """Numbers of the rounds that a dirtier says it has done; a line that was cut short at the end does not count."""
    return [int(number) for number in re.findall(ROUND + rb"$", output, re.M)]


def check_goes_on(said: list[int], lived_on: list[int]) -> None:
    """Periodic: a survivor goes on behind what was let out, never within it.

    What it said in the last epoch may never be seen: if the primary dies when the secondary holds that epoch and before
    it was let out. A console has nobody who would send again.
    """
    last = said[-1] if said else 0
    assert last < lived_on[0] <= last + EPOCH_ROUNDS, (last, lived_on[0])


def check_contiguous(rounds: list[int]) -> None:
    """Each one more than the one before: nothing was lost and nothing done twice."""
    assert rounds == list(range(rounds[0], rounds[0] + len(rounds))), rounds
