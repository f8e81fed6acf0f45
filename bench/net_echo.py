"""Round trips a second to a bare-metal network guest: under pyvmm, and under QEMU on the same /dev/kvm.

``guests/net-echo`` polls its virtio-net card and answers at once, so a round trip is what the VMM makes of it: a frame
from a tap to guest memory, a doorbell, a frame back. QEMU is ``-M microvm -accel kvm`` with its user-space virtio-net
(``vhost=off``); both get the same guest, a tap in a namespace of the benchmark's own, and the same client: a socket
that sends one packet and waits for its answer. A round is one life of each VMM. Needs root, and Debian's
qemu-system-x86.

Prints JSON: round trips a second of UDP echo and of ping, and how many times QEMU's they are; and the median of each
round's trips, which shows the way itself where the mean shows how long other work kept the CPUs from it.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from figures import PYVMM, REPOSITORY, child_environment, document, figure, main, paired_ratio

from pyvmm.errors import HostError

sys.path.insert(0, str(REPOSITORY))
from tests.framework.topology import Namespace, namespace, wait_until

ROUNDS = 9
TRIPS = 1500
WARM_UP = 100
TARGET = 0.8
IMAGE = REPOSITORY / "guests" / "net-echo" / "net-echo.elf"
TAP = "echo"
HOST, GUEST = "192.0.2.1", "192.0.2.2"
DEADLINE = 30.0

COMMANDS = {
    "pyvmm": [*PYVMM, "run", str(IMAGE), "--memory", "64M", "--append", f"ip={GUEST}", "--net", f"tap:{TAP}"],
    "qemu": [
        "qemu-system-x86_64", "-M", "microvm", "-accel", "kvm", "-m", "64M", "-nodefaults", "-no-user-config",
        "-display", "none", "-serial", "stdio", "-no-reboot", "-global", "virtio-mmio.force-legacy=false",
        "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel", str(IMAGE), "-append", f"ip={GUEST}",
        "-netdev", f"tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off",
        "-device", "virtio-net-device,netdev=net",
    ],
}  # fmt: skip


@contextlib.contextmanager
def guest(space: Namespace, command: list[str]) -> Iterator[None]:
    """The guest, answering; ended at the end, by the datagram that says so."""
    child = space.start(*command, cwd=REPOSITORY, env=child_environment())
    assert child.stdout is not None
    late = threading.Timer(DEADLINE, child.kill)
    late.start()
    try:
        wait_until(lambda: TAP in space.interfaces() or child.poll() is not None, "the tap")
        if child.poll() is None:
            space.set_up(TAP, f"{HOST}/24")
        if not child.stdout.readline().startswith(b"net-echo: " + GUEST.encode()):
            child.kill()
            raise HostError(f"{command[0]}: {child.communicate()[1].decode().strip() or 'no guest'}")
        yield
        with udp(space) as client:
            client.send(b"quit")
        if child.wait(DEADLINE) != 33:
            raise HostError(f"{command[0]}: status {child.returncode}, not the 33 of the guest's last word")
    finally:
        late.cancel()
        late.join()


def udp(space: Namespace) -> socket.socket:
    client = space.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.settimeout(DEADLINE)
    client.connect((GUEST, 7))
    return client


def udp_trips(space: Namespace) -> tuple[float, float]:
    with udp(space) as client:

        def trip() -> None:
            client.send(b"ping")
            client.recv(100)

        return rate(trip)


def ping_trips(space: Namespace) -> tuple[float, float]:
    with space.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as client:
        client.settimeout(DEADLINE)
        client.connect((GUEST, 0))
        request = struct.pack(">BBHHH", 8, 0, 0xFFFF - 0x0800 - 0x1234 - 1, 0x1234, 1)

        def trip() -> None:
            client.send(request)
            client.recv(100)

        return rate(trip)


def rate(trip: Callable[[], None]) -> tuple[float, float]:
    """Trips a second, and the median trip in microseconds."""
    for _ in range(WARM_UP):
        trip()
    times = []
    for _ in range(TRIPS):
        start = time.perf_counter()
        trip()
        times.append(time.perf_counter() - start)
    return TRIPS / sum(times), statistics.median(times) * 1e6


def measure() -> dict[str, Any]:
    """Both kinds of packet, VMMs in turn."""
    if not IMAGE.exists():
        raise HostError(f"{IMAGE} is not built; run make guests")
    if shutil.which("qemu-system-x86_64") is None:
        raise HostError("qemu-system-x86_64 is not installed: apt install qemu-system-x86")
    trips: dict[str, dict[str, list[tuple[float, float]]]] = {
        kind: {name: [] for name in COMMANDS} for kind in ("udp", "ping")
    }
    with namespace("bench") as space:
        for _ in range(ROUNDS):
            for name, command in COMMANDS.items():
                with guest(space, command):
                    trips["udp"][name].append(udp_trips(space))
                    trips["ping"][name].append(ping_trips(space))
    parts = {
        kind: {
            **{name: figure([each[0] for each in values], "round trips/s", 0) for name, values in of.items()},
            **{f"{name}_median_trip": figure([each[1] for each in values], "us", 1) for name, values in of.items()},
            "ratio": paired_ratio([each[0] for each in of["pyvmm"]], [each[0] for each in of["qemu"]]),
            "ratio_of_median_trips": paired_ratio([each[1] for each in of["qemu"]], [each[1] for each in of["pyvmm"]]),
        }
        for kind, of in trips.items()
    }
    reached = parts["udp"]["ratio"].median
    return document(
        what="round trips to guests/net-echo on a tap, pyvmm",
        against="the same under QEMU microvm, KVM, user-space virtio-net (vhost off)",
        **parts,
        target={"ratio_at_least": TARGET, "value": reached, "met": reached >= TARGET},
    )


if __name__ == "__main__":
    main(measure)
