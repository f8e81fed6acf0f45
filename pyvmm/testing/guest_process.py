"""A guest as a test sees it: a ``pyvmm run`` of its own, its serial line, its exit status.

A process, so that whatever a guest does to its VMM happens to that, not to the tests.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pyvmm.testing.report import Report

OUTPUT_MAX = 16 << 20


class GuestError(AssertionError):
    """What a test waited for did not come. The message ends with what came instead."""


class GuestProcess:
    """``pyvmm run ARGUMENTS``, started at once; a context manager that ends it and leaves nothing.

    Raises OSError if the process cannot be started. ``timeout`` (seconds) is the guest's whole life.
    """

    def __init__(self, arguments: Sequence[str], *, timeout: float = 60.0) -> None:
        self.timeout = timeout
        command = [sys.executable, "-m", "pyvmm", "run", "--serial", "stdio", "--timeout", f"{timeout:g}", *arguments]
        self._changed = threading.Condition()
        self._output = bytearray()
        self._searched = 0
        self._closed = False
        self._errors = b""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        self._readers = [
            threading.Thread(target=self._read_output, name="guest-output", daemon=True),
            threading.Thread(target=self._read_errors, name="guest-errors", daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    # -- what a test does -----------------------------------------------------------------------

    def expect(self, pattern: str, timeout: float = 20.0) -> re.Match[str]:
        """Wait until ``pattern`` (a regular expression) is in output that no earlier ``expect`` has passed; the match.

        GuestError after ``timeout`` seconds, or at once when the guest has ended without it.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                # Each byte is one character, so that positions in the text are positions in the output.
                match = compiled.search(self._output.decode("latin-1"), self._searched)
                if match is not None:
                    self._searched = match.end()
                    return match
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    why = "the guest ended" if self._closed else f"{timeout:g} s passed"
                    rest = self._output[self._searched :].decode("latin-1")[-2000:]
                    raise GuestError(f"{why} and {pattern!r} did not come, but {rest!r}{self._complaint()}")
                self._changed.wait(left)

    def send(self, data: str | bytes) -> None:
        """Type ``data`` (text: UTF-8) at the serial line. GuestError if the guest has ended."""
        assert self._process.stdin is not None
        rest = memoryview(data.encode() if isinstance(data, str) else data)
        try:
            while rest:
                rest = rest[os.write(self._process.stdin.fileno(), rest) :]
        except (BrokenPipeError, ValueError):
            raise GuestError(f"the guest has ended and takes no input{self._complaint()}") from None

    @property
    def output(self) -> str:
        """All that the guest has sent so far; what is no UTF-8 is replaced."""
        with self._changed:
            return self._output.decode(errors="replace")

    @property
    def exit_status(self) -> int:
        """The exit status of ``pyvmm run``, once the guest has ended: waits for that, as long as its timeout allows.

        0 clean end, odd: debug-exit, 124 timeout, 125 pyvmm refused, 126 crash.
        """
        return self.wait(self.timeout + 30)

    def wait(self, timeout: float) -> int:
        """The exit status; GuestError if the guest does not end within ``timeout`` seconds."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not end within {timeout:g} s; it said {self.output[-2000:]!r}") from None
        for reader in self._readers:
            reader.join(10)
        return status

    def report(self) -> Report:
        """What a test image printed (its PASS and FAIL lines), once it has ended."""
        from pyvmm.testing.report import parse_report

        self.wait(self.timeout + 30)
        with self._changed:
            return parse_report(bytes(self._output))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def errors(self) -> str:
        """What pyvmm itself said (a crash report, a refusal)."""
        return self._errors.decode(errors="replace")

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill what still runs and give everything back."""
        if self._process.poll() is None:
            self._process.terminate()  # in order, so that it removes its sockets and taps
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(10)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the readers' threads -------------------------------------------------------------------

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        while data := _read(self._process.stdout.fileno()):
            with self._changed:
                self._output += data[: max(0, OUTPUT_MAX - len(self._output))]
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while data := _read(self._process.stderr.fileno()):
            self._errors = (self._errors + data)[-65536:]

    def _complaint(self) -> str:
        said = self.errors.strip()
        return f"; pyvmm said {said!r}" if said else ""


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
