"""What a run of the demo found: figures, verdict, table."""

from __future__ import annotations

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
    """What was asked for; ``seconds``: how long clients work, failures included."""

    vm: VmKind = "bare"
    kill: Kill = "primary"
    mode: Mode = "hybrid"
    clients: int = 4
    seconds: float = 20.0
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
    gaps: list[float] = field(default_factory=list)
    """Seconds, one for each client."""
    killed: float = 0.0
    victim: str = ""
    survivor: str = ""
    failover: float | None = None
    """Milliseconds from the survivor's first suspicion to its guest running on."""
    protected_again: float | None = None
    """Seconds from the failure to protection by a new secondary."""
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
            and self.protected_again is not None
        )  # fmt: skip

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much) of the table, in its order."""
        verdict = self.verdict
        pauses = [one.pause for one in self.checkpoints]
        again = self.killed + (self.protected_again or 0.0)
        protected = [one for one in self.exchanges if one.ended < self.killed or one.began > again]
        alone = [one for one in self.exchanges if self.killed < one.began and one.ended < again]
        reasons = Counter(one.reason for one in self.checkpoints).most_common(3)
        rows = [
            ("guest", self.title),
            ("mode, failure", f"{self.options.mode}; {_FAILURES[self.options.kill]}"),
            ("checkpoints", f"{len(pauses)}" + (f" ({', '.join(f'{n} {r}' for r, n in reasons)})" if reasons else "")),
            ("pause of the guest", _median_largest(pauses, "ms", 2)),
            ("failover", _of(self.failover, "ms after the failure was noticed")),
            ("gap that clients saw", _median_largest([gap * 1000 for gap in self.gaps], "ms", 0)),
            ("protected again", _of(self.protected_again, "s after the failure")),
            ("requests answered", f"{len(self.exchanges)} by {len({one.client for one in self.exchanges})} clients"),
            ("latency, protected", _median_largest([_milliseconds(one) for one in protected], "ms", 1)),
            ("latency, alone", _median_largest([_milliseconds(one) for one in alone], "ms", 1)),
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
    "primary": "the primary is killed (SIGKILL)",
    "secondary": "the secondary is killed (SIGKILL)",
    "link": "the replication link goes silent",
}


def _milliseconds(one: Exchange) -> float:
    return (one.ended - one.began) * 1000


def _median_largest(values: Sequence[float], unit: str, digits: int) -> str:
    if not values:
        return "-"
    return f"median {statistics.median(values):.{digits}f} {unit}, largest {max(values):.{digits}f} {unit}"


def _of(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f} {unit}"
