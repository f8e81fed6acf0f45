"""Run a program whose system calls on one file fail or hang: ``python -m tests.framework.syscall_faults``.

::

    ... LOG RULE... -- PROGRAM ARGUMENT...         RULE is CALL:FILE:WHAT[:SKIP[:TIMES]]

FILE is the end of a path; ``port=N``, a TCP connection from or to that port; or ``size=N,port=N``, only those calls of
it that are about so many bytes, ``size!N`` only others.

WHAT is an errno's name: the call is not made and fails so; ``hang``: the thread stands still in it until this process
gets SIGUSR1; ``kill``: the program is killed before the call, ``kill-after``: behind it; ``short``: the call is made
for half as many bytes; ``stop``: for STOP seconds neither this nor any other call of a rule's kind goes on, in no
thread; ``count``: only the log hears of it (FILE in place of WHAT). The first SKIP (0) calls go through, TIMES (all)
are hit. LOG gets a line ``CALL WHAT`` for each. A call with RWF_NOWAIT on a rule's file does not count, it gets EAGAIN:
what is left is one call a request on every file system.

As strace does it: a seccomp filter stops only the named calls for the tracer, so the program runs at its own speed. It
ends with its tracer (PTRACE_O_EXITKILL), which ends with its status and hands SIGTERM and SIGINT on.

Source: seccomp(2) (SECCOMP_RET_TRACE: a call whose number becomes -1 is skipped), ptrace(2), linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBERS = {
    "ioctl": 16, "pread64": 17, "pwrite64": 18, "sendto": 44, "recvfrom": 45, "fdatasync": 75, "fallocate": 285,
    "preadv2": 327, "pwritev2": 328,
}  # fmt: skip
"""x86-64's, of calls whose first argument is a descriptor."""
HANG = "hang"
WHATS = frozenset({HANG, "kill", "kill-after", "short", "stop", "count"})
STOP = 0.7
_KVM_RUN = 0xAE80

_EXITKILL, _TRACE_SECCOMP, _TRACE_CLONES, _TRACE_EXEC = 1 << 20, 1 << 7, 1 << 1 | 1 << 2 | 1 << 3, 1 << 4
_EVENT_SECCOMP = 7
_RWF_NOWAIT = 8
_WALL = 0x40000000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000
_LOAD_NUMBER, _EQUAL, _RETURN = 0x20, 0x15, 0x06


@dataclass
class Rule:
    """See above; ``times`` is None for ever."""

    call: str
    path: str
    what: str
    skip: int = 0
    times: int | None = None

    def __post_init__(self) -> None:
        if self.call not in NUMBERS or (self.what not in WHATS and not hasattr(errno, self.what)):
            raise ValueError(f"no such fault: {self}")

    @staticmethod
    def parse(text: str) -> Rule:
        parts, counts = text.split(":"), []
        while parts[-1].isdecimal():
            counts.insert(0, int(parts.pop()))
        return Rule(parts[0], ":".join(parts[1:-1]), parts[-1], *counts)  # a path may have a colon

    def hits(self) -> bool:
        """Whether this call of ours is one to fail; counts."""
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True


def command(log: Path, rules: list[str], *program: str) -> list[str]:
    """What to start instead of ``program``, with the repository as working folder."""
    return [sys.executable, "-m", "tests.framework.syscall_faults", str(log), *rules, "--", *program]


def _install_filter(numbers: set[int]) -> None:
    # KVM_RUN is never a rule's: a guest would crawl if its every exit stopped for the tracer.
    rows = [(_LOAD_NUMBER, 0, 0, 24), (_EQUAL, len(numbers) + 1, 0, _KVM_RUN), (_LOAD_NUMBER, 0, 0, 0)]
    rows += [(_EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(sorted(numbers))]
    rows += [(_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, _RET_TRACE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *row) for row in rows))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(rows), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)):
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), "no seccomp filter")


