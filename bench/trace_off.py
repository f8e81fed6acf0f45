"""What a trace call site costs while its event is off.

Compared: a loop whose body is ``T.event.on and T.event(1, 2)`` against the same loop testing an attribute of an
attribute of plain objects, which is the least that Python can do for "one attribute test". Also said: the share
of the site in a port write that a Python device serves (bus and device, without KVM's part of the exit).

Prints JSON: nanoseconds per site (best of several rounds, empty loop taken off) and the ratios.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import msgspec

from pyvmm.devices.bus import PORT_SPACE, Bus
from pyvmm.devices.post import PostPort
from pyvmm.trace import trace_group

LOOPS = 200_000
ROUNDS = 7

T = trace_group("devices")
PLAIN = SimpleNamespace(event=SimpleNamespace(on=False))


def empty() -> None:
    for _ in range(LOOPS):
        pass


def plain_test() -> None:
    for _ in range(LOOPS):
        PLAIN.event.on and PLAIN.event(1, 2)


def site() -> None:
    for _ in range(LOOPS):
        T.post_code.on and T.post_code(1)


def port_write() -> None:
    for _ in range(LOOPS):
        BUS.write(0x80, 1, 0)


BUS = Bus("io", PORT_SPACE)
BUS.claim(0x80, 1, PostPort())


def nanoseconds(loop: Callable[[], None]) -> float:
    """CPU time of one pass of ``loop``'s body: the best round, since noise only adds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        loop()
        best = min(best, time.thread_time_ns() - start)
    return best / LOOPS


def main() -> None:
    base = nanoseconds(empty)
    plain, traced, write = (nanoseconds(loop) - base for loop in (plain_test, site, port_write))
    result = {
        "what": "trace event that is off, per call site",
        "against": "one test of an attribute of an attribute of plain objects",
        "ns_site": round(traced, 1),
        "ns_plain_test": round(plain, 1),
        "ratio": round(traced / plain, 2),
        "ns_port_write_in_python": round(write, 1),
        "share_of_port_write": round(traced / write, 3),
        "python": sys.version.split()[0],
    }
    print(msgspec.json.format(msgspec.json.encode(result)).decode())


if __name__ == "__main__":
    main()
