"""What a disk costs: the same bare-metal driver under pyvmm and under QEMU, and the native engine by itself.

``guest``: guests/disk-reader makes requests of one size, one or eight at a time, of an image in the page cache; the
host takes the time between its "begin" and "end" lines. QEMU runs it as a microvm with a virtio-blk-device,
``cache=writeback,aio=threads``; both have the same modern virtio-mmio and no interrupts, since the guest polls.

``engine``: 64 KiB reads through the virtqueue by one of the native core's threads, for a driver in memory, against the
same reads by preadv in a plain C loop; see ``disk_loop.c``. CPU time of the thread that reads.

Prints JSON: requests or bytes a second, and how many times the other's ours is (more is better).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import PYVMM, REPOSITORY, child_environment, document, figure, main, paired_ratio

from pyvmm.errors import HostError

ROUNDS = 5
GUEST = REPOSITORY / "guests" / "disk-reader" / "disk-reader.elf"
IMAGE_SIZE = 64 << 20
WORK = {
    "4_kib_depth_1": (4096, 1, 20000), "4_kib_depth_8": (4096, 8, 40000),
    "64_kib_depth_1": (65536, 1, 8000), "64_kib_depth_8": (65536, 8, 12000),
}  # fmt: skip
"""Size of a request, how many at a time, how many in a round."""
TARGET = 0.8
ENGINE_TARGET = 1.5
ENGINE_WORK = (65536, 32, 4096)
ENGINE_ROUNDS = 11
NATIVE = REPOSITORY / "pyvmm" / "native"
MEMORY = "32M"
DEADLINE = 120


def commands(image: str, append: str) -> dict[str, list[str]]:
    """Both contestants."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise HostError("qemu-system-x86_64 is not there to be compared with; run make packages")
    return {
        "pyvmm": [*PYVMM, "run", str(GUEST), "--memory", MEMORY, "--disk", f"{image},readonly", "--append", append],
        "qemu": [
            qemu, "-M", "microvm,x-option-roms=off,rtc=off", "-accel", "kvm", "-m", MEMORY,
            "-cpu", "host,-arch-capabilities",
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
            "-global", "virtio-mmio.force-legacy=false", "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
            "-drive", f"id=d,file={image},format=raw,if=none,readonly=on,cache=writeback,aio=threads",
            "-device", "virtio-blk-device,drive=d", "-kernel", str(GUEST), "-append", append,
        ],
    }  # fmt: skip


def timed(command: list[str]) -> float:
    """Seconds between the guest's "begin" and "end" lines."""
    began = ended = 0.0
    said = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=child_environment()
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                now = time.monotonic()
                said.append(line)
                began = now if line.startswith(b"begin") else began
                ended = now if line.startswith(b"end") else ended
            status = process.wait(DEADLINE)
        finally:
            process.kill()
    if status != 0x21 or not ended > began > 0:
        raise HostError(f"{command[0]} ended with {status}: {b''.join(said).decode(errors='replace')!r}")
    return ended - began


def guest_figures(image: str) -> dict[str, Any]:
    """Requests a second, turn by turn."""
    parts: dict[str, Any] = {}
    for name, (size, depth, requests) in WORK.items():
        found: dict[str, list[float]] = {"pyvmm": [], "qemu": []}
        for _ in range(ROUNDS):
            for who, command in commands(image, f"size={size} depth={depth} requests={requests}").items():
                found[who].append(requests / timed(command))
        parts[name] = {who: figure(values, "requests/s", 0) for who, values in found.items()}
        parts[name]["ratio"] = paired_ratio(found["pyvmm"], found["qemu"])
    return parts


def build(folder: str) -> str:
    """The program with both loops, made of the native core's own sources."""
    program = os.path.join(folder, "disk_loop")
    names = ["virtqueue", "dirty_bitmap", "virtio_interrupt", "block_image", "block_overlay", "block_request",
             "block_device"]  # fmt: skip
    sources = [str(REPOSITORY / "bench" / "disk_loop.c"), *(str(NATIVE / f"{name}.c") for name in names)]
    try:
        subprocess.run(
            ["gcc", "-O2", "-std=gnu11", f"-I{NATIVE}", *sources, "-o", program, "-lpthread"], check=True, timeout=60
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"the C loops cannot be built: {error}; run make packages") from None
    return program


def engine_figures(folder: str, image: str) -> dict[str, Any]:
    """Bytes a second of both loops, turn by turn."""
    size, depth, requests = ENGINE_WORK
    command = [build(folder), image, str(ENGINE_ROUNDS), str(requests), str(size), str(depth)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout.splitlines()
    engine, loop = zip(*((int(a), int(b)) for a, b in map(str.split, lines)), strict=True)
    total = size * requests
    return {
        "engine": figure([total / each for each in engine], "GB/s"),
        "preadv": figure([total / each for each in loop], "GB/s"),
        "ratio": paired_ratio([1 / each for each in engine], [1 / each for each in loop]),
    }


def measure() -> dict[str, Any]:
    """All of it."""
    if not GUEST.is_file():
        raise HostError(f"{GUEST}: not built: run make guests")
    with tempfile.TemporaryDirectory() as folder:
        image = os.path.join(folder, "disk.img")
        Path(image).write_bytes(os.urandom(IMAGE_SIZE))
        engine = engine_figures(folder, image)
        parts = guest_figures(image)
    least = min(part["ratio"].median for part in parts.values())
    return document(
        what="requests a second of a polling bare-metal driver, image in the page cache",
        against="QEMU's microvm with virtio-blk-device, cache=writeback,aio=threads, on the same KVM",
        guest=parts,
        engine=engine,
        target={"ratio_at_least": TARGET, "least": least, "met": least >= TARGET},
        engine_target={"gigabytes_per_second_at_least": ENGINE_TARGET, "met": engine["engine"].median >= ENGINE_TARGET},
    )


if __name__ == "__main__":
    main(measure)
