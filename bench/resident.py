"""Resident memory of ``pyvmm run`` beyond the guest's: what one more machine costs its host.

Read from /proc/PID/smaps while the guest idles. Guest RAM is told by its name there (memfd:pyvmm-ram-low, -high) and
left out, touched or not; all else counts: interpreter, libraries, heaps, stacks, kvm_run pages. ``rss`` counts a
page that is shared with other processes (libraries, mostly) in full, ``pss`` by its share; the target holds for the
greater, rss. What KVM itself takes in the kernel (page tables of the guest, vCPU structures) is not in smaps.

bare   a real-mode guest that prints a letter and halts with interrupts on, 128 MiB
linux  the tiny Linux, running ``sleep`` in a shell, if its kernel and root file system are built
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from figures import PYVMM, child_environment, document, figure, main, paired_ratio, verdict

from pyvmm.errors import ConfigError, HostError
from pyvmm.machine.tiny_linux import find_initramfs, find_kernel

ROUNDS = 5
TARGET_MIB = 60
LINUX_DEADLINE = 50.0
GUEST_RAM = "/memfd:pyvmm-ram-"
BARE = b"\xba\xe9\x00\xb0\x52\xee\xfb\xf4\xeb\xfd"  # mov dx, 0xe9; mov al, 'R'; out dx, al; sti; 1: hlt; jmp 1b


class Resident(NamedTuple):
    """MiB; ``guest`` is the guest's RAM, the others are without it."""

    rss: float
    pss: float
    private: float
    guest: float


def resident(pid: int) -> Resident:
    """What ``pid`` has in memory now."""
    kib = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0, "guest": 0}
    is_guest = False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # a mapping's first line: addresses, rights, offset, device, inode, name
            is_guest = len(words) > 5 and words[5].startswith(GUEST_RAM)
        elif is_guest:
            kib["guest"] += int(words[1]) if words[0] == "Rss:" else 0
        elif words[0][:-1] in kib:
            kib[words[0][:-1]] += int(words[1])
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return Resident(kib["Rss"] / 1024, kib["Pss"] / 1024, private / 1024, kib["guest"] / 1024)


def while_running(command: list[str], said: bytes, deadline: float) -> Resident:
    """Start ``command``, wait until it has written ``said``, look, end it."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment()
    ) as process:
        try:
            assert process.stdout is not None
            wait_for(process.stdout.fileno(), said, deadline)
            time.sleep(0.2)  # let it come to rest: what is looked at is a machine that idles
            return resident(process.pid)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(fd: int, said: bytes, deadline: float) -> None:
    """Read ``fd`` until ``said`` has come; HostError after ``deadline`` seconds or at its end."""
    until = time.monotonic() + deadline
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while said not in seen:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise HostError(f"the guest did not write {said!r} within {deadline:g} s")
            piece = os.read(fd, 4096)
            if not piece:
                raise HostError(f"the guest ended before it wrote {said!r}")
            seen += piece


def empty_interpreter() -> Resident:
    """Python with nothing imported, waiting."""
    return while_running([sys.executable, "-c", "print('R', flush=True); import time; time.sleep(60)"], b"R", 10.0)


def figures_of(rounds: list[Resident]) -> dict[str, Any]:
    """Each field over the rounds."""
    return {name: figure([getattr(r, name) for r in rounds], "MiB", 1) for name in Resident._fields}


def linux() -> dict[str, Any]:
    """One boot; or why there is none."""
    try:
        find_kernel(None), find_initramfs(None)
    except ConfigError as error:
        return {"skipped": str(error)}
    # Two lines: pyvmm holds one back until it knows whether it is the command's last.
    command = [*PYVMM, "linux", "--timeout", "60", "--exec", "echo Ready; echo; sleep 600"]
    try:
        return figures_of([while_running(command, b"Ready", LINUX_DEADLINE)])
    except HostError as error:
        return {"failed": str(error)}


def measure() -> dict[str, Any]:
    """Take turns: a machine, an empty interpreter; then Linux."""
    bare: list[Resident] = []
    empty: list[Resident] = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        image = os.path.join(folder, "idle.bin")
        Path(image).write_bytes(BARE)
        for _ in range(ROUNDS):
            bare.append(while_running([*PYVMM, "run", "--timeout", "30", image], b"R", 20.0))
            empty.append(empty_interpreter())
    of_linux = linux()
    target = {"bare_rss_mib": verdict(figure([r.rss for r in bare], "MiB", 1).median, TARGET_MIB)}
    if "rss" in of_linux:
        target["linux_rss_mib"] = verdict(of_linux["rss"].median, TARGET_MIB)
    return document(
        what="resident memory of pyvmm beyond the guest's RAM",
        against="a Python interpreter that waits",
        figures={"bare": figures_of(bare), "linux": of_linux, "empty_interpreter": figures_of(empty)},
        ratio=paired_ratio([r.rss for r in bare], [r.rss for r in empty]).median,
        target=target,
    )


if __name__ == "__main__":
    main(measure)
