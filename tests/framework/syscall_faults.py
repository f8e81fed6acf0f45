"""Run a program whose system calls on one file fail or hang: ``python -m tests.framework.syscall_faults``.

::

    ... LOG RULE... -- PROGRAM ARGUMENT...         RULE is CALL:END-OF-PATH:WHAT[:SKIP[:TIMES]]

WHAT is an errno's name: the call is not made and fails so; or ``hang``: the thread stands still in it until this
process gets SIGUSR1. The first SKIP (0) calls go through, TIMES (all) are hit. LOG gets a line ``CALL WHAT`` for each.
A call with RWF_NOWAIT on a rule's file does not count, it gets EAGAIN: what is left is one call a request on every
file system.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBERS = {"pread64": 17, "pwrite64": 18, "fdatasync": 75, "fallocate": 285, "preadv2": 327, "pwritev2": 328}
"""x86-64's, of calls whose first argument is a descriptor."""
HANG = "hang"

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
        if self.call not in NUMBERS or (self.what != HANG and not hasattr(errno, self.what)):
            raise ValueError(f"no such fault: {self}")

    @staticmethod
    def parse(text: str) -> Rule:
        call, path, what, *counts = text.split(":")
        return Rule(call, path, what, *map(int, counts))

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
    rows = [(_LOAD_NUMBER, 0, 0, 0)]
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
        if event == _EVENT_SECCOMP:
            self._called(thread)
        elif event or signal_number in (signal.SIGSTOP, signal.SIGTRAP):
            self._func.ptrace_cont(thread)  # a new thread's first stop, a clone, an exec
        else:
            self._func.ptrace_cont(thread, signal_number)

    def _called(self, thread: int) -> None:
        registers = self._func.ptrace_getregs(thread)
        path = os.readlink(f"/proc/{thread}/fd/{registers.rdi}")
        rules = [rule for rule in self._rules
                 if registers.orig_rax == NUMBERS[rule.call] and path.endswith(rule.path)]  # fmt: skip
        if rules and rules[0].call in ("preadv2", "pwritev2") and registers.r9 & _RWF_NOWAIT:
            self._fail(thread, registers, errno.EAGAIN)
        elif (rule := next((rule for rule in rules if rule.hits()), None)) is not None:
            self._log.write(f"{rule.call} {rule.what}\n")
            if rule.what == HANG:
                self._hanging.append(thread)
                return
            self._fail(thread, registers, getattr(errno, rule.what))
        self._func.ptrace_cont(thread)

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
