"""A program of ours whose threads stop for us at chosen system calls, and at nothing else.

As strace does it: a seccomp filter, which the program gets before its exec, stops only the named calls for the tracer;
all else, KVM_RUN above all, runs at its own speed. It ends with its tracer (PTRACE_O_EXITKILL).

Source: seccomp(2) (SECCOMP_RET_TRACE: a call whose number becomes -1 is skipped), ptrace(2), linux/filter.h.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Iterable
from typing import Any

_EXITKILL, _TRACE_SECCOMP, _TRACE_CLONES, _TRACE_EXEC = 1 << 20, 1 << 7, 1 << 1 | 1 << 2 | 1 << 3, 1 << 4
_EVENT_SECCOMP = 7
_WALL = 0x40000000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_SECOND_ARGUMENT = 24
"""Offset of its low half in struct seccomp_data."""
IOCTL, _KVM_RUN, _KVM_TYPE = 16, 0xAE80, 0xAE00


def _filter(numbers: Iterable[int], kvm: bool) -> bytes:
    wanted = sorted(numbers)
    rows = [(_LOAD, 0, 0, 0)]
    end = 1 + len(wanted) + (6 if kvm else 1)  # index of the row that stops
    rows += [(_EQUAL, end - at - 2, 0, number) for at, number in enumerate(wanted)]
    if kvm:
        rows += [(_EQUAL, 0, 4, IOCTL), (_LOAD, 0, 0, _SECOND_ARGUMENT), (_EQUAL, 2, 0, _KVM_RUN)]
        rows += [(_AND, 0, 0, 0xFF00), (_EQUAL, 1, 0, _KVM_TYPE)]
    rows += [(_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, _RET_TRACE)]
    return b"".join(struct.pack("<HBBI", *row) for row in rows)


def _install_filter(rows: bytes) -> None:
    code = ctypes.create_string_buffer(rows)
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(rows) // 8, ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)):
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), "no seccomp filter")


class Traced:
    """Owns the program. ``numbers``: system calls that stop; ``kvm``: also all of KVM's ioctls but KVM_RUN."""

    def __init__(self, program: list[str], numbers: Iterable[int], *, kvm: bool = False) -> None:
        import ptrace.binding.func as func

        self._func = func
        rows = _filter(numbers, kvm)
        self.pid = os.fork()
        if not self.pid:
            try:
                func.ptrace_traceme()
                os.kill(os.getpid(), signal.SIGSTOP)
                _install_filter(rows)
                os.execvp(program[0], program)
            finally:
                os._exit(127)
        os.waitpid(self.pid, _WALL)
        func.ptrace_setoptions(self.pid, _EXITKILL | _TRACE_SECCOMP | _TRACE_CLONES | _TRACE_EXEC)
        func.ptrace_cont(self.pid)

    def called(self, thread: int, registers: Any) -> None:
        """``thread`` stands before one of the calls; it goes on by :meth:`go_on`."""
        raise NotImplementedError

    def signalled(self, thread: int, number: int) -> None:
        """``thread`` is about to get a signal, or is new (SIGSTOP), or did an exec or a step (SIGTRAP)."""
        self.go_on(thread, 0 if number in (signal.SIGSTOP, signal.SIGTRAP) else number)

    def go_on(self, thread: int, number: int = 0) -> None:
        """Let a thread that stands run."""
        self._func.ptrace_cont(thread, number)

    def go_on_to_its_end(self, thread: int) -> None:
        """Let a call be made; its thread stops behind it by SIGTRAP."""
        self._func.ptrace_syscall(thread)

    def change(self, thread: int, registers: Any) -> None:
        """Other arguments."""
        self._func.ptrace_setregs(thread, registers)

    def fail(self, thread: int, registers: Any, error: int) -> None:
        """The call is not made, and fails by errno ``error``."""
        registers.orig_rax = (1 << 64) - 1
        registers.rax = (1 << 64) - error
        self._func.ptrace_setregs(thread, registers)

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
                event = status >> 16
                if event == _EVENT_SECCOMP:
                    self.called(thread, self._func.ptrace_getregs(thread))
                elif event:
                    self._func.ptrace_cont(thread)  # a clone, an exec
                else:
                    self.signalled(thread, os.WSTOPSIG(status))
            except (PtraceError, FileNotFoundError, ProcessLookupError):
                continue  # it was killed meanwhile


def end_as_it_did(status: int) -> int:
    """What to exit with; dies of the signal that the program died of."""
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)
