"""What a run of the demo found: figures, verdict, table."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyvmm.demo.watch import Checkpoint, Held
from pyvmm.demo.workload import Exchange, Verdict

if TYPE_CHECKING:
    from rich.table import Table

VmKind = Literal["linux", "bare"]
Kill = Literal["primary", "secondary", "link"]
Mode = Literal["hybrid", "periodic"]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What was asked for; ``seconds``: how long clients work for each failure, round it."""

    vm: VmKind = "bare"
    kill: tuple[Kill, ...] = ("primary",)
    """What fails, in turns."""
    kills: int = 1
    mode: Mode = "hybrid"
    clients: int = 4
    seconds: float = 10.0
    report: Path | None = None
    heartbeat: int = 100
    """Milliseconds."""
    heartbeat_loss: int = 8


@dataclass(frozen=True)
class Mark:
    """Something that happened, at ``at`` (time.monotonic()). ``kind``: how it looks in the picture."""

    at: float
    text: str
    kind: Literal["plain", "death", "rescue", "protected"] = "plain"


@dataclass
class Failure:
    """One of them. Times are time.monotonic()'s."""

    kind: Kill
    at: float
    victim: str
    survivor: str
    alone: float
    """When the survivor was seen to run alone."""
    failover: float | None
    """Milliseconds from the survivor's first suspicion to its guest running on."""
    protected: float | None = None
    """When it was protected again."""
    gaps: list[float] = field(default_factory=list)
    """Seconds, one for each client."""


@dataclass
class Outcome:
    """Filled as the run goes on. Times are time.monotonic()'s; ``began`` is that of the run."""

    options: DemoOptions
    title: str
    began: float
    marks: list[Mark] = field(default_factory=list)
    machines: list[tuple[str, str, float, float]] = field(default_factory=list)
    """Name, host, from, to."""
    checkpoints: list[Checkpoint] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    verdict: Verdict | None = None

    def mark(self, text: str, kind: Literal["plain", "death", "rescue", "protected"] = "plain") -> Mark:
        """Note that something happens now."""
        self.marks.append(Mark(time.monotonic(), text, kind))
        return self.marks[-1]

    @property
    def ok(self) -> bool:
        """No connection and no acknowledged write was lost, and the history is one that a single machine could have."""
        verdict = self.verdict
        return (
            verdict is not None and verdict.ok and not verdict.connections_lost and not verdict.writes_lost
            and len(self.failures) == self.options.kills and all(one.protected is not None for one in self.failures)
        )  # fmt: skip

    def is_protected(self, exchange: Exchange) -> bool | None:
        """Whether a secondary was there all the time; ``None``: not always, and not never."""
        for failure in self.failures:
            if exchange.ended < failure.at:
                return True
            again = failure.protected or math.inf
            if exchange.began < again:
                return False if exchange.began > failure.alone and exchange.ended < again else None
        return True

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much) of the table, in its order."""
        verdict = self.verdict
        pauses = [one.pause for one in self.checkpoints]
        failures = self.failures
        latency = {
            state: [(one.ended - one.began) * 1000 for one in self.exchanges if self.is_protected(one) is state]
            for state in (True, False)
        }
        again = [one.protected - one.at for one in failures if one.protected is not None]
        kinds = Counter(one.kind for one in failures)
        reasons = Counter(one.reason for one in self.checkpoints).most_common(3)
        rows = [
            ("guest", self.title),
            ("mode", self.options.mode),
            ("failures", ", ".join(f"{count} {_FAILURES[kind]}" for kind, count in kinds.items()) or "-"),
            ("checkpoints", f"{len(pauses)}" + (f" ({', '.join(f'{n} {r}' for r, n in reasons)})" if reasons else "")),
            ("pause of the guest", _median_largest(pauses, "ms", 2)),
            ("failover, once noticed", _median_largest(
                [one.failover for one in failures if one.failover is not None], "ms", 1)),
            ("gap that clients saw", _median_largest([gap * 1000 for one in failures for gap in one.gaps], "ms", 0)),
            ("protected again after", _median_largest(again, "s", 1)),
            ("requests answered", f"{len(self.exchanges)} by {len({one.client for one in self.exchanges})} clients"),
            ("latency, protected", _median_largest(latency[True], "ms", 1)),
            ("latency, alone", _median_largest(latency[False], "ms", 1)),
        ]
        if verdict is not None:
            rows.append(("connections lost", str(verdict.connections_lost)))
            kept = "0 (it keeps nothing)" if verdict.writes_lost is None else str(verdict.writes_lost)
            rows.append(("acknowledged writes lost", kept))
            if verdict.repeated:
                rows.append(("datagrams sent again", str(verdict.repeated)))
            rows.append(("history", verdict.text))
        return rows

    def table(self) -> Table:
        """For rich."""
        from rich.table import Table
        from rich.text import Text

        good = self.ok
        table = Table(title="pyvmm colo demo: " + ("nobody noticed" if good else "FAILED"), show_header=False)
        for what, value in self.rows():
            table.add_row(what, Text(value))
        return table


_FAILURES = {
    "primary": "x SIGKILL for the primary",
    "secondary": "x SIGKILL for the secondary",
    "link": "x replication link silent",
}


def _median_largest(values: Sequence[float], unit: str, digits: int) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f} {unit}"
    return f"median {statistics.median(values):.{digits}f} {unit}, largest {max(values):.{digits}f} {unit}"
