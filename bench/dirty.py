"""What it costs to learn which pages a guest wrote: pyvmm's harvest against a C loop on the same VM.

guests/dirtier writes 0, 1, 10 and 100 % of 1 GiB, evenly spread, is stopped, and one of the two asks KVM and makes runs
of pages: DirtyTracker.harvest and PageSet.native_runs, or ``dirty_loop.c``, loaded into the same process. They take
turns, so both see the same guest, the same memory and the same minute. Times are wall time; a vCPU that fills its ring
has it emptied on the way, which counts as pyvmm's and is not put beside the C loop.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from cffi import FFI
from figures import REPOSITORY, document, figure, main, paired_ratio, verdict

from pyvmm.errors import HostError
from pyvmm.host.dirty_log import Method
from pyvmm.machine.dirty_cost import HarvestCost, Reference, measure_harvest
from pyvmm.machine.dirty_tracker import RING_ENTRIES
from pyvmm.machine.machine import Machine
from pyvmm.native import ffi as native

MEMORY = 1 << 30
SHARES = {0.0: 41, 1.0: 41, 10.0: 15, 100.0: 3}
"""Percent written, and rounds."""
TARGET = 2.0
DIRTIER = REPOSITORY / "guests" / "dirtier" / "dirtier.elf"
METHODS: tuple[Method, ...] = ("bitmap", "ring")


def load_loop(folder: Path) -> Any:
    """``dirty_loop.c``, compiled and loaded."""
    library = folder / "dirty_loop.so"
    command = ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-shared", "-fPIC",
               f"-I{REPOSITORY / 'pyvmm' / 'native'}", str(Path(__file__).with_name("dirty_loop.c")),
               "-o", str(library)]  # fmt: skip
    try:
        subprocess.run(command, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"the C loop cannot be built: {error}; run make packages") from None
    ffi = FFI()
    ffi.cdef("long loop_bitmap(int vm, uint64_t pages); long loop_ring(int vm, uintptr_t ring, uint64_t pages);")
    return ffi.dlopen(str(library))


def reference(loop: Any, method: Method) -> Reference:
    """The C loop on a machine of one vCPU and one region."""

    def harvest(machine: Machine) -> int:
        pages = machine.memory.size // 4096
        if method == "bitmap":
            found = int(loop.loop_bitmap(machine.vm.fd, pages))
        else:
            ring = int(native.cast("uintptr_t", machine.dirty.rings[0]))
            found = int(loop.loop_ring(machine.vm.fd, ring, pages))
        if found < 0:
            raise HostError("the C loop: KVM refused the dirty log")
        return found

    return harvest


def row(cost: HarvestCost) -> dict[str, Any]:
    """All figures of one method and share."""
    found: dict[str, Any] = {"problem": cost.problem} if cost.problem else {}
    rounds = min(len(cost.seconds), len(cost.against) or len(cost.seconds))
    if not rounds:
        return found
    ours, pages = cost.seconds[:rounds], cost.pages[:rounds]
    found |= {
        "pages": figure(pages, "pages", 0),
        "harvest_per_gib": figure([each * 1e6 * (1 << 30) / cost.memory for each in ours], "us"),
    }
    if min(pages):
        found["per_page"] = figure([s * 1e9 / n for s, n in zip(ours, pages, strict=True)], "ns")
    if cost.against:
        theirs = cost.against[:rounds]
        found |= {"c_loop": figure([each * 1e6 for each in theirs], "us"), "ratio": paired_ratio(ours, theirs)}
    return found


def measure() -> dict[str, Any]:
    """Both methods, all shares."""
    if not DIRTIER.is_file():
        raise HostError(f"{DIRTIER} is not built: make guests")
    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        loop = load_loop(Path(folder))
        for method in METHODS:
            for percent, rounds in SHARES.items():
                fits = method == "bitmap" or MEMORY / 4096 * percent / 100 < RING_ENTRIES * 3 / 4
                other = reference(loop, method) if fits else None
                cost = measure_harvest(DIRTIER, method, MEMORY, percent, rounds, other)
                parts.setdefault(method, {})[f"{percent:g}_percent"] = row(cost)
    return document(
        what="harvest of 1 GiB of guest memory and choice of runs of pages, by share that was written, wall time",
        against="a C loop with the same ioctls and one scan, on the same VM in turns (dirty_loop.c, gcc -O2)",
        **parts,
        target={"bitmap_1_percent": verdict(parts["bitmap"]["1_percent"]["ratio"].median, TARGET)},
    )


if __name__ == "__main__":
    main(measure)
