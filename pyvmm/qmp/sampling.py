"""What a machine does at a moment, asked of it by QMP; and rates, from two such moments.

For ``pyvmm top`` and the dashboard. Everything is asked out-of-band but where the guest writes, so that a machine whose
loop is stuck is seen to be; nothing is harvested beside a migration or a replication (x-query-dirty-heat's rule).
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from pyvmm.errors import HostError, PyvmmError
from pyvmm.qmp.client import CommandError, QmpClient

PAGE = 4096


class _ColoStatus(msgspec.Struct, rename="kebab"):
    """What is relied on; the same for those below. Whoever answers may be no pyvmm, or another version."""

    mode: str
    x_pair: str
    x_term: int
    x_epoch: int


class _Pause(msgspec.Struct):
    median: float
    largest: float


class _ColoStats(msgspec.Struct, rename="kebab"):
    checkpoints: int
    pages: int
    pause: _Pause | None = None


class _Migration(msgspec.Struct):
    status: str


class _HeatRegion(msgspec.Struct):
    written: list[int]


class _Heat(msgspec.Struct):
    since: float
    harvests: int
    log: str
    regions: list[_HeatRegion]


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
    """Ask. ``heat``: also where it writes. PyvmmError: it does not answer, not as a pyvmm does, or has ended."""
    try:
        return _sample(client, heat)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise HostError(f"{client.label}: does not answer as a machine of this pyvmm does") from None


def _sample(client: QmpClient, heat: bool) -> Sample:
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
    colo = _asked(client, "query-colo-status", _ColoStatus, oob=True)
    migration = client.execute("query-migrate", oob=True) or None
    if migration is not None:
        msgspec.convert(migration, _Migration)
    # Not out-of-band: it is the loop that counts.
    found = _asked(client, "x-query-dirty-heat", _Heat, oob=False) if heat and status == "running" else None
    made = Sample(
        at=time.monotonic(),
        name=client.execute("query-name", oob=True).get("name", ""),
        status=status,
        memory=client.execute("query-memory-size-summary", oob=True)["base-memory"],
        cpus=[_cpu(number, counters) for number, counters in enumerate(cpus.values())],
        queues=queues,
        written=None if found is None else sum(sum(region["written"]) for region in found["regions"]),
        heat=found,
        migration=migration if migration is not None and migration["status"] != "none" else None,
        colo=colo,
        colo_stats=_asked(client, "query-colo-stats", _ColoStats, oob=True) if colo is not None else None,
    )
    return msgspec.convert(msgspec.to_builtins(made), Sample)


def _asked(client: QmpClient, command: str, shape: type[Any], *, oob: bool) -> dict[str, Any] | None:
    """``None`` if it is refused: the machine was not started with --colo, or it is not the moment for it."""
    try:
        found: dict[str, Any] = client.execute(command, oob=oob)
    except CommandError:
        return None
    msgspec.convert(found, shape)
    return found


def _cpu(number: int, counters: dict[str, dict[str, int]]) -> CpuSample:
    own, kvm = counters.get("pyvmm", {}), counters.get("kvm", {})
    kinds = {name.removesuffix("_exits"): value for name, value in kvm.items() if name.endswith("_exits")}
    return CpuSample(number, own.get("cpu-time-ns", 0) / 1e9, kvm.get("exits", own.get("exits", 0)), kinds)


def rates(before: Sample, after: Sample) -> Rates | None:
    """What happened in between; ``None`` if they are of no two moments of one life.

    ``dirty`` is ``None``, too, where the counts are of two beginnings, or a replication, whose harvests are counted
    then, has made none in between.
    """
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
    return Rates(seconds, cpus, _dirty(before, after))


def _dirty(before: Sample, after: Sample) -> float | None:
    old, new = before.heat, after.heat
    if old is None or new is None or before.written is None or after.written is None or old["since"] != new["since"]:
        return None
    if new["log"] == "others" and old["harvests"] == new["harvests"]:
        return None
    return max(0, after.written - before.written) / (after.at - before.at)


def problem_of(error: PyvmmError) -> str:
    """For a row of a table."""
    return str(error).partition(": ")[2] or str(error)
