"""What it costs to save a machine and to start from a snapshot.

``save_state``: all state but RAM of a paused machine of one vCPU with the entropy device, to bytes. ``save``: a
snapshot of a guest of 128 MiB that has written 64 MiB, fsync included; beside it cp of the same file, and fsync.
``load``: the same snapshot in a fresh process, from its start to the guest's first exit; and the part of it that is
loading (``load_in_process``), as QMP's snapshot-load needs it.
``..._differential``: the same for every second page of the 64 MiB, above a base: more pieces than are kept apart.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import child_environment, document, figure, main, paired_ratio, verdict

from pyvmm.host.profile import load_profile
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import RngConfig
from pyvmm.machine.machine import Machine
from pyvmm.migration.machine_state import save_machine
from pyvmm.migration.sections import encode_sections
from pyvmm.migration.snapshot import load_snapshot, save_snapshot

ROUNDS = 7
MEMORY = 128 << 20
WRITTEN = 64 << 20
STATE_TARGET_MS, SAVE_TARGET, COLD_TARGET_MS, LOAD_TARGET_MS = 1.0, 2.0, 400.0, 50.0
GUEST = b"\xe6\xf4\xeb\xfc"  # 1: out 0xf4, al; jmp 1b

TO_FIRST_EXIT = """
import os, sys, time
from pyvmm.devices.debug_exit import DebugExit
def write(self, offset, size, value):
    os.write(1, b"%d" % time.monotonic_ns())
    os._exit(0)
DebugExit.write = write
from pyvmm.cli import main
main()
"""


def milliseconds(began: int) -> float:
    return (time.monotonic_ns() - began) / 1e6


def saved_state(machine: Machine) -> float:
    began = time.monotonic_ns()
    encode_sections(save_machine(machine))
    return milliseconds(began)


def saved_snapshot(machine: Machine, path: str, base: str | None = None) -> float:
    began = time.monotonic_ns()
    save_snapshot(machine, path, base=base)
    return milliseconds(began)


def copied(path: str) -> float:
    began = time.monotonic_ns()
    subprocess.run(["cp", path, path + ".copy"], check=True)
    fd = os.open(path + ".copy", os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    took = milliseconds(began)
    os.unlink(path + ".copy")
    return took


def cold_start(path: str) -> float:
    began = time.monotonic_ns()
    command = [sys.executable, "-c", TO_FIRST_EXIT, "snapshot", "load", path, "--no-control", "--serial", "null"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, env=child_environment())
    return (int(done.stdout) - began) / 1e6


def loaded(path: str) -> float:
    began = time.monotonic_ns()
    machine = load_snapshot(path)
    took = milliseconds(began)
    machine.close()
    return took


def measure() -> dict[str, Any]:
    install_kick_signal()
    quirks = frozenset(load_profile().quirks)
    with tempfile.TemporaryDirectory(prefix="pyvmm-state-", dir=".") as folder:
        image, path = Path(folder) / "guest.bin", str(Path(folder).resolve() / "bench.pvsnap")
        image.write_bytes(GUEST.ljust(512, b"\0"))
        config = MachineConfig(image=str(image), memory=MEMORY, serial="null", devices=(RngConfig(),))
        with build_machine(config, quirks) as machine:
            for at in range(1 << 20, (1 << 20) + WRITTEN, 1 << 20):
                machine.memory.write(at, os.urandom(1 << 20))
            states = [saved_state(machine) for _ in range(ROUNDS * 20)]
            base = str(Path(path).with_name("base.pvsnap"))
            above = str(Path(path).with_name("above.pvsnap"))
            saved_snapshot(machine, base)
            for at in range(1 << 20, (1 << 20) + WRITTEN, 8192):
                machine.memory.write(at, b"another")
            differential = [saved_snapshot(machine, above, base) for _ in range(ROUNDS)]
            turns = [(saved_snapshot(machine, path), copied(path)) for _ in range(ROUNDS)]
        cold_start(path)
        colds = [cold_start(path) for _ in range(ROUNDS)]
        warm = [loaded(path) for _ in range(ROUNDS)]
        cold_above = [cold_start(above) for _ in range(ROUNDS)]
        warm_above = [loaded(above) for _ in range(ROUNDS)]
    saves, copies = [save for save, _ in turns], [copy for _, copy in turns]
    return document(
        what="saving a machine and starting from a snapshot",
        against="cp of the snapshot's file, and fsync",
        figures={
            "save_state": figure(states, "ms"),
            "save": figure(saves, "ms"),
            "copy": figure(copies, "ms"),
            "load_cold": figure(colds, "ms"),
            "load_in_process": figure(warm, "ms"),
            "save_differential": figure(differential, "ms"),
            "load_differential_cold": figure(cold_above, "ms"),
            "load_differential_in_process": figure(warm_above, "ms"),
        },
        ratio=paired_ratio(saves, copies),
        target={
            "save_state": verdict(statistics.median(states), STATE_TARGET_MS),
            "save": verdict(paired_ratio(saves, copies).median, SAVE_TARGET),
            "load_cold": verdict(statistics.median(colds), COLD_TARGET_MS),
            "load_in_process": verdict(statistics.median(warm), LOAD_TARGET_MS),
            "load_differential_cold": verdict(statistics.median(cold_above), COLD_TARGET_MS),
            "load_differential_in_process": verdict(statistics.median(warm_above), LOAD_TARGET_MS),
        },
    )


if __name__ == "__main__":
    main(measure)
