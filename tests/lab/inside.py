"""What the lab runs: ``python -m tests.lab.inside SECONDS RESULTS``, on the emulated kvm_amd host.

Leaves in RESULTS: doctor.json, what ``pyvmm doctor`` says of that host; junit-*.xml, the outcome of the tests marked
``lab``; lab.json, the times. A run that takes longer than SECONDS is interrupted, and says so: pytest writes what it
has, the tests that did not run are missing.
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

WRITING = 20.0
"""Seconds an interrupted pytest has for its report."""


def shards(cpus: int) -> list[list[str]]:
    """The files with tests for the lab, in the order of FOLDERS, dealt to one pytest for each CPU."""
    wanted = dict.fromkeys(file for file, test in test_functions(FOLDERS) if is_in_lab(file, test))
    files = [str(TESTS / file) for file in wanted]
    return [files[number::cpus] for number in range(cpus)]


def run_tests(seconds: float, results: Path) -> int:
    """The worst status of the pytests. They get SIGINT when their time is over, SIGKILL if that does not help."""
    deadline = time.monotonic() + seconds
    running = []
    for number, files in enumerate(shards(len(os.sched_getaffinity(0)))):
        command = [sys.executable, "-m", "pytest", "-v", "-m", "lab", "-p", "no:cacheprovider", "--durations=15"]
        command += ["-p", "tests.lab.live_failures", "--capture=fd", "--tb=short"]
        command += [f"--basetemp=/tmp/pytest-{number}", f"--junit-xml={results}/junit-{number}.xml", *files]
        running.append(subprocess.Popen(command, start_new_session=True))
    worst = 0
    for process in running:
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(WRITING)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
            status = 124
        worst = max(worst, status)
    return worst


def main() -> int:
    """Doctor, then the tests; their status."""
    seconds, results = float(sys.argv[1]), Path(sys.argv[2])
    began = time.monotonic()
    pyvmm = Path(sys.executable).with_name("pyvmm")
    with (results / "doctor.json").open("wb") as out:
        doctor = subprocess.run([str(pyvmm), "doctor", "--json"], stdout=out, timeout=120, check=False).returncode
    times = {"doctor": time.monotonic() - began}
    status = run_tests(seconds - times["doctor"], results)
    times["all"] = time.monotonic() - began
    (results / "lab.json").write_text(json.dumps({"seconds": times, "status": {"doctor": doctor, "tests": status}}))
    return status


if __name__ == "__main__":
    sys.exit(main())
