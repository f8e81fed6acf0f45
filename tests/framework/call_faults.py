"""Run one side of a migration or of a pair, and do something to it at its n-th call on a certain descriptor.

::

    python -m tests.framework.call_faults LOG PATH [FAULT] -- PROGRAM ARGUMENT...

PATH is the unix socket that the destination, or secondary, listens at. The first connection there is the *line* (the
migration's, and then the replication's), the second the *beat* (the heartbeat's), one more is the *third* (the disks',
of a guest without cards). *kvm* is every ioctl on KVM's descriptors but KVM_RUN, *disk* what writes or syncs a file
with ``.img`` in its name, *arbiter* what syncs, renames or locks another one. Calls are numbered from 1 for each of
them, in two phases: *move* from the first call on the line, *pair* from the first on the beat. LOG gets a line
``PHASE.LABEL N CALL`` for each; a fault adds ``! WHAT``.

FAULT is ``PHASE.LABEL:N:WHAT``. WHAT is ``kill`` (SIGKILL before the call), ``after`` (behind it), ``short`` (a
transfer of one byte), ``freeze=SECONDS`` (all threads stand still for so long, as after SIGSTOP, and go on, as after
SIGCONT), or an errno's name: the call is not made and fails so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.framework.traced import IOCTL, Traced, end_as_it_did

CALLS = {
    18: "pwrite64", 42: "connect", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 48: "shutdown",
    73: "flock", 74: "fsync", 75: "fdatasync", 82: "rename", 288: "accept4", 328: "pwritev2",
}  # fmt: skip
"""x86-64's."""
_TRANSFERS = {44, 45}
_STORING = {73, 74, 82}
_WRITING = {18, 74, 75, 328}
_CONNECTIONS = ("line", "beat", "third")
_PIDFD_OPEN, _PIDFD_GETFD, _TGKILL = 434, 438, 234


@dataclass(frozen=True)
class Fault:
    """See above. ``place`` is ``PHASE.LABEL``."""

    place: str
    number: int
    what: str

    def __str__(self) -> str:
        return f"{self.place}:{self.number}:{self.what}"

    @staticmethod
    def parse(text: str) -> Fault:
        place, number, what = text.split(":")
        return Fault(place, int(number), what)


@dataclass(frozen=True)
class Under:
    """A program that ``fault`` comes to; where it writes its log, and the socket it is about."""

    log: Path
    path: Path
    fault: Fault | None

    def command(self, *words: str) -> list[str]:
        """For processes.Running."""
        told = [] if self.fault is None else [str(self.fault)]
        return [sys.executable, "-m", "tests.framework.call_faults", str(self.log), str(self.path), *told, "--", *words]


class CallTracer(Traced):
    """Counts, and carries the fault out."""

    def __init__(self, log: Path, path: str, fault: Fault | None, program: list[str]) -> None:
        self._log = log.open("a", buffering=1)
        self._path = path
        self._fault = fault
        self._phase = ""
        self._counts: Counter[str] = Counter()
        self._sockets: dict[str, str] = {}
        self._leaving: int | None = None
        self._frozen: set[int] | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        super().__init__(program, CALLS, kvm=True)

    def called(self, thread: int, registers: Any) -> None:
        label = self._label(thread, registers)
        if label == "line":
            self._phase = self._phase or "move"
        elif label == "beat" and self._phase == "move":
            self._phase = "pair"
        if not label or not self._phase:
            self.go_on(thread)
            return
        place = f"{self._phase}.{label}"
        self._counts[place] += 1
        what = ""
        fault = self._fault
        if fault is not None and fault.place == place and fault.number == self._counts[place]:
            what = fault.what
        call = CALLS.get(registers.orig_rax) or f"ioctl {registers.rsi & 0xFFFFFFFF:#x}"
        self._log.write(f"{place} {self._counts[place]} {call}{' ! ' + what if what else ''}\n")
        if what:
            self._carry_out(thread, registers, what)
        else:
            self.go_on(thread)

    def signalled(self, thread: int, number: int) -> None:
        if thread == self._leaving and number == signal.SIGTRAP:
            os.kill(self.pid, signal.SIGKILL)
        elif self._frozen is not None and number == signal.SIGSTOP:
            self._frozen.add(thread)
        else:
            super().signalled(thread, number)

    def _carry_out(self, thread: int, registers: Any, what: str) -> None:
        if what == "kill":
            os.kill(self.pid, signal.SIGKILL)
            return
        if what == "after":
            self._leaving = thread
            self.go_on_to_its_end(thread)
            return
        if what.startswith("freeze="):
            self._freeze(thread, float(what.partition("=")[2]))
            return
        if what != "short":
            self.fail(thread, registers, getattr(errno, what))
        elif registers.orig_rax in _TRANSFERS:
            registers.rdx = min(registers.rdx, 1)
            self.change(thread, registers)
        self.go_on(thread)

    def _freeze(self, thread: int, seconds: float) -> None:
        self._frozen = {thread}
        for other in os.listdir(f"/proc/{self.pid}/task"):
            # KVM's own worker threads live here, too, untraced: a SIGSTOP to one would stop the whole process for good.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                traced = f"TracerPid:\t{os.getpid()}\n" in Path(f"/proc/{self.pid}/task/{other}/status").read_text()
                if int(other) != thread and traced:
                    self._libc.syscall(_TGKILL, self.pid, int(other), signal.SIGSTOP)
        signal.signal(signal.SIGALRM, lambda _number, _frame: self._thaw())
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _thaw(self) -> None:
        from ptrace.error import PtraceError

        frozen, self._frozen = self._frozen or set(), None
        for thread in frozen:
            with contextlib.suppress(PtraceError):
                self.go_on(thread)

    def _label(self, thread: int, registers: Any) -> str:
        try:
            target = os.readlink(f"/proc/{thread}/fd/{registers.rdi}")
        except OSError:  # another thread has closed it; or this is no descriptor (rename)
            target = ""
        if registers.orig_rax in _WRITING and ".img" in target:
            return "disk"
        if registers.orig_rax in _STORING:
            return "arbiter"
        if registers.orig_rax == IOCTL:
            return "kvm"
        if target not in self._sockets and target.startswith("socket:"):
            kind = self._classify(registers.rdi)
            if kind is None:
                return ""  # not connected yet
            self._sockets[target] = kind
        return self._sockets.get(target, "")

    def _classify(self, fd: int) -> str | None:
        """By the path at either end of it."""
        pidfd = self._libc.syscall(_PIDFD_OPEN, self.pid, 0)
        copy = self._libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
        os.close(pidfd)
        if copy < 0:
            return ""
        with socket.socket(fileno=copy) as sock:
            try:
                ends = [sock.getpeername(), sock.getsockname()]
            except OSError:
                return None
        if self._path not in ends:
            return ""
        known = sum(bool(label) for label in self._sockets.values())
        return _CONNECTIONS[min(known, len(_CONNECTIONS) - 1)]


def main(arguments: list[str]) -> int:
    """The command above."""
    at = arguments.index("--")
    faults = [Fault.parse(text) for text in arguments[2:at]]
    tracer = CallTracer(Path(arguments[0]), arguments[1], faults[0] if faults else None, arguments[at + 1 :])
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, _frame: os.kill(tracer.pid, number))
    return end_as_it_did(tracer.serve())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
