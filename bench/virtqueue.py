"""What the native virtqueue costs for each packet: against a plain C loop over an array of the same packets.

Both copy every packet's bytes once and are compiled with the same options; see ``virtqueue_loop.c`` for the loops. A
packet of 60 bytes is the smallest Ethernet sends, so nearly all of its time is the queue's; one of 64 KiB is the
largest that segmentation offload makes, so nearly all of its time is the copy.

Prints JSON: packets a second, nanoseconds each, and how many times the array's time the queue's is.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from figures import REPOSITORY, document, figure, main, paired_ratio

from pyvmm.errors import HostError

ROUNDS = 21
WORK = {"60_bytes": (60, 200_064), "64_kib": (65536, 2048)}
"""Size of a packet and packets a round; whole batches of 64."""
TARGET = 500_000
NATIVE = REPOSITORY / "pyvmm" / "native"


def build(folder: Path) -> Path:
    """The program with both loops, made of the native core's own sources."""
    program = folder / "virtqueue_loop"
    sources = [REPOSITORY / "bench" / "virtqueue_loop.c", NATIVE / "virtqueue.c", NATIVE / "dirty_bitmap.c"]
    command = ["gcc", "-O2", "-std=gnu11", f"-I{NATIVE}", *map(str, sources), "-o", str(program), "-lpthread"]
    try:
        subprocess.run(command, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"the C loops cannot be built: {error}; run make packages") from None
    return program


def measure() -> dict[str, Any]:
    """Both sizes."""
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for name, (size, packets) in WORK.items():
            command = [str(program), str(ROUNDS), str(packets), str(size)]
            lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
            queue, array = zip(*((int(a) / packets, int(b) / packets) for a, b in map(str.split, lines)), strict=True)
            parts[name] = {
                "queue_packets_per_second": figure([1e9 / each for each in queue], "packets/s", 0),
                "queue": figure(queue, "ns"),
                "array": figure(array, "ns"),
                "queue_bytes_per_second": figure([size / each for each in queue], "GB/s"),
                "ratio": paired_ratio(queue, array),
            }
    reached = parts["60_bytes"]["queue_packets_per_second"].median
    return document(
        what="one-descriptor packets through the native virtqueue, fake driver in the same thread, CPU time",
        against="a C loop that copies the same packets from an array",
        **parts,
        target={"packets_per_second_at_least": TARGET, "value": reached, "met": reached >= TARGET},
    )


if __name__ == "__main__":
    main(measure)
