"""A VMM's process under measurement, pyvmm's or QEMU's, and its monitor: both speak QMP, so both are used alike.

A process that dies is never mistaken for a slow one: whoever waits for it fails, with its status and what it wrote to
stderr. None outlives the benchmark, whatever ends that: the block, an error, SIGTERM, Ctrl-C, or SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from figures import REPOSITORY

from pyvmm.errors import HostError

DIRTIER = REPOSITORY / "guests" / "dirtier" / "dirtier.elf"
DEADLINE = 40.0
QUOTED = 1000
"""Characters of what a dead process wrote last."""


def end_on_signals() -> None:
    """SIGTERM and Ctrl-C end this process as ``sys.exit`` does: what was started is ended first."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)


class Vmm:
    """``argv`` running, ``name`` in what is said of it, ``errors`` its stderr; see :func:`running`."""

    def __init__(self, name: str, argv: Sequence[str], errors: Path) -> None:
        self.name = name
        self._errors = errors
        # setpriv: it dies with this process; a session of its own: Ctrl-C is for this process to act upon.
        with errors.open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self.kill = self._process.kill

    def stop(self) -> None:
        """As if its machine hung: its connections stay, nothing comes over them."""
        self._process.send_signal(signal.SIGSTOP)

    def check(self) -> None:
        """HostError if it has died."""
        if self._process.poll() is not None:
            said = self._errors.read_text(errors="replace").strip()[-QUOTED:]
            raise HostError(f"not measured: {self.name} ended with status {self._process.returncode}: {said!r}")

    def expire(self, seconds: float) -> None:
        """It is dying, it seems: give it that long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def end(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.wait()


class Monitor:
    """A QMP connection to ``vmm`` at the unix socket ``path``."""

    def __init__(self, vmm: Vmm, path: str) -> None:
        self.vmm = vmm
        self.seen: list[tuple[str, float]] = []
        """All events, in order: name, milliseconds of the host's clock, as the VMM stamped it."""
        deadline = time.monotonic() + DEADLINE
        self._link = socket.socket(socket.AF_UNIX)
        self._link.settimeout(DEADLINE)
        try:
            while self._link.connect_ex(path):
                vmm.check()
                if time.monotonic() > deadline:
                    raise HostError(f"not measured: {vmm.name} does not answer at its monitor")
                time.sleep(0.01)
            self._file = self._link.makefile("rb")
            self._read("its greeting")
            self.execute("qmp_capabilities")
        except BaseException:
            self._link.close()
            raise

    def execute(self, name: str, **arguments: Any) -> Any:
        """The answer; HostError if it is an error."""
        try:
            self._link.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            self._fail(name, str(error))
        while "return" not in (answer := self._read(name)):
            pass
        return answer["return"]

    def event(self, name: str) -> float:
        """When the last event ``name`` was: milliseconds of the host's clock. Waits for the first one."""
        while not (times := [at for seen, at in self.seen if seen == name]):
            self._read(f"the event {name}")
        return times[-1]

    def next_event(self) -> None:
        """Wait until there is one more."""
        self._read("an event")

    def poll(self) -> None:
        """Take what has come, of a process that may be dead."""
        with contextlib.suppress(HostError):
            while select.select([self._link], [], [], 0)[0]:
                self._read("events")

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._link.close()

    def _read(self, what: str) -> Any:
        try:
            line = self._file.readline()
        except OSError as error:  # TimeoutError among them
            self._fail(what, str(error))
        if not line:
            self.vmm.expire(2)
            self._fail(what, "it hung up")
        message = json.loads(line)
        if "error" in message:
            self._fail(what, message["error"])
        if "event" in message:
            stamp = message["timestamp"]
            self.seen.append((message["event"], stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3))
        return message

    def _fail(self, what: str, why: str) -> NoReturn:
        self.vmm.check()
        raise HostError(f"not measured: {self.vmm.name} was asked for {what}: {why}")


def command(vmm: str, folder: str, side: str, words: str, memory: int) -> list[str]:
    """The command line of one process of ``vmm``, ``pyvmm`` or ``qemu``, with the dirtier in ``memory`` MiB, told
    ``words``; the side ``to`` waits for a migration at ``FOLDER/m``.
    """
    qmp, serial = f"unix:{folder}/{side}.qmp", f"file:{folder}/{side}.log"
    if vmm == "pyvmm":
        program = str(Path(sys.executable).with_name("pyvmm"))
        made = [program, "run", str(DIRTIER), "-m", f"{memory}M", "--append", words, "--qmp", qmp, "--no-control",
                "--serial", serial]  # fmt: skip
        return [*made, "--incoming", f"unix:{folder}/m"] if side == "to" else made
    made = ["qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-m", f"{memory}M", "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-serial", serial, "-qmp",
            f"{qmp},server=on,wait=off", "-kernel", str(DIRTIER), "-append", words]  # fmt: skip
    return [*made, "-incoming", f"unix:{folder}/m"] if side == "to" else made


@contextlib.contextmanager
def running(name: str, argv: Sequence[str], folder: str, side: str) -> Iterator[Monitor]:
    """One side, and its monitor; its stderr is ``FOLDER/SIDE.err``."""
    vmm = Vmm(name, argv, Path(folder, f"{side}.err"))
    try:
        monitor = Monitor(vmm, f"{folder}/{side}.qmp")
        try:
            yield monitor
        finally:
            monitor.close()
    finally:
        vmm.end()


def wait_for(vmm: Vmm, log: Path, text: bytes) -> None:
    """Until the guest has written ``text``."""
    deadline = time.monotonic() + DEADLINE
    while not log.exists() or text not in log.read_bytes():
        vmm.check()
        if time.monotonic() > deadline:
            raise HostError(f"not measured: the guest of {vmm.name} did not come to {text!r}")
        time.sleep(0.02)


def watch(seconds: float, *vmms: Vmm) -> None:
    """Let time pass. HostError if one of ``vmms`` dies meanwhile."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        for vmm in vmms:
            vmm.check()
        time.sleep(min(0.1, left))
    for vmm in vmms:
        vmm.check()
