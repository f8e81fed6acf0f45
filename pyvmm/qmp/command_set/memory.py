"""Guest memory to files, and where it is written. Source: qapi/machine.json (memsave, pmemsave), qapi/dump.json;
pyvmm's own command is x-query-dirty-heat.

Files are opened so that nothing can hold the loop up: a FIFO without a reader is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from pyvmm.arch.x86.faults import PageFault
from pyvmm.arch.x86.paging import Access, walk
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.state import Sregs
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.core_dump import extents, write_all, write_core
from pyvmm.qmp.errors import QmpError

Unsigned = Annotated[int, msgspec.Meta(ge=0)]
_PIECE = 1 << 20


class MemsaveArguments(QmpStruct):
    """``size`` bytes from linear address ``val`` as vCPU ``cpu_index`` sees it."""

    val: Unsigned
    size: Unsigned
    filename: str
    cpu_index: int = 0


class PmemsaveArguments(QmpStruct):
    """``size`` bytes from guest-physical address ``val``."""

    val: Unsigned
    size: Unsigned
    filename: str


class DumpArguments(QmpStruct):
    """``begin`` and ``length`` go together: a range of guest-physical addresses."""

    paging: bool
    protocol: str
    begin: Unsigned | None = None
    length: Unsigned | None = None
    format: Literal["elf"] = "elf"


class DumpCapability(QmpStruct):
    """Formats of dump-guest-memory."""

    formats: list[Literal["elf"]]


class HeatRegionInfo(QmpStruct):
    """A piece of RAM at ``address``. ``written[i]``: pages found written in its ``i``-th ``bucket`` bytes, so far."""

    address: int
    size: int
    bucket: int
    written: list[int]


class DirtyHeatInfo(QmpStruct):
    """``since``: when counting began (seconds of the monotonic clock); other counts than of this beginning do not
    compare. ``log``: whose harvests are counted: a migration's or a replication's (others), or its own.
    """

    since: float
    harvests: int
    log: Literal["others", "own", "none"]
    regions: list[HeatRegionInfo]


@command("memsave")
def memsave(context: CommandContext, arguments: MemsaveArguments) -> None:
    """Through the vCPU's page tables, whatever rights the pages have."""
    machine = context.machine
    if not 0 <= arguments.cpu_index < len(machine.vcpus):
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    if arguments.size > machine.memory.size:  # page tables may map one page everywhere: no other end is certain
        raise _invalid(arguments.val, arguments.size)
    with machine.standing_still(), _output(arguments.filename) as out:
        sregs = machine.vcpus[arguments.cpu_index].get_sregs()
        at, left = arguments.val, arguments.size
        while left:
            length = min(left, PAGE_SIZE - at % PAGE_SIZE)
            data = read_linear(machine.memory, sregs, at, length)
            if data is None:
                raise _invalid(at, arguments.size)
            write_all(out, data)
            at += length
            left -= length


@command("pmemsave")
def pmemsave(context: CommandContext, arguments: PmemsaveArguments) -> None:
    """Memory only: a range that leaves it is refused, before anything is written."""
    memory = context.machine.memory
    if arguments.size and not memory.contains(arguments.val, arguments.size):
        raise _invalid(arguments.val, arguments.size)
    with context.machine.standing_still(), _output(arguments.filename) as out:
        for at in range(arguments.val, arguments.val + arguments.size, _PIECE):
            write_all(out, memory.read(at, min(_PIECE, arguments.val + arguments.size - at)))


@command("dump-guest-memory")
def dump_guest_memory(context: CommandContext, arguments: DumpArguments) -> None:
    """An ELF core of all memory and every vCPU's registers. The machine stands still meanwhile."""
    if arguments.paging:
        raise QmpError("'paging' is not supported: the file has guest-physical addresses only")
    if (arguments.begin is None) != (arguments.length is None):
        missing = "begin" if arguments.begin is None else "length"
        raise QmpError(f"Parameter '{missing}' is missing")
    kind, _, path = arguments.protocol.partition(":")
    if kind != "file" or not path:
        raise QmpError("Invalid parameter 'protocol'")
    machine = context.machine
    wanted = extents(machine.memory.regions, arguments.begin or 0, arguments.length)
    if not wanted:
        raise QmpError("dump: no memory in that range")
    with _output(path) as out, _paused(machine), machine.standing_still():
        write_core(out, machine.vcpus, wanted)


@command("query-dump-guest-memory-capability")
def query_dump_guest_memory_capability(context: CommandContext) -> DumpCapability:
    """ELF only."""
    return DumpCapability(formats=["elf"])


@command("x-query-dirty-heat")
def x_query_dirty_heat(context: CommandContext) -> DirtyHeatInfo:
    """Where the guest writes: counts that grow as long as they are asked for every few seconds, and cost nothing else.
    A page counts once for each harvest it is found in.
    """
    machine, heat = context.machine, context.monitor.heat
    regions = heat.look(may_log=machine.run_state is RunState.RUNNING)
    return DirtyHeatInfo(
        since=heat.began, harvests=heat.harvests, log=heat.log,
        regions=[
            HeatRegionInfo(address=one.gpa, size=one.size, bucket=one.bucket, written=one.written) for one in regions
        ],
    )  # fmt: skip


@contextlib.contextmanager
def _paused(machine: Machine) -> Iterator[None]:
    """STOP and RESUME around a dump, as QEMU sends them: it takes its time, and devices must stand still, too."""
    running = machine.run_state is RunState.RUNNING
    if running:
        machine.pause()
    try:
        yield
    finally:
        if running:
            machine.resume()


@contextlib.contextmanager
def _output(path: str) -> Iterator[int]:
    """A new or truncated file; OSErrors inside become QMP's."""
    try:
        out = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except (OSError, ValueError) as error:
        raise QmpError(f"Could not open '{path}': {getattr(error, 'strerror', None) or error}") from None
    try:
        yield out
    except OSError as error:
        raise QmpError(f"writing '{path}': {error.strerror}") from None
    finally:
        os.close(out)


def read_linear(memory: GuestMemory, sregs: Sregs, address: int, size: int) -> bytes | None:
    """``size`` bytes at linear ``address``, not across a page's end; ``None`` if nothing readable is there."""
    try:
        found = walk(memory, sregs, address & ((1 << 64) - 1), Access(smap_override=True))
        return memory.read(found.gpa, size)
    except (PageFault, GuestMemoryError):
        return None


def _invalid(address: int, size: int) -> QmpError:
    return QmpError(f"Invalid addr 0x{address:016x}/size {size} specified")
