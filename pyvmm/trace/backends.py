"""Where traced events go: a log for people, a file with one line an event; Chrome's JSON is in chrome.py.

Every event is written by itself, at once: nothing queues up in memory, and after a crash, a hang or SIGKILL the
file ends with the event before it. Files stop growing at a limit. A backend that cannot write (full disk, closed
pipe) says so once on stderr and goes quiet: tracing never stops the machine.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from typing import Any, TextIO

from pyvmm.errors import ConfigError
from pyvmm.trace.events import Event

DEFAULT_LIMIT = 1 << 30
"""Bytes after which a trace file is complete."""


class Backend:
    """Takes events from any thread. The lock is re-entrant: a signal handler may trace, too."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.closed = False

    def record(self, event: Event, values: tuple[Any, ...]) -> None:
        """One event that just happened on this thread."""
        with self.lock:
            if self.closed:
                return
            try:
                self.write(event, values)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self.closed = True
                with contextlib.suppress(OSError):
                    self.abandon()
                _complain(f"pyvmm: tracing stopped: {error}")

    def close(self) -> None:
        """Finish the trace. Later events are dropped; closing twice is allowed."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self.abandon()

    def write(self, event: Event, values: tuple[Any, ...]) -> None:
        """Record the event (lock held). May raise OSError or ValueError."""
        raise NotImplementedError(f"write is not implemented for {type(self).__name__}")

    def abandon(self) -> None:
        """Release what the backend owns."""
        raise NotImplementedError(f"abandon is not implemented for {type(self).__name__}")


class TraceFile:
    """A file of records, in full on disk after each one, that stops growing at ``limit`` bytes.

    ``tail`` ends the file after every record and is overwritten by the next one (where the file can seek), so
    that a format with a closing bracket is valid at any moment. Raises ConfigError if it cannot be created.
    """

    def __init__(self, path: str, head: bytes = b"", tail: bytes = b"", limit: int = DEFAULT_LIMIT) -> None:
        self.path = path
        self._limit = limit
        self._at = 0
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"--trace file {path}: {error.strerror}") from None
        # A pipe or terminal cannot take the tail back; there the reader must do without it.
        self._tail = tail if stat.S_ISREG(os.fstat(self._fd).st_mode) else b""
        self.full = False
        try:
            if head:
                self.append(head)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(f"--trace file {path}: {error.strerror}") from None

    def append(self, record: bytes) -> None:
        """Write ``record``; beyond the limit set ``full`` instead."""
        if self._at + len(record) > self._limit:
            self.full = True
            return
        data = record + self._tail
        if self._tail:
            done = os.pwrite(self._fd, data, self._at)
        else:
            done = os.write(self._fd, data)
        while done < len(data):
            if self._tail:
                done += os.pwrite(self._fd, data[done:], self._at + done)
            else:
                done += os.write(self._fd, data[done:])
        self._at += len(record)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class LogBackend(Backend):
    """For people: local time, thread, event and its formatted arguments, on a stream (default: stderr)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    def write(self, event: Event, values: tuple[Any, ...]) -> None:
        """One line, in the stream at once."""
        stream = self._stream if self._stream is not None else sys.stderr
        stream.write(log_line(event, values))
        stream.flush()

    def abandon(self) -> None:
        """The stream is somebody else's."""


class FileBackend(Backend):
    """A backend whose records go to a :class:`TraceFile`; it ends when the file has reached its limit."""

    def __init__(self, file: TraceFile) -> None:
        super().__init__()
        self.file = file

    def append(self, record: bytes) -> None:
        """Write ``record`` or, at the limit, close the trace and say so (lock held)."""
        if self.closed:
            return
        self.file.append(record)
        if self.file.full:
            self.close()
            _complain(f"pyvmm: tracing stopped: {self.file.path} has reached its limit")

    def abandon(self) -> None:
        """Close the file, which is complete as it is."""
        self.file.close()


class LogFileBackend(FileBackend):
    """The log in a file."""

    def __init__(self, path: str, limit: int = DEFAULT_LIMIT) -> None:
        super().__init__(TraceFile(path, limit=limit))

    def write(self, event: Event, values: tuple[Any, ...]) -> None:
        """One line."""
        self.append(log_line(event, values).encode("utf-8", "backslashreplace"))


class SimpleBackend(FileBackend):
    """For programs: ``nanoseconds <tab> thread id <tab> folder <tab> event <tab> text``, monotonic clock."""

    def __init__(self, path: str, limit: int = DEFAULT_LIMIT) -> None:
        super().__init__(TraceFile(path, b"# ns\ttid\tgroup\tevent\ttext\n", limit=limit))

    def write(self, event: Event, values: tuple[Any, ...]) -> None:
        """One line."""
        text = _one_line(event.text(values))
        line = f"{time.monotonic_ns()}\t{threading.get_native_id()}\t{event.group}\t{event.name}\t{text}\n"
        self.append(line.encode("utf-8", "backslashreplace"))


def log_line(event: Event, values: tuple[Any, ...]) -> str:
    """``12:34:56.789012 [vcpu0] kvm_exit cpu 0 reason 2``, with the line end."""
    now = time.time_ns()
    clock = time.strftime("%H:%M:%S", time.localtime(now // 1_000_000_000))
    thread = _one_line(threading.current_thread().name)
    return f"{clock}.{now // 1000 % 1_000_000:06d} [{thread}] {event.name} {_one_line(event.text(values))}\n"


def _one_line(text: str) -> str:
    """Guest data may hold anything; an event stays one line and cannot drive the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _complain(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be left to tell
        sys.stderr.write(sentence + "\n")
