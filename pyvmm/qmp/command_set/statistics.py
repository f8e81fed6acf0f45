"""Counters, for who looks on (``pyvmm top``, the dashboard). Source: qapi/stats.json, qapi/virtio.json.

All of it out-of-band, too, and without stopping anything: KVM's counters are read from a file, a queue's depth from the
rings. A device that keeps its lock is left out.
"""

from __future__ import annotations

from typing import Literal

from pyvmm.host.kvm_counters import CounterType, KvmCounters, Unit
from pyvmm.machine.statistics import machine_statistics
from pyvmm.machine.vcpu_thread import VcpuThread
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import QmpError
from pyvmm.virtio.mmio import VirtioMmio

LOCK_WAIT = 0.05
ALIGN = 4096
"""What QEMU says of every ring."""
Provider = Literal["kvm", "pyvmm"]
Target = Literal["vm", "vcpu"]


class StatsRequest(QmpStruct):
    """Of ``provider`` only these ``names``, or all."""

    provider: Provider
    names: list[str] | None = None


class StatsArguments(QmpStruct):
    """``vcpus``: QOM paths, for target vcpu; all if none are named."""

    target: Target
    providers: list[StatsRequest] | None = None
    vcpus: list[str] | None = None


class Stats(QmpStruct):
    """One counter."""

    name: str
    value: int


class StatsResult(QmpStruct):
    """``kvm``: KVM's own, named as it names them. ``pyvmm``: the native loop's, and ``cpu-time-ns`` of the thread."""

    provider: Provider
    stats: list[Stats]
    qom_path: str | None = None


class SchemasArguments(QmpStruct):
    """Of all providers, or of one."""

    provider: Provider | None = None


class StatsSchemaValue(QmpStruct):
    """One counter, in ``unit`` times ``base`` to the power of ``exponent``."""

    name: str
    type: CounterType
    exponent: int
    unit: Unit | None = None
    base: int | None = None


class StatsSchema(QmpStruct):
    """What ``provider`` counts of each ``target``. Of pyvmm's ``carried-out-``: those that happened."""

    provider: Provider
    target: Target
    stats: list[StatsSchemaValue]


class VirtioInfo(QmpStruct):
    """A virtio device."""

    path: str
    name: str


class QueueStatusArguments(QmpStruct):
    """Queue number ``queue`` of the device at ``path``."""

    path: str
    queue: int


class QueueStatus(QmpStruct):
    """``inuse``: chains that are out; ``x_depth``: these and those that wait; ``x_ready``: the driver uses it."""

    name: str
    queue_index: int
    inuse: int
    vring_num: int
    vring_num_default: int
    vring_align: int
    vring_desc: int
    vring_avail: int
    vring_used: int
    last_avail_idx: int
    used_idx: int
    signalled_used: int
    signalled_used_valid: bool
    x_depth: int
    x_ready: bool


@command("query-stats", allow_oob=True)
def query_stats(context: CommandContext, arguments: StatsArguments) -> list[StatsResult]:
    """Counters of the machine, or of each vCPU."""
    wanted = {request.provider: request.names for request in arguments.providers or ()}
    found: list[StatsResult] = []

    def add(provider: Provider, counters: dict[str, int], path: str | None) -> None:
        if arguments.providers is not None and provider not in wanted:
            return
        names = wanted.get(provider)
        stats = [Stats(name, value) for name, value in counters.items() if names is None or name in names]
        if stats:
            found.append(StatsResult(provider, stats, path))

    machine = context.machine
    counted = machine_statistics(machine)
    if arguments.target == "vm":
        if arguments.vcpus is not None:
            raise QmpError("Parameter 'vcpus' is for target 'vcpu'")
        add("kvm", machine.vm_counters.read(), None)
        add("pyvmm", {"resets": counted["resets"], **_carried_out(counted["instructions_carried_out"])}, None)
        return found
    paths = [f"/machine/cpu[{thread.vcpu.index}]" for thread in machine.threads]
    if unknown := next((path for path in arguments.vcpus or () if path not in paths), None):
        raise QmpError(f"Device '{unknown}' not found")
    for path, thread, file, native in zip(paths, machine.threads, machine.counters, counted["cpus"], strict=True):
        if arguments.vcpus is None or path in arguments.vcpus:
            add("kvm", file.read(), path)
            add("pyvmm", _own(thread, native), path)
    return found


