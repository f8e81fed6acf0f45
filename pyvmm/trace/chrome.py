"""Trace backend in Chrome's JSON, which https://ui.perfetto.dev opens.

Source: "Trace Event Format" (Google, 2016), JSON Array Format: one object per event with ``ph``, ``ts`` (us),
``pid``, ``tid``. Each thread is a track, named by a metadata event. ``NAME_begin`` and ``NAME_end`` become one
slice ``NAME``; everything else is an instant. A slice must begin and end on one thread.

The closing bracket is written after every event and overwritten by the next one, so that the file is valid JSON
however the process ends.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import msgspec

from pyvmm.trace.backends import DEFAULT_LIMIT, FileBackend, TraceFile
from pyvmm.trace.events import Event

_SAFE_INTEGER = (1 << 53) - 1  # JavaScript's; larger ones would be rounded by the viewer


class ChromeBackend(FileBackend):
    """Writes ``path``. Times are those of the monotonic clock, as in the simple format."""

    def __init__(self, path: str, limit: int = DEFAULT_LIMIT) -> None:
        self._pid = os.getpid()
        self._threads: dict[int, str] = {}
        self._encode = msgspec.json.Encoder(enc_hook=repr).encode
        name = {"ph": "M", "name": "process_name", "pid": self._pid, "tid": 0, "ts": 0, "args": {"name": "pyvmm"}}
        super().__init__(TraceFile(path, b"[\n" + self._encode(name), b"\n]\n", limit))

    def write(self, event: Event, values: tuple[Any, ...]) -> None:
        """One object, after a new thread's name."""
        now = time.monotonic_ns() / 1000
        tid = threading.get_native_id()
        thread = threading.current_thread().name
        if self._threads.get(tid) != thread:
            self._threads[tid] = thread
            self._record({"ph": "M", "name": "thread_name", "ts": 0, "tid": tid, "args": {"name": thread}})
        record: dict[str, Any] = {"name": event.name, "cat": event.group, "ph": "i", "ts": now, "tid": tid}
        if event.name.endswith("_begin"):
            record |= {"name": event.name.removesuffix("_begin"), "ph": "B"}
        elif event.name.endswith("_end"):
            record |= {"name": event.name.removesuffix("_end"), "ph": "E"}
        else:
            record["s"] = "t"
        declared = zip(event.declaration.args, event.declaration.conversions, values, strict=False)
        record["args"] = {name: _viewable(kind, value) for (_, name), kind, value in declared}
        self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        record["pid"] = self._pid
        self.append(b",\n" + self._encode(record))


def _viewable(kind: str, value: Any) -> Any:
    """Hexadecimal where the declaration says so, and never a number that a viewer would round."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}" if kind in "xXp" or abs(value) > _SAFE_INTEGER else value
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value if isinstance(value, bool | float) else repr(value)
