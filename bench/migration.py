"""Live migration of the same bare-metal dirtier under pyvmm and under QEMU's microvm, taking turns.

Both sides of each are on this machine, over a unix socket. Three figures:

- ``total``: from the command to the migration's end, as the source says by query-migrate.
- ``downtime``: for how long no vCPU ran, the same for both: from the time stamp of the source's STOP event, sent when
  its vCPUs have stopped, to that of the destination's RESUME event, sent when they are let run. The target is for this.
- ``reported``: what the source says by query-migrate. Not alike: QEMU's ends when the source has sent everything, and
  is in whole milliseconds; pyvmm's ends when the destination has said that its guest runs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import REPOSITORY, document, figure, main, paired_ratio, verdict

from pyvmm.errors import HostError

ROUNDS = 5
PAGES = (0, 1000, 4000)
MEMORY = 64
DIRTIER = REPOSITORY / "guests" / "dirtier" / "dirtier.elf"
DEADLINE = 40.0
TARGETS = {"downtime": 0.5, "total": 1.5}


class Monitor:
    """A QMP connection, the same for both."""

    def __init__(self, path: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + DEADLINE
        self.kill = process.kill
        self._link = socket.socket(socket.AF_UNIX)
        self._link.settimeout(DEADLINE)
        while self._link.connect_ex(path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise HostError(f"not measured: {process.args!r} does not start")
            time.sleep(0.01)
        self._file = self._link.makefile("rb")
        self._events: dict[str, float] = {}
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, name: str, **arguments: Any) -> Any:
        """The answer; HostError if it is an error."""
        self._link.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while "return" not in (answer := self._read(name)):
            pass
        return answer["return"]

    def event(self, name: str) -> float:
        """When the last event ``name`` was: milliseconds of the host's clock. Waits for the first one."""
        while name not in self._events:
            self._read(name)
        return self._events[name]

    def _read(self, what: str) -> Any:
        message = json.loads(self._file.readline() or b'{"error": "hung up"}')
        if "error" in message:
            raise HostError(f"not measured: {what}: {message['error']}")
        if "event" in message:
            stamp = message["timestamp"]
            self._events[message["event"]] = stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3
        return message

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._link.close()


def command(vmm: str, folder: str, side: str, words: str) -> list[str]:
    """The command line of one process of ``vmm``; the destination has ``--incoming``."""
    qmp, serial = f"unix:{folder}/{side}.qmp", f"file:{folder}/{side}.log"
    if vmm == "pyvmm":
        program = str(Path(sys.executable).with_name("pyvmm"))
        made = [program, "run", str(DIRTIER), "-m", f"{MEMORY}M", "--append", words, "--qmp", qmp, "--no-control",
                "--serial", serial]  # fmt: skip
        return [*made, "--incoming", f"unix:{folder}/m"] if side == "to" else made
    made = ["qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-m", f"{MEMORY}M", "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-serial", serial, "-qmp",
            f"{qmp},server=on,wait=off", "-kernel", str(DIRTIER), "-append", words]  # fmt: skip
    return [*made, "-incoming", f"unix:{folder}/m"] if side == "to" else made


@contextlib.contextmanager
def process(vmm: str, folder: str, side: str, words: str) -> Iterator[Monitor]:
    """One side, and its monitor."""
    with open(f"{folder}/{side}.err", "wb") as errors:
        argv = command(vmm, folder, side, words)
        made = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
    try:
        monitor = Monitor(f"{folder}/{side}.qmp", made)
        try:
            yield monitor
        finally:
            monitor.close()
    finally:
        made.kill()
        made.wait()


def one(vmm: str, pages: int) -> tuple[float, float, float]:
    """Milliseconds: (total, downtime, reported) of one migration of a guest that is at its work."""
    words = f"pages={max(pages, 1)} period={100 if pages else 10000} rounds=0"
    with (
        tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder,
        process(vmm, folder, "to", words) as to,
        process(vmm, folder, "from", words) as source,
    ):
        wait_for(Path(folder, "from.log"), b"round 3:" if pages else b"round 1:")
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 300})
        source.execute("migrate", uri=f"unix:{folder}/m")
        deadline = time.monotonic() + DEADLINE
        while (info := source.execute("query-migrate")).get("status") != "completed":
            if info.get("status") == "failed" or time.monotonic() > deadline:
                raise HostError(f"not measured: {vmm}: {info}")
            time.sleep(0.005)
        while not to.execute("query-status")["running"]:
            time.sleep(0.005)
        return info["total-time"], to.event("RESUME") - source.event("STOP"), info["downtime"]


def wait_for(log: Path, text: bytes) -> None:
    """Until the guest has written ``text``."""
    deadline = time.monotonic() + DEADLINE
    while not log.exists() or text not in log.read_bytes():
        if time.monotonic() > deadline:
            raise HostError(f"not measured: the guest did not come to {text!r}")
        time.sleep(0.02)


def measure() -> dict[str, Any]:
    """All rates."""
    if shutil.which("qemu-system-x86_64") is None:
        raise HostError("not measured: qemu-system-x86_64 is not installed (make packages)")
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for pages in PAGES:
        turns = [(one("pyvmm", pages), one("qemu", pages)) for _ in range(ROUNDS)]
        for index, name in enumerate(("total", "downtime", "reported")):
            ours = [float(turn[0][index]) for turn in turns]
            theirs = [float(max(turn[1][index], 0.5)) for turn in turns]  # 0 is less than 1
            key = f"{name}_{pages}"
            ratio = paired_ratio(ours, theirs)
            figures[key] = {"pyvmm": figure(ours, "ms"), "qemu": figure(theirs, "ms"), "ratio": ratio}
            if name in TARGETS:
                ratios[key] = ratio.median
    return document(
        what=f"live migration of guests/dirtier with {MEMORY} MiB, so many pages each 100 ms, over a unix socket",
        against="qemu-system-x86_64 -accel kvm -M microvm, the same guest and limits",
        figures=figures,
        ratio=ratios,
        target={key: verdict(ratios[key], TARGETS[key.partition("_")[0]]) for key in ratios},
    )


if __name__ == "__main__":
    main(measure)
