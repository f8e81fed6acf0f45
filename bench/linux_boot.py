"""The tiny Linux from the start of the process to ``/init`` and to a command's output, part by part.

``pyvmm linux --exec true --console`` is run as a user would, in turn with its root on a virtio disk (``--root disk``)
and unpacked into memory. Moments are taken from a trace of the run state and from
marker lines on the console, as they come out of pyvmm:

load     process start -> the vCPU runs: Python, the kernel and the initramfs copied into guest memory
kernel   -> /init's first line
init     -> the shell that runs the command: mounts, /dev, fork and exec
command  -> ``true`` has ended and its status is out: one more fork, two lines written
end      -> pyvmm has ended

``fast`` is the whole of ``pyvmm linux --fast --exec true`` with its snapshot there, ``guest`` the part of it in which
the vCPU runs.

Each part in wall-clock seconds and in CPU seconds of pyvmm (the vCPU's included). On a host with other work the
latter is the one to compare. Boots are repeated as long as they fit into the time a benchmark may take.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from figures import PYVMM, child_environment, document, figure, main, verdict

from pyvmm.errors import ConfigError, HostError
from pyvmm.machine.tiny_linux import find_initramfs, find_kernel

WHAT = "boot of the tiny Linux"
AGAINST = "the targets, in seconds of wall-clock time on a host that emulates CPL 0"
BUDGET = 110.0
ROUNDS = 3
ROOTS = {"disk": (12, 15), "initramfs": (20, 25)}
"""Where the root file system is -> targets to ``/init`` and to the output of a command."""
FAST_ROUNDS = 9
FAST_TARGET = 1.0
PARTS = ("load", "kernel", "init", "command", "end")
MARKERS = {b"pyvmm: init": "kernel", b"pyvmm: command begin 0": "init", b"pyvmm: command end 0": "command"}
"""What a line begins with -> the part that it ends."""


class Moment(NamedTuple):
    """Seconds since the process began: of the clock, and of pyvmm's CPU time (NaN: not known)."""

    wall: float
    cpu: float


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of ``pid``, which must not have been waited for: its CPUCLOCK_SCHED clock."""
    return time.clock_gettime((~pid << 3) | 2)


def boot(seconds: float, root: str) -> dict[str, Moment]:
    """One boot: part -> the moment at which it was over. Parts that were not over in ``seconds`` are missing."""
    moments: dict[str, Moment] = {}
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        trace = os.path.join(folder, "trace")
        command = [*PYVMM, "linux", "--exec", "true", "--console", "--root", root]
        command += ["--timeout", f"{seconds:.1f}", "--trace", f"run_state_change,file={trace}"]
        start = time.monotonic()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=child_environment()
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                for marker, part in MARKERS.items():
                    if line.startswith(marker) and part not in moments:
                        moments[part] = Moment(time.monotonic() - start, cpu_seconds(process.pid))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            end = Moment(time.monotonic() - start, usage.ru_utime + usage.ru_stime)
        if process.returncode not in (0, 124):
            raise HostError(f"pyvmm linux ended with status {process.returncode}")
        moments["load"] = Moment(running_since(trace) - start, float("nan"))
    if process.returncode == 0:
        moments["end"] = end
    return moments


def running_since(trace: str) -> float:
    """Monotonic time at which the run state first became running."""
    return run_states(trace)["running"]


def run_states(trace: str) -> dict[str, float]:
    """Monotonic time at which the run state first became what it became."""
    states: dict[str, float] = {}
    for line in Path(trace).read_text(encoding="utf-8").splitlines():
        stamp, _, _, name, text = line.split("\t", 4)
        if name == "run_state_change":
            states.setdefault(text.rpartition("-> ")[2], int(stamp) / 1e9)
    if "running" not in states:
        raise HostError("pyvmm linux ended before its guest ran")
    return states


def fast_start() -> tuple[float, float]:
    """Seconds of one ``--fast``: from process start to its end, and of these in which the guest ran."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        trace = os.path.join(folder, "trace")
        command = [*PYVMM, "linux", "--fast", "--exec", "true", "--trace", f"run_state_change,file={trace}"]
        start = time.monotonic()
        status = subprocess.run(command, stdin=subprocess.DEVNULL, env=child_environment(), check=False).returncode
        whole = time.monotonic() - start
        if status:
            raise HostError(f"pyvmm linux --fast ended with status {status}")
        states = run_states(trace)
        return whole, states["shutdown"] - states["running"]


def measure() -> dict[str, Any]:
    """Boot as often as there is time for."""
    try:
        kernel, initramfs = os.path.realpath(find_kernel(None)), find_initramfs(None)
    except ConfigError as error:
        return document(what=WHAT, against=AGAINST, skipped=str(error))
    start = time.monotonic()
    boots: dict[str, list[dict[str, Moment]]] = {root: [] for root in ROOTS}
    longest = 0.0
    for root in [root for _ in range(ROUNDS) for root in ROOTS]:
        left = BUDGET - (time.monotonic() - start)
        if left < longest * 1.1:
            break
        before = time.monotonic()
        boots[root].append(boot(left, root))
        longest = max(longest, time.monotonic() - before)
    figures: dict[str, Any] = {}
    target, ratio = {}, {}
    for root, most in ROOTS.items():
        figures[root] = summary(boots[root])
        for name, limit in zip(("to_init", "to_command_output"), most, strict=True):
            found = figures[root][name]
            label = f"{root}.{name}"
            target[label] = verdict(found["wall"].median, limit) if found else {"value": None, "target_at_most": limit}
            ratio[label] = round(found["wall"].median / limit, 3) if found else None
    starts = [fast_start() for _ in range(1 + FAST_ROUNDS)][1:]  # the first one may boot
    figures["fast"] = {"whole": figure([w for w, _ in starts], "s"), "guest": figure([g for _, g in starts], "s")}
    target["fast.whole"] = verdict(figures["fast"]["whole"].median, FAST_TARGET)
    ratio["fast.whole"] = round(figures["fast"]["whole"].median / FAST_TARGET, 3)
    return document(
        what=WHAT,
        against=AGAINST,
        images={"kernel": kernel, "initramfs": initramfs, "initramfs_bytes": os.path.getsize(initramfs)},
        figures=figures,
        ratio=ratio,
        target=target,
    )


def summary(boots: list[dict[str, Moment]]) -> dict[str, Any]:
    """Figures of boots of one kind."""
    figures: dict[str, Any] = {"to_init": None, "to_command_output": None}
    for name, part in (("to_init", "kernel"), ("to_command_output", "command")):
        reached = [b[part] for b in boots if part in b]
        if reached:
            figures[name] = {
                "wall": figure([m.wall for m in reached], "s"),
                "cpu": figure([m.cpu for m in reached], "s"),
            }
    whole = [b for b in boots if "end" in b]
    if whole:
        figures["parts_wall"] = {
            part: figure([b[part].wall - (b[before].wall if before else 0.0) for b in whole], "s")
            for before, part in zip((None, *PARTS), PARTS, strict=False)
        }
    figures["boots"] = {"complete": len(whole), "not_complete": len(boots) - len(whole)}
    return figures


if __name__ == "__main__":
    main(measure)
