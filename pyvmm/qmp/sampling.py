"""What a machine does at a moment, asked of it by QMP; and rates, from two such moments.

For ``pyvmm top`` and the dashboard. Everything is asked out-of-band but where the guest writes, so that a machine whose
loop is stuck is seen to be; nothing is harvested beside a migration or a replication (x-query-dirty-heat's rule).
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from pyvmm.errors import PyvmmError
from pyvmm.qmp.client import CommandError, QmpClient

PAGE = 4096


class CpuSample(msgspec.Struct, frozen=True):
    """Totals of a vCPU since it was made; ``kinds``: KVM's counters of exits, by their names."""

    index: int
    seconds: float
    exits: int
    kinds: dict[str, int]


class QueueSample(msgspec.Struct, frozen=True):
    """``depth``: chains that wait or are being served; ``None``: the device was busy."""

    device: str
    queue: int
    size: int
    depth: int | None


class Sample(msgspec.Struct, frozen=True):
    """``at``: monotonic seconds; ``written``: pages found written so far, where that is known."""

    at: float
    name: str
    status: str
    memory: int
    cpus: list[CpuSample]
    queues: list[QueueSample]
    written: int | None
    heat: dict[str, Any] | None
    migration: dict[str, Any] | None
    colo: dict[str, Any] | None
    colo_stats: dict[str, Any] | None


class CpuRates(msgspec.Struct, frozen=True):
    """``busy``: share of a host CPU; ``exits`` and ``kinds``: a second."""

    index: int
    busy: float
    exits: float
    kinds: dict[str, float]


class Rates(msgspec.Struct, frozen=True):
    """Between two samples; ``dirty``: pages a second, ``None`` where nobody counts them."""

    seconds: float
    cpus: list[CpuRates]
    dirty: float | None

    @property
    def busy(self) -> float:
        """Of all vCPUs together."""
        return sum(cpu.busy for cpu in self.cpus)

    @property
    def exits(self) -> float:
        """Of all vCPUs together."""
        return sum(cpu.exits for cpu in self.cpus)


def sample(client: QmpClient, *, heat: bool = True) -> Sample:
    """Ask. ``heat``: also where it writes. PyvmmError: it does not answer, or has ended."""
    status = client.execute("query-status", oob=True)["status"]
    cpus: dict[str, dict[str, dict[str, int]]] = {}
    for each in client.execute("query-stats", {"target": "vcpu"}, oob=True):
        counters = {one["name"]: one["value"] for one in each["stats"]}
        cpus.setdefault(each["qom-path"], {})[each["provider"]] = counters
    queues = [
        QueueSample(device["path"].rpartition("/")[2], number, size, depth)
        for device in client.execute("x-query-virtio-depths", oob=True)
        for number, (size, depth) in enumerate(
            zip(device["sizes"], device.get("depths") or [None] * len(device["sizes"]), strict=True)
        )
    ]
    colo = _colo(client)
    migration = client.execute("query-migrate", oob=True)
    found = _heat(client) if heat and status == "running" else None
    return Sample(
        at=time.monotonic(),
        name=client.execute("query-name", oob=True).get("name", ""),
        status=status,
        memory=client.execute("query-memory-size-summary", oob=True)["base-memory"],
        cpus=[_cpu(number, counters) for number, counters in enumerate(cpus.values())],
        queues=queues,
        written=None if found is None else sum(sum(region["written"]) for region in found["regions"]),
        heat=found,
        migration=migration if migration.get("status", "none") != "none" else None,
        colo=colo,
        colo_stats=client.execute("query-colo-stats", oob=True) if colo is not None else None,
    )


def _colo(client: QmpClient) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = client.execute("query-colo-status", oob=True)
    except CommandError:  # it was not started with --colo
        return None
    return found


def _heat(client: QmpClient) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = client.execute("x-query-dirty-heat")
    except CommandError:  # it is not the moment for it
        return None
    return found


def _cpu(number: int, counters: dict[str, dict[str, int]]) -> CpuSample:
    own, kvm = counters.get("pyvmm", {}), counters.get("kvm", {})
    kinds = {name.removesuffix("_exits"): value for name, value in kvm.items() if name.endswith("_exits")}
    return CpuSample(number, own.get("cpu-time-ns", 0) / 1e9, kvm.get("exits", own.get("exits", 0)), kinds)


def rates(before: Sample, after: Sample) -> Rates | None:
    """What happened in between; ``None`` if they are of no two moments of one life."""
    seconds = after.at - before.at
    if seconds <= 0 or len(before.cpus) != len(after.cpus):
        return None
    cpus = [
        CpuRates(
            new.index,
            max(0.0, (new.seconds - old.seconds) / seconds),
            max(0, new.exits - old.exits) / seconds,
            {kind: max(0, count - old.kinds.get(kind, 0)) / seconds for kind, count in new.kinds.items()},
        )
        for old, new in zip(before.cpus, after.cpus, strict=True)
    ]
    dirty = None
    if before.written is not None and after.written is not None and after.written >= before.written:
        dirty = (after.written - before.written) / seconds
    return Rates(seconds, cpus, dirty)


def problem_of(error: PyvmmError) -> str:
    """For a row of a table."""
    return str(error).partition(": ")[2] or str(error)
