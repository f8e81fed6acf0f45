"""What the machine is made of. Source: qapi/machine.json, qapi/machine-target.json, qapi/char.json.

Out-of-band, too, where the answer never changes: ``pyvmm list`` gets it from a machine whose loop is stuck.
"""

from __future__ import annotations

from typing import Literal

from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command


class NameInfo(QmpStruct):
    """``name`` of the machine."""

    name: str


class KvmInfo(QmpStruct):
    """Whether KVM is there and used: always."""

    enabled: bool
    present: bool


class CpuProperties(QmpStruct):
    """Where a vCPU sits: each is a socket of one core of one thread."""

    core_id: int
    thread_id: int
    socket_id: int


class CpuInfoFast(QmpStruct):
    """One vCPU. ``thread_id``: the host's number of its thread, 0 before it starts."""

    thread_id: int
    props: CpuProperties
    qom_path: str
    cpu_index: int
    target: Literal["x86_64"]


class MemoryInfo(QmpStruct):
    """Bytes."""

    base_memory: int
    plugged_memory: int


class ChardevInfo(QmpStruct):
    """One character device of the host's side."""

    label: str
    filename: str
    frontend_open: bool


@command("query-name", allow_oob=True)
def query_name(context: CommandContext) -> NameInfo:
    """--name, or what was made of the image's."""
    return NameInfo(name=context.machine.config.name)


@command("query-kvm", allow_oob=True)
def query_kvm(context: CommandContext) -> KvmInfo:
    """Always both."""
    return KvmInfo(enabled=True, present=True)


@command("query-cpus-fast", allow_oob=True)
def query_cpus_fast(context: CommandContext) -> list[CpuInfoFast]:
    """All vCPUs, without stopping any."""
    return [
        CpuInfoFast(
            thread_id=thread.thread_id or 0,
            props=CpuProperties(core_id=0, thread_id=0, socket_id=thread.vcpu.index),
            qom_path=f"/machine/cpu[{thread.vcpu.index}]",
            cpu_index=thread.vcpu.index,
            target="x86_64",
        )
        for thread in context.machine.threads
    ]


@command("query-memory-size-summary", allow_oob=True)
def query_memory_size_summary(context: CommandContext) -> MemoryInfo:
    """The machine's memory; none can be plugged."""
    return MemoryInfo(base_memory=context.machine.memory.size, plugged_memory=0)


@command("query-chardev")
def query_chardev(context: CommandContext) -> list[ChardevInfo]:
    """The serial line and the monitors."""
    serial = ChardevInfo(label="serial0", filename=context.machine.config.serial, frontend_open=True)
    monitors = [
        ChardevInfo(label=f"monitor{number}", filename=endpoint.label, frontend_open=True)
        for number, endpoint in enumerate(context.monitor.endpoints)
    ]
    return [serial, *monitors]