@command("query-stats-schemas", allow_oob=True)
def query_stats_schemas(context: CommandContext, arguments: SchemasArguments) -> list[StatsSchema]:
    """What query-stats can tell, and in which unit."""
    machine = context.machine
    own = [_schema(name) for name in _own(machine.threads[0], machine_statistics(machine)["cpus"][0])]
    each: tuple[tuple[Provider, Target, list[StatsSchemaValue]], ...] = (
        ("kvm", "vm", _described(machine.vm_counters)), ("kvm", "vcpu", _described(machine.counters[0])),
        ("pyvmm", "vm", [_schema("resets")]), ("pyvmm", "vcpu", own),
    )  # fmt: skip
    return [
        StatsSchema(provider, target, stats)
        for provider, target, stats in each
        if stats and arguments.provider in (None, provider)
    ]


def _own(thread: VcpuThread, native: dict[str, int]) -> dict[str, int]:
    seconds = {"cpu-time-ns": int(thread.cpu_seconds() * 1e9)}
    return seconds | {name.replace("_", "-"): value for name, value in native.items()}


def _schema(name: str) -> StatsSchemaValue:
    if name == "cpu-time-ns":
        return StatsSchemaValue(name, "cumulative", -9, "seconds", 10)
    return StatsSchemaValue(name, "cumulative", 0)


def _described(counters: KvmCounters) -> list[StatsSchemaValue]:
    return [
        StatsSchemaValue(one.name, one.type, one.exponent, one.unit, one.base if one.exponent else None)
        for one in counters.described()
    ]


def _carried_out(counts: dict[str, int]) -> dict[str, int]:
    return {f"carried-out-{name}": count for name, count in counts.items()}


def _transports(context: CommandContext) -> dict[str, VirtioMmio]:
    return {f"/machine/{each.section_id}": each for each in context.machine.devices if isinstance(each, VirtioMmio)}


@command("x-query-virtio", allow_oob=True)
def x_query_virtio(context: CommandContext) -> list[VirtioInfo]:
    """All virtio devices."""
    return [VirtioInfo(path, each.device.name) for path, each in _transports(context).items()]


@command("x-query-virtio-queue-status", allow_oob=True)
def x_query_virtio_queue_status(context: CommandContext, arguments: QueueStatusArguments) -> QueueStatus:
    """One queue, as it is now."""
    transport = _transports(context).get(arguments.path)
    if transport is None:
        raise QmpError(f"Path {arguments.path} is not a VirtIODevice")
    if not 0 <= arguments.queue < len(transport.device.queues):
        raise QmpError(f"Invalid virtqueue number {arguments.queue}")
    return _status(transport, arguments.queue)


class DeviceQueues(QmpStruct):
    """``depths``: of each queue; ``None``: the device has kept its lock."""

    path: str
    name: str
    sizes: list[int]
    depths: list[int] | None = None


@command("x-query-virtio-depths", allow_oob=True)
def x_query_virtio_depths(context: CommandContext) -> list[DeviceQueues]:
    """What waits in every queue of every device, in one answer."""
    found = []
    for path, transport in _transports(context).items():
        queues = transport.device.queues
        depths = None
        if transport.lock.acquire(timeout=LOCK_WAIT):
            try:
                depths = [queue.depth for queue in queues]
            finally:
                transport.lock.release()
        found.append(DeviceQueues(path, transport.device.name, [queue.size for queue in queues], depths))
    return found


def _status(transport: VirtioMmio, number: int) -> QueueStatus:
    queue = transport.device.queues[number]
    if not transport.lock.acquire(timeout=LOCK_WAIT):
        raise QmpError(f"{transport.section_id} is busy")
    try:
        native = queue.native
        return QueueStatus(
            name=transport.device.name, queue_index=number, inuse=queue.in_flight, vring_num=queue.size,
            vring_num_default=queue.max_size, vring_align=ALIGN, vring_desc=queue.descriptors,
            vring_avail=queue.driver_area, vring_used=queue.device_area, last_avail_idx=int(native.next_avail),
            used_idx=int(native.next_used), signalled_used=int(native.notified), signalled_used_valid=queue.ready,
            x_depth=queue.depth, x_ready=queue.ready,
        )  # fmt: skip
    finally:
        transport.lock.release()
