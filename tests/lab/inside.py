"""What a lab runs: ``python -m tests.lab.inside SECONDS RESULTS NUMBER LABS``, on the emulated kvm_amd host.

It takes the files whose turn it is as lab NUMBER of LABS. Leaves in RESULTS: doctor.json, what ``pyvmm doctor`` says
of that host; junit.xml, the outcome of the tests marked ``lab``; lab.json, the times. A run that takes longer than
SECONDS is interrupted, and says so: pytest writes what it has, the tests that did not run are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.lab.selection import FOLDERS, TESTS, is_in_lab, test_functions

LONG_FILES = {
    "colo/test_pair.py": 73, "guest/test_guests.py": 69, "guest/test_kut.py": 51, "linux/test_moved_linux.py": 37,
    "kvm/test_virtio_blk.py": 38, "linux/test_linux.py": 31, "linux/test_web_server.py": 30,
    "kvm/test_dirty_tracking.py": 25, "stock/test_stock_kernel.py": 18,
    "linux/test_virtio_ports.py": 18, "kvm/test_dirty_cost.py": 15, "kvm/test_replica_memory.py": 13,
    "kvm/test_machine_failures.py": 13,
}  # fmt: skip
"""Seconds that they took there once. They only matter to one another: no lab is to wait for the other."""
ANY_FILE = 3
WRITING = 20.0
"""Seconds an interrupted pytest has for its report."""


def files_of(number: int, labs: int) -> list[str]:
    """The files with tests for the lab, in the order of FOLDERS, dealt to ``labs`` labs so that all take about the same
    time: those of one.
    """
    wanted = list(dict.fromkeys(file for file, test in test_functions(FOLDERS) if is_in_lab(file, test)))
    dealt: list[list[str]] = [[] for _ in range(labs)]
    for file in sorted(wanted, key=lambda file: -LONG_FILES.get(file, ANY_FILE)):
        min(dealt, key=lambda files: sum(LONG_FILES.get(each, ANY_FILE) for each in files)).append(file)
    return [str(TESTS / file) for file in wanted if file in dealt[number]]


def run_tests(files: list[str], seconds: float, results: Path) -> int:
    """pytest's status; it gets SIGINT when its time is over, SIGKILL if that does not help."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "lab", "-p", "no:cacheprovider", "--durations=15"]
    command += ["-p", "tests.lab.live_failures", "--capture=fd", "--tb=short"]
    command += ["--basetemp=/tmp/pytest", f"--junit-xml={results}/junit.xml", *files]
    running = subprocess.Popen(command, start_new_session=True)
    try:
        return running.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(WRITING)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait(10)
        return 124


def main() -> int:
    """Doctor, then the tests; their status."""
    seconds, results = float(sys.argv[1]), Path(sys.argv[2])
    files = files_of(int(sys.argv[3]), int(sys.argv[4]))
    began = time.monotonic()
    pyvmm = Path(sys.executable).with_name("pyvmm")
    with (results / "doctor.json").open("wb") as out:
        doctor = subprocess.run([str(pyvmm), "doctor", "--json"], stdout=out, timeout=120, check=False).returncode
    times = {"doctor": time.monotonic() - began}
    status = run_tests(files, seconds - times["doctor"], results)
    times["all"] = time.monotonic() - began
    (results / "lab.json").write_text(json.dumps({"seconds": times, "status": {"doctor": doctor, "tests": status}}))
    return status


if __name__ == "__main__":
    sys.exit(main())
