"""What the host's own CPU does with a few instructions: run natively at CPL 3, one step at a time, under ptrace.

A child process of two mappings (code and data, at fixed addresses, no libc, no Python) is started once and
used for many snippets: set registers and memory, single-step, look. Needs python-ptrace and the right to
trace one's own children. The child ends with :meth:`NativeOracle.close` and, by PTRACE_O_EXITKILL, whenever
the tracing process ends.

ptrace belongs to a thread: use an oracle only in the thread that made it.

Source: ptrace(2); elf(5); arch/x86/kernel/ptrace.c (which RFLAGS a tracer may set); the NT_X86_XSTATE register
set is XSAVE's standard format with XCR0 in its bytes 471:464 (arch/x86/kernel/fpu/regset.c).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from types import TracebackType
from typing import Any, Self

import msgspec

from pyvmm.errors import HostError
from pyvmm.kvm.state import Regs

CODE = 0x1000_0000
"""Linear address of the code page."""
DATA = 0x2000_0000
"""Linear address of the data pages; what lies directly before and after them is not mapped."""
DATA_SIZE = 0x4000
PAGE = 0x1000

_PTRACE_O_EXITKILL = 0x100000
_NT_X86_XSTATE = 0x202
_MFD_EXEC = 0x10
_XCR0_AT = 464
_MAX_STEPS = 1000
USER_CS_64 = 0x33
USER_CS_32 = 0x23
"""Linux's compatibility-mode code segment: 32-bit code on a 64-bit kernel."""
USER_DS = 0x2B

# mov eax, 34 (pause); syscall; jmp back
_IDLE = bytes.fromhex("b8220000000f05ebf7")


class Signal(msgspec.Struct, frozen=True):
    """How Linux reported an exception: signal number, si_code, and the fault address (si_addr)."""

    number: int
    code: int
    address: int


class NativeState(msgspec.Struct, kw_only=True):
    """Registers of the child. ``xsave`` is XSAVE's standard format, as long as the host's is; empty: not set."""

    regs: Regs
    fs_base: int = 0
    gs_base: int = 0
    xsave: bytes = b""


class NativeResult(msgspec.Struct, kw_only=True):
    """After the last step. ``signal`` is what a fault or trap raised, ``None`` if every step completed."""

    state: NativeState
    data: bytes
    signal: Signal | None
    steps: int