class Tracer:
    """Owns the program."""

    def __init__(self, log: Path, rules: list[Rule], program: list[str]) -> None:
        import ptrace.binding.func as func

        self._func = func
        self._rules = rules
        self._hanging: list[int] = []
        self._leaving: set[int] = set()
        """Threads that are in a call behind which the program is killed."""
        self._ports: dict[str, frozenset[int]] = {}
        self._log = log.open("a", buffering=1)
        self.pid = os.fork()
        if not self.pid:
            try:
                func.ptrace_traceme()
                os.kill(os.getpid(), signal.SIGSTOP)
                _install_filter({NUMBERS[rule.call] for rule in rules})
                os.execvp(program[0], program)
            finally:
                os._exit(127)
        os.waitpid(self.pid, _WALL)
        func.ptrace_setoptions(self.pid, _EXITKILL | _TRACE_SECCOMP | _TRACE_CLONES | _TRACE_EXEC)
        func.ptrace_cont(self.pid)

    def release(self) -> None:
        """Those that hang go on."""
        while self._hanging:
            self._func.ptrace_cont(self._hanging.pop())

    def serve(self) -> int:
        """Until the program has ended; its wait status."""
        from ptrace.error import PtraceError

        while True:
            thread, status = os.waitpid(-1, _WALL)
            if not os.WIFSTOPPED(status):
                if thread == self.pid:
                    return status
                continue
            try:
                self._stopped(thread, status)
            except (PtraceError, FileNotFoundError, ProcessLookupError):
                continue  # it was killed meanwhile

    def _stopped(self, thread: int, status: int) -> None:
        signal_number, event = os.WSTOPSIG(status), status >> 16
        if thread in self._leaving:
            os.kill(self.pid, signal.SIGKILL)
        elif event == _EVENT_SECCOMP:
            self._called(thread)
        elif event or signal_number in (signal.SIGSTOP, signal.SIGTRAP):
            self._func.ptrace_cont(thread)  # a new thread's first stop, a clone, an exec
        else:
            self._func.ptrace_cont(thread, signal_number)

    def _called(self, thread: int) -> None:
        registers = self._func.ptrace_getregs(thread)
        try:
            path = os.readlink(f"/proc/{thread}/fd/{registers.rdi}")
        except FileNotFoundError:  # a descriptor that is none: the kernel will say so
            self._func.ptrace_cont(thread)
            return
        rules = [rule for rule in self._rules
                 if registers.orig_rax == NUMBERS[rule.call] and self._is(rule.path, path, registers.rdx)]  # fmt: skip
        if rules and rules[0].call in ("preadv2", "pwritev2") and registers.r9 & _RWF_NOWAIT:
            self._fail(thread, registers, errno.EAGAIN)
        elif (rule := next((rule for rule in rules if rule.hits()), None)) is not None:
            self._log.write(f"{rule.call} {rule.what if rule.what != 'count' else rule.path}\n")
            if rule.what == HANG:
                self._hanging.append(thread)
                return
            if rule.what == "kill":
                os.kill(self.pid, signal.SIGKILL)
                return
            if rule.what == "kill-after":
                self._leaving.add(thread)
                self._func.ptrace_syscall(thread)
                return
            if rule.what == "short":
                registers.rdx = max(1, registers.rdx // 2)
                self._func.ptrace_setregs(thread, registers)
            elif rule.what == "stop":
                time.sleep(STOP)  # the tracer lets nobody go on meanwhile
            elif rule.what != "count":
                self._fail(thread, registers, getattr(errno, rule.what))
        self._func.ptrace_cont(thread)

    def _is(self, wanted: str, path: str, size: int) -> bool:
        """Whether a call about ``size`` bytes of ``path`` is meant."""
        for condition in wanted.split(","):
            kind, value = condition.rpartition("=")[::2] if "=" in condition else condition.rpartition("!")[::2]
            if kind == "port" and int(value) not in self._ports_of(path):
                return False
            if kind == "size" and (size == int(value)) != ("=" in condition):
                return False
        return "port=" in wanted or path.endswith(wanted)

    def _ports_of(self, path: str) -> frozenset[int]:
        """Both ports of the TCP connection that /proc calls ``path``."""
        if path not in self._ports:
            inode = path.removeprefix("socket:[").rstrip("]")
            rows = (line.split() for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:])
            mine = next((row for row in rows if row[9] == inode), None)
            self._ports[path] = frozenset(int(end.rpartition(":")[2], 16) for end in mine[1:3]) if mine else frozenset()
            if not mine:  # not connected yet, perhaps
                return self._ports.pop(path)
        return self._ports[path]

    def _fail(self, thread: int, registers: Any, error: int) -> None:
        registers.orig_rax = (1 << 64) - 1
        registers.rax = (1 << 64) - error
        self._func.ptrace_setregs(thread, registers)


def main(arguments: list[str]) -> int:
    """The command above."""
    at = arguments.index("--")
    tracer = Tracer(Path(arguments[0]), [Rule.parse(text) for text in arguments[1:at]], arguments[at + 1 :])
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, _frame: os.kill(tracer.pid, number))
    signal.signal(signal.SIGUSR1, lambda _number, _frame: tracer.release())
    status = tracer.serve()
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
