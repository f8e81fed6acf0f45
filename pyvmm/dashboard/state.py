"""What the page is told of a machine: one document, whole each time, so that a browser may miss as many as it likes."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from pyvmm.qmp.client import QmpClient
from pyvmm.qmp.sampling import Rates, Sample, rates, sample

CHECKPOINTS = 120
"""The last ones that are told."""
PERIOD = 130.0
"""Seconds before now that the page shows."""
FAILOVER = "x-colo-lost-heartbeat"
"""What the button does."""
COMMANDS = frozenset({
    "qmp_capabilities", "query-name", "query-status", "query-stats", "query-memory-size-summary", "query-migrate",
    "query-colo-status", "query-colo-stats", "query-colo-checkpoints", "x-query-virtio-depths", "x-query-dirty-heat",
    FAILOVER,
})  # fmt: skip
"""All that the dashboard can ask of its machine."""
UNTOLD = frozenset({"STOP", "RESUME"})
"""Events that come with every checkpoint: they would cost something while nobody looks."""


class StateReader:
    """Asks ``client``. Rates are between two readings."""

    def __init__(self, client: QmpClient) -> None:
        self._client = client
        self._before: Sample | None = None

    def read(self) -> dict[str, Any]:
        """The state now. HostError: the machine is gone. DeadlineError: it does not answer."""
        found = sample(self._client)
        between = rates(self._before, found) if self._before is not None else None
        self._before = found
        state: dict[str, Any] = msgspec.to_builtins(found)
        state |= {"at": time.time(), "cpus": _cpus(found, between), "dirty": between.dirty if between else None}
        if found.colo is not None:
            since = {"since": time.time() - PERIOD}
            state["checkpoints"] = self._client.execute("query-colo-checkpoints", since, oob=True)[-CHECKPOINTS:]
        return state


def _cpus(found: Sample, between: Rates | None) -> list[dict[str, Any]]:
    if between is None:
        return [{"index": cpu.index, "exits": cpu.exits} for cpu in found.cpus]
    return [
        {"index": cpu.index, "exits": cpu.exits, "busy": one.busy, "exits_rate": one.exits, "kinds_rate": one.kinds}
        for cpu, one in zip(found.cpus, between.cpus, strict=True)
    ]
