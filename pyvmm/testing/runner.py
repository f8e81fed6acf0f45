"""Running a test image: a process of ``pyvmm run``, its output, its report, one verdict.

A process for each, so that an image that brings pyvmm down brings down its own only. Each has a deadline in itself
(``--timeout``), so none outlives its runner for long, whatever happens to that.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pyvmm.testing.result import Result, judge

OUTPUT_MAX = 4 << 20
GRACE = 30.0
"""Seconds beyond its own timeout after which a ``pyvmm run`` that did not end is killed."""


class Job(NamedTuple):
    """An image and the further arguments of ``pyvmm run``. ``skip``: why it is not to be run at all."""

    name: str
    image: str
    options: tuple[str, ...] = ()
    timeout: float = 90.0
    skip: str = ""
    notes: tuple[str, ...] = ()


class Runner:
    """Runs jobs, several at once; :meth:`stop` ends those that run, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run_all(self, jobs: Sequence[Job], at_once: int) -> Iterator[Result]:
        """The results in the order of ``jobs``, each as soon as it is there."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max(1, at_once), "test-image") as pool:
            futures = [pool.submit(self.run_one, job) for job in jobs]
            try:
                for future in futures:
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
                self.stop()

    def run_one(self, job: Job) -> Result:
        """Run it to its end."""
        if job.skip:
            return Result(job.name, "skip", job.skip, notes=job.notes)
        with tempfile.TemporaryDirectory(prefix="pyvmm-test-") as folder:
            report = os.path.join(folder, "report.json")
            command = [sys.executable, "-m", "pyvmm", "run", job.image, "--serial", "stdio", "--no-reboot"]
            command += ["--debug-exit", "0xf4,4", "--timeout", f"{job.timeout:g}", "--report", report, *job.options]
            started = time.monotonic()
            output, error, killed = self._communicate(command, job.timeout + GRACE)
            seconds = time.monotonic() - started
            said = _read_report(report)
        if said is not None and said.get("kind") == "refused":  # a report without a run: it has no more to say
            result = Result(job.name, "refused", str(said.get("reason", "")), seconds)
        elif said is not None:
            result = judge(job.name, said["kind"], said["guest_value"], said["reason"], output, seconds)
        elif killed:
            result = judge(job.name, "timeout", None, "pyvmm did not end in time and was killed", output, seconds)
        else:
            why = error.decode(errors="replace").strip().splitlines()
            result = Result(job.name, "refused", why[-1] if why else "pyvmm ended and said nothing", seconds)
        return result._replace(notes=job.notes)

    def stop(self) -> None:
        """Kill what runs; nothing starts any more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _communicate(self, command: list[str], seconds: float) -> tuple[bytes, bytes, bool]:
        """(output, up to OUTPUT_MAX; standard error; whether it was killed)."""
        with self._lock:
            if self._stopped:
                return b"", b"stopped", True
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
            self._running.add(process)
        pieces: dict[str, list[bytes]] = {"out": [], "err": []}

        def collect(name: str, stream: int) -> None:
            left = OUTPUT_MAX
            with contextlib.suppress(OSError):
                while data := os.read(stream, 65536):  # what is too much is read all the same, or the guest would wait
                    pieces[name].append(data[:left])
                    left -= min(left, len(data))

        assert process.stdout is not None and process.stderr is not None
        readers = [
            threading.Thread(target=collect, args=("out", process.stdout.fileno()), name="test-output"),
            threading.Thread(target=collect, args=("err", process.stderr.fileno()), name="test-errors"),
        ]
        for reader in readers:
            reader.start()
        killed = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            with self._lock:
                self._running.discard(process)
            if process.poll() is None:
                process.kill()
            process.wait()
            for reader in readers:
                reader.join()
            process.stdout.close()
            process.stderr.close()
        return b"".join(pieces["out"]), b"".join(pieces["err"]), killed


def _read_report(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            said = json.load(file)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
