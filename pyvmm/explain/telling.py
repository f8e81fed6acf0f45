"""Events on their way to the reader: filtered, joined, counted, printed, some kept for the report."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection

from pyvmm.explain.events import Event

PLACE = 26
INSTRUCTION = 30
LOOP = 3
"""Events that go round: a guest that looks at the UART's status before each byte is told as two, with their counts."""
_JOINED = frozenset({"port", "memory"})


def line(event: Event) -> str:
    """For a terminal; the details are lines of their own."""
    head = f"{event.seconds:10.4f}  cpu{event.cpu}  {event.place:<{PLACE}} {event.instruction or '':<{INSTRUCTION}} "
    return "\n".join([(head + event.what).rstrip(), *(" " * 18 + f"- {text}" for text in event.details)])


class Teller:
    """``limit`` events are told; those behind are counted, and the guest goes on."""

    def __init__(
        self,
        write: Callable[[str], None],
        limit: int,
        kinds: Collection[str] = (),
        devices: Collection[str] = (),
        form: Callable[[Event], str] = line,
    ) -> None:
        self._write = write
        self._limit = limit
        self._kinds = frozenset(kinds)
        self._devices = frozenset(devices)
        self._form = form
        self._pending: list[Event] = []
        self._lock = threading.Lock()
        self.told: list[Event] = []
        self.counts: Counter[str] = Counter()
        """Of everything, by kind and device, told or not."""

    def __call__(self, event: Event) -> None:
        """One more."""
        with self._lock:
            self.counts[f"{event.kind} {event.device}" if event.device is not None else event.kind] += event.count
            if not self._wanted(event) or (len(self.told) >= self._limit and event.kind != "end"):
                return
            for known in self._pending:
                if known.continues(event):
                    known.join(event)
                    return
            if len(self._pending) == LOOP or any(each.count > 1 for each in self._pending) or event.kind not in _JOINED:
                self._flush()
            self._pending.append(event)

    def _wanted(self, event: Event) -> bool:
        if event.kind == "end":
            return True
        if self._kinds and event.kind not in self._kinds:
            return False
        return not self._devices or event.device in self._devices

    def flush(self) -> None:
        """Tell what is still waiting for more of its kind."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for event in pending:
            self.told.append(event)
            self._write(self._form(event) + "\n")
            if len(self.told) == self._limit:
                self._write(f"{self._limit} events were told: what follows is only counted (--limit N tells more)\n")

    def note(self, text: str) -> None:
        """A line about the telling itself."""
        with self._lock:
            self._flush()
            self._write(text + "\n")

    def summary(self) -> list[str]:
        """How many there were of each."""
        return [f"{count:10}  {name}" for name, count in self.counts.most_common() if count]
