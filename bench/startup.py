"""CPU time of ``pyvmm run`` from the start of the process to the first guest instruction.

The guest's first instruction writes to debug-exit. The program runs with one addition: the debug-exit device, when
it gets that write, reads CLOCK_PROCESS_CPUTIME_ID (user and system time of all threads since the process began) and
passes it on through a pipe. That is the first moment at which the guest can be known to have run, so the figure
contains one port exit too many, about 10 us, and nothing of the end. Beside it, from getrusage: the whole process
of the installed ``pyvmm`` script, end and tear-down included, and an interpreter that does nothing.

As a user has it, the host profile is cached and .pyc files exist (PYTHONDONTWRITEBYTECODE is taken out of the
children's environment); a first run sees to both and does not count.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from figures import child_environment, document, figure, main, paired_ratio, verdict

from pyvmm.errors import HostError
from pyvmm.host.profile import load_profile

ROUNDS = 15
TARGET_MS = 200
TOP = 12
HEAVY = {"elftools", "iced_x86", "rich", "lz4", "zstandard", "ptrace", "psutil", "pyroute2", "asyncio"}
"""Packages that only some guests and commands need: none should be there."""
GUEST = b"\xe6\xf4\xf4"  # out 0xf4, al (AL is 0, so the status is 1); hlt

TO_FIRST_EXIT = """
import os, sys, time
from pyvmm.devices.debug_exit import DebugExit
fd = int(sys.argv.pop(1))
end = DebugExit.write
def write(self, offset, size, value):
    os.write(fd, b"%d" % time.process_time_ns())
    end(self, offset, size, value)
DebugExit.write = write
from pyvmm.cli import main
sys.exit(main())
"""


class Cost(NamedTuple):
    """Milliseconds."""

    cpu: float
    wall: float


def first_exit(image: str) -> Cost:
    """From the start of the process to the first exit; wall time is to its end in the pipe."""
    read, write = os.pipe()
    command = [sys.executable, "-c", TO_FIRST_EXIT, str(write), "run", "--timeout", "30", image]
    start = time.monotonic_ns()
    with subprocess.Popen(command, pass_fds=[write], env=child_environment()) as process:
        os.close(write)
        cpu = os.read(read, 32)
        wall = time.monotonic_ns() - start
        os.close(read)
    if process.returncode != 1 or not cpu:
        raise HostError(f"pyvmm run ended with status {process.returncode} before or instead of its guest")
    return Cost(int(cpu) / 1e6, wall / 1e6)


def whole(command: list[str], status: int) -> Cost:
    """A whole process."""
    start = time.monotonic_ns()
    pid = os.posix_spawn(command[0], command, child_environment())
    _, ended, usage = os.wait4(pid, 0)
    wall = time.monotonic_ns() - start
    if os.waitstatus_to_exitcode(ended) != status:
        raise HostError(f"{command} ended with status {os.waitstatus_to_exitcode(ended)}, not {status}")
    return Cost((usage.ru_utime + usage.ru_stime) * 1e3, wall / 1e6)


def imports(script: str, image: str) -> dict[str, Any]:
    """What importing costs by ``-X importtime``, which itself slows imports down: only the order is to be trusted."""
    command = [sys.executable, "-X", "importtime", script, "run", image]
    done = subprocess.run(
        command, check=False, env=child_environment(), capture_output=True, text=True, timeout=30
    )
    rows = []
    for line in done.stderr.splitlines():
        head, _, rest = line.partition(":")
        own, _, tail = rest.partition("|")
        cumulative, _, name = tail.partition("|")
        if head == "import time" and own.strip().isdigit():
            rows.append((int(own), int(cumulative), name.strip()))
    by_own = sorted(rows, reverse=True)[:TOP]
    return {
        "modules": len(rows),
        "heavy_ones": sorted({name for _, _, name in rows} & HEAVY),
        "ms": round(sum(own for own, _, _ in rows) / 1e3, 1),
        "dearest_by_own_us": {name: own for own, _, name in by_own},
    }


def measure() -> dict[str, Any]:
    """Take turns: to the first exit, the whole script, an empty interpreter."""
    load_profile()
    script = os.path.join(os.path.dirname(sys.executable), "pyvmm")
    to_exit: list[Cost] = []
    program: list[Cost] = []
    empty: list[Cost] = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        image = os.path.join(folder, "end.bin")
        Path(image).write_bytes(GUEST)
        for number in range(-1, ROUNDS):
            costs = (
                first_exit(image),
                whole([sys.executable, script, "run", image], 1),
                whole([sys.executable, "-c", ""], 0),
            )
            if number >= 0:
                for series, cost in zip((to_exit, program, empty), costs, strict=True):
                    series.append(cost)
        imported = imports(script, image)
    cpu = figure([c.cpu for c in to_exit], "ms", 1)
    return document(
        what="CPU time of pyvmm run from the start of the process to the guest's first instruction",
        against="a Python interpreter that does nothing (whole process)",
        figures={
            "first_instruction_cpu": cpu,
            "first_instruction_wall": figure([c.wall for c in to_exit], "ms", 1),
            "whole_process_cpu": figure([c.cpu for c in program], "ms", 1),
            "whole_process_wall": figure([c.wall for c in program], "ms", 1),
            "empty_interpreter_cpu": figure([c.cpu for c in empty], "ms", 1),
            "imports": imported,
        },
        ratio=paired_ratio([c.cpu for c in to_exit], [c.cpu for c in empty]).median,
        target={"first_instruction_cpu_ms": verdict(cpu.median, TARGET_MS)},
    )


if __name__ == "__main__":
    main(measure)