class NativeOracle:
    """Owns the traced child. A context manager."""

    def __init__(self) -> None:
        import ptrace.binding.func as func
        from ptrace.error import PtraceError

        self._func = func
        self._pid = -1
        self._memory = -1
        self._pid = _spawn()
        try:
            func.ptrace_attach(self._pid)
            # posix_spawn returns a little before exec is done: exec's own SIGTRAP may come before our SIGSTOP.
            while self._wait() != signal.SIGSTOP:
                func.ptrace_cont(self._pid)
            func.ptrace_setoptions(self._pid, _PTRACE_O_EXITKILL)
            self._memory = os.open(f"/proc/{self._pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            self._initial = func.ptrace_getregs(self._pid)
            self._xsave = self._get_xsave()
        except (PtraceError, OSError) as error:
            self.close()
            raise HostError(f"cannot trace a child process: {error}; allow ptrace (CAP_SYS_PTRACE)") from None
        except BaseException:
            self.close()
            raise
        self.xcr0 = int.from_bytes(self._xsave[_XCR0_AT : _XCR0_AT + 8], "little")
        """The host's XCR0, as far as user space has it."""
        self.xsave_size = len(self._xsave)

    # -- one run --------------------------------------------------------------------------------

    def run(
        self, code: bytes, state: NativeState, data: bytes = b"", *, steps: int | None = None, cs: int = USER_CS_64
    ) -> NativeResult:
        """Run ``code`` from :data:`CODE` with ``state`` and ``data`` at :data:`DATA`.

        Ends when RIP leaves the code, on a signal, or after ``steps`` single steps. ``state.regs.rip`` is
        ignored unless it lies in the code page; RFLAGS other than the status flags, DF, AC, NT and RF are the
        kernel's. Raises HostError if the child dies or the code does not end.
        """
        if len(code) > PAGE or len(data) > DATA_SIZE:
            raise ValueError("code or data does not fit the child")
        start = state.regs.rip if CODE <= state.regs.rip < CODE + PAGE else CODE
        os.pwrite(self._memory, code, start)
        os.pwrite(self._memory, data, DATA)
        self._set_registers(state, start, cs)
        if state.xsave:
            self._set_xsave(state.xsave)
        limit = _MAX_STEPS if steps is None else steps
        done, seen = 0, None
        while done < limit:
            self._func.ptrace_singlestep(self._pid)
            seen = self._stopped()
            done += 1
            rip = self._func.ptrace_getregs(self._pid).rip
            if seen is not None or not start <= rip < start + len(code):
                break
        else:
            if steps is None:
                raise HostError(f"the snippet did not end within {_MAX_STEPS} instructions")
        return NativeResult(
            state=self._get_state(), data=os.pread(self._memory, len(data), DATA), signal=seen, steps=done
        )

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX that the CPU gives user space."""
        regs = self.run(b"\x0f\xa2", NativeState(regs=Regs(rax=leaf, rcx=subleaf))).state.regs
        return regs.rax, regs.rbx, regs.rcx, regs.rdx

    # -- the child ------------------------------------------------------------------------------

    def _wait(self) -> int:
        """Wait for the child to stop; the signal that stopped it."""
        _, status = os.waitpid(self._pid, 0)
        if not os.WIFSTOPPED(status):
            self._pid = -1  # reaped
            raise HostError(f"the traced child ended unexpectedly (wait status {status:#x})")
        return os.WSTOPSIG(status)

    def _stopped(self) -> Signal | None:
        """After a step: ``None`` if it completed, else the exception's signal."""
        stopped_by = self._wait()
        info = self._func.ptrace_getsiginfo(self._pid)
        if stopped_by == signal.SIGTRAP and info.si_code in (_TRAP_TRACE, _TRAP_BRKPT_OF_STEP):
            return None
        return Signal(number=stopped_by, code=info.si_code, address=info._sigfault._addr or 0)

    def _set_registers(self, state: NativeState, start: int, cs: int) -> None:
        raw = type(self._initial).from_buffer_copy(self._initial)
        regs = state.regs
        for name in Regs.__struct_fields__:
            if name not in ("rip", "rflags"):
                setattr(raw, name, getattr(regs, name))
        raw.rip, raw.eflags, raw.cs = start, regs.rflags, cs
        if cs == USER_CS_32:
            raw.ds = raw.es = USER_DS  # in 64-bit processes they are null, which 32-bit code cannot use
        raw.fs_base, raw.gs_base = state.fs_base, state.gs_base
        raw.orig_rax = (1 << 64) - 1  # not in a system call: nothing to restart
        self._func.ptrace_setregs(self._pid, raw)

    def _get_state(self) -> NativeState:
        raw = self._func.ptrace_getregs(self._pid)
        values = {name: getattr(raw, name) for name in Regs.__struct_fields__ if name != "rflags"}
        return NativeState(
            regs=Regs(**values, rflags=raw.eflags), fs_base=raw.fs_base, gs_base=raw.gs_base, xsave=self._get_xsave()
        )

    def _regset(self, command: int, buffer: Any) -> int:
        """PTRACE_GETREGSET or SETREGSET of the extended state; how many bytes were moved."""
        from ptrace.binding.linux_struct import iovec_struct

        vector = iovec_struct()
        vector.buf, vector.len = ctypes.addressof(buffer), len(buffer)
        self._func.ptrace(command, self._pid, _NT_X86_XSTATE, ctypes.addressof(vector))
        return int(vector.len)

    def _get_xsave(self) -> bytes:
        buffer = ctypes.create_string_buffer(16384)
        size = self._regset(self._func.PTRACE_GETREGSET, buffer)
        return buffer.raw[:size]

    def _set_xsave(self, state: bytes) -> None:
        if len(state) != self.xsave_size:
            raise ValueError(f"{len(state)} bytes of extended state, {self.xsave_size} expected")
        self._regset(self._func.PTRACE_SETREGSET, ctypes.create_string_buffer(state, len(state)))

    def close(self) -> None:
        """End the child and reap it; harmless twice."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        if self._pid > 0:
            os.kill(self._pid, signal.SIGKILL)
            while True:
                _, status = os.waitpid(self._pid, 0)
                if os.WIFSIGNALED(status) or os.WIFEXITED(status):
                    break
            self._pid = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_TRAP_TRACE = 2  # TRAP_TRACE of siginfo.h
_TRAP_BRKPT_OF_STEP = 1  # TRAP_BRKPT: what Linux reports when the stepped instruction entered the kernel


def _spawn() -> int:
    """Start the idle child from an executable in a memfd; its process ID."""
    try:
        fd = os.memfd_create("pyvmm-oracle", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:  # before Linux 6.3 every memfd is executable and the flag unknown
        fd = os.memfd_create("pyvmm-oracle", os.MFD_CLOEXEC)
    try:
        os.write(fd, _executable())
        # Named through this process: the child's own /proc/self/fd entry is gone when it executes.
        return os.posix_spawn(f"/proc/{os.getpid()}/fd/{fd}", ["pyvmm-oracle"], {})
    except OSError as error:
        remedy = "allow executable memfds (sysctl vm.memfd_noexec=0)"
        raise HostError(f"cannot start the traced child: {error}; {remedy}") from None
    finally:
        os.close(fd)


def _executable() -> bytes:
    """A static ELF: one read-execute page with an idle loop at :data:`CODE`, zeroed data pages at :data:`DATA`."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,  # ET_EXEC
        62,  # EM_X86_64
        1,
        CODE,
        64,  # program headers follow
        0,
        0,
        64,
        56,
        3,
        0,
        0,
        0,
    )
    load, stack = 1, 0x6474E551  # PT_LOAD, PT_GNU_STACK
    segments = (
        struct.pack("<IIQQQQQQ", load, 5, PAGE, CODE, CODE, len(_IDLE), PAGE, PAGE),
        struct.pack("<IIQQQQQQ", load, 6, 0, DATA, DATA, 0, DATA_SIZE, PAGE),
        struct.pack("<IIQQQQQQ", stack, 6, 0, 0, 0, 0, 0, 16),
    )
    return (header + b"".join(segments)).ljust(PAGE, b"\0") + _IDLE
