"""Figures out of what VMMs and guests leave behind: events, traces, /proc, a guest's console. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Event = tuple[str, float]
"""Name, milliseconds."""
ROUND = re.compile(rb"round (\d+): \d+ pages in (\d+) us")
LATE = re.compile(rb", late by (\d+)\n")


def pauses(events: Sequence[Event]) -> list[float]:
    """Milliseconds from each STOP to the RESUME behind it, of a VMM's events in order."""
    found, stopped = [], None
    for name, at in events:
        if name == "STOP":
            stopped = at
        elif name == "RESUME" and stopped is not None:
            found.append(at - stopped)
            stopped = None
    return found


def ran_at(events: Sequence[Event], *, running: bool, since: float) -> float | None:
    """When a survivor's guest ran as its own: milliseconds. ``None``: not by the last of ``events``.

    That is when COLO was over there (COLO_EXIT) *and* its guest ran: at the RESUME that comes after COLO_EXIT if it
    stood still then. ``running``: whether it ran at ``since``, as a replica does.
    """
    over = None
    for name, at in events:
        if at < since:
            continue
        running = name == "RESUME" or (running and name != "STOP")
        if name == "COLO_EXIT":
            over = at
        if over is not None and running:
            return at
    return None


def qemu_messages(trace: Iterable[str]) -> list[tuple[float, str]]:
    """(seconds, message) of QEMU's log of colo_send_message and colo_receive_message: ``PID@SECONDS:NAME Send 'MESSAGE'
    message``. Other lines are skipped.
    """
    found = []
    for line in trace:
        match = re.match(r"(?:\S+ )?\d+@(\d+\.\d+):colo_(?:send|receive)_message .*'([a-z-]+)'", line)
        if match:
            found.append((float(match[1]), match[2]))
    return found


def pyvmm_messages(trace: Iterable[str]) -> list[tuple[float, str]]:
    """The same of pyvmm's trace in ``format=simple``: nanoseconds, thread, folder, event, text, between tabs."""
    found = []
    for line in trace:
        fields = line.rstrip("\n").split("\t")
        if len(fields) == 5 and fields[3] in ("colo_send_message", "colo_receive_message"):
            found.append((int(fields[0]) / 1e9, fields[4].split()[0]))
    return found


def until_received(messages: Iterable[tuple[float, str]]) -> list[float]:
    """Milliseconds from each checkpoint-request to its vmstate-received. The first checkpoint is left out: it brings
    what was written while memory was migrated, and finds everything cold.
    """
    found, requested = [], None
    for at, message in messages:
        if message == "checkpoint-request":
            requested = at
        elif message == "vmstate-received" and requested is not None:
            found.append((at - requested) * 1000)
            requested = None
    return found[1:]


def sizes(trace: Iterable[str]) -> list[int]:
    """Bytes of each checkpoint in pyvmm's trace."""
    found, state = [], 0
    for line in trace:
        if match := re.search(r"\tvmstate-(send|size) (\d+)$", line.rstrip("\n")):
            if match[1] == "send":
                state = int(match[2])
            else:
                found.append(state + int(match[2]))
    return found


def resident_of(smaps: Iterable[str], memory: str) -> tuple[int, int]:
    """Bytes of /proc/PID/smaps: (pages of its own over mappings of the file ``memory``, all else that is resident)."""
    own, other, of_memory = 0, 0, False
    for line in smaps:
        words = line.split()
        if not words[0].endswith(":"):  # a mapping's first line: addresses, rights, offset, device, inode, name
            of_memory = len(words) > 5 and words[5].startswith(memory)
        elif of_memory and words[0] == "Anonymous:":
            own += int(words[1]) << 10
        elif not of_memory and words[0] == "Rss:":
            other += int(words[1]) << 10
    return own, other


def rounds_of(console: bytes) -> list[tuple[int, float]]:
    """(number, milliseconds that its work took) of each whole line about a round."""
    whole = console[: console.rfind(b"\n") + 1]
    return [(int(number), int(microseconds) / 1000) for number, microseconds in ROUND.findall(whole)]


def periods_of(console: bytes) -> int:
    """How many of its periods have passed for a guest, by its own clock: rounds, and those that it was late by."""
    return len(rounds_of(console)) + sum(map(int, LATE.findall(console)))
