"""What the guest of the demo serves, and what its clients noticed: the part that both kinds of guest share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

LOST_AFTER = 20.0
"""Seconds without an answer after which a client takes its connection for lost: longer than TCP's third try."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer. Times are those of time.monotonic()."""

    client: int
    number: int
    began: float
    ended: float
    what: str = ""


@dataclass
class Verdict:
    """What the clients can say in the end. ``ok`` is for everything but the losses, which are counted."""

    ok: bool
    text: str
    """In one line: which check, and its result."""
    connections_lost: int = 0
    writes_lost: int | None = None
    """Acknowledged ones that are not there; ``None``: the service keeps nothing."""
    repeated: int = 0
    """Requests sent again by the client itself, which only UDP's do."""
    problems: list[str] = field(default_factory=list)


class Workload(Protocol):
    """A guest, and clients for it. All of it is on the demo's side; ``words`` is what both pyvmm are started with."""

    title: str
    words: tuple[str, ...]
    first_words: tuple[str, ...]
    """Further ones for the machine that the guest is born in."""

    def wait_ready(self, seconds: float) -> None:
        """Until the guest answers. DeadlineError."""

    def start(self, clients: int) -> None:
        """Let that many work, from now on."""

    def stop(self, patience: float = LOST_AFTER) -> None:
        """Let each finish what it is at, within ``patience`` seconds. Harmless twice, or without start."""

    def read_all(self) -> None:
        """Ask the guest for all that it keeps, for the verdict; the clients have stopped."""

    def exchanges(self) -> list[Exchange]:
        """All that were answered; also while they work."""

    def verdict(self) -> Verdict:
        """Once they have stopped."""


def gaps(exchanges: Sequence[Exchange], killed: float, until: float) -> list[float]:
    """For each client that was at work then: seconds it waited for one answer, beyond its usual, round a failure.

    The longest of the requests that were under way at any time from ``killed`` to ``until``, less the median of those
    answered before. A client that has none in that time has waited all of it.
    """
    found = []
    for client in sorted({one.client for one in exchanges}):
        own = [one for one in exchanges if one.client == client]
        usual = statistics.median([one.ended - one.began for one in own if one.ended < killed] or [0.0])
        under_way = [one.ended - one.began for one in own if one.ended >= killed and one.began <= until]
        found.append(max(0.0, max(under_way, default=until - killed) - usual))
    return found
