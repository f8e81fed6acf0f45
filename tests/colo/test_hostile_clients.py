"""Clients that mean harm, or mean nothing: floods, frames that are none, and more than a pair can hold.

All of it goes through the whole chain: bridge, tap, the primary's filters, the replica's, compare. The guest is
guests/net-echo; an honest client is served before, in between, and afterwards, also by the survivor.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.colo.test_pair import MODES, kill
from tests.colo.test_protected_network import ECHO
from tests.framework.echo_client import GUEST, MAC, echo_client, echoed
from tests.framework.net_commands import demo_host
from tests.framework.pairs import PATIENT, colo_stats, pairs, wait_alone
from tests.framework.topology import Namespace
from tests.lab.selection import long_form
from tests.unit.net.packets import ICMP, ICMP6, SYN, TCP, UDP, internet_sum, ipv4, ipv6

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]
BRIDGE = "pvm-demo"
HEAD = bytes.fromhex(MAC.replace(":", "")) + bytes.fromhex("020000000099")
FLOOD, FUZZ = (50_000, 100_000) if long_form() else (8_000, 4_000)
BETWEEN = 1_000
"""Frames after which the honest client asks again."""
ARP, IPV4, IPV6, VLAN = 0x0806, 0x0800, 0x86DD, 0x8100


@pytest.fixture
def host() -> Iterator[Namespace]:
    with demo_host() as space:
        yield space


@contextlib.contextmanager
def wire(host: Namespace) -> Iterator[socket.socket]:
    """Frames as they are, from the host's place on the bridge."""
    with host.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as raw:
        host.call(lambda: raw.bind((BRIDGE, 0)))
        raw.settimeout(5)
        yield raw


def send(raw: socket.socket, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # ENOBUFS, EMSGSIZE: the kernel's affair, the next one may fit
        raw.send(frame)


def syn(draw: random.Random) -> bytes:
    """From anywhere."""
    ports = (draw.randrange(1, 65536), draw.choice((7, 80, 443)))
    segment = struct.pack(">HHIIBBHHH", *ports, draw.getrandbits(32), 0, 0x50, SYN, 1024, 0, 0)
    source = f"10.91.{draw.randrange(1, 255)}.{draw.randrange(1, 255)}"
    return HEAD + struct.pack(">H", IPV4) + ipv4(source, GUEST, TCP, segment)


def well_formed(draw: random.Random) -> bytes:
    """Something that one of the parsers is for."""
    payload = draw.randbytes(draw.choice((0, 1, 8, 64, 600)))
    ports = struct.pack(">HH", draw.randrange(65536), draw.choice((7, 9, 80)))
    kind = draw.randrange(6)
    if kind == 0:
        segment = ports + draw.randbytes(8) + bytes([draw.randrange(256), draw.randrange(256)]) + draw.randbytes(6)
        return HEAD + struct.pack(">H", IPV4) + ipv4("10.91.0.1", GUEST, TCP, segment + payload)
    if kind == 1:
        datagram = ports + struct.pack(">HH", 8 + len(payload), 0) + payload
        fragment = draw.choice((0, 0x4000, 0x2000, draw.randrange(65536)))
        options = draw.randbytes(4 * draw.randrange(3))
        packet = ipv4("10.91.0.1", GUEST, UDP, datagram, fragment=fragment, options=options)
        return HEAD + struct.pack(">H", IPV4) + packet
    if kind == 2:
        echo = struct.pack(">BBHI", 8, 0, 0, draw.getrandbits(32)) + payload
        echo = echo[:2] + struct.pack(">H", ~internet_sum(echo) & 0xFFFF) + echo[4:]
        return HEAD + struct.pack(">H", IPV4) + ipv4("10.91.0.1", GUEST, ICMP, echo)
    if kind == 3:
        chain = bytes([draw.choice((0, 43, 44, 60, UDP)), draw.randrange(4)]) + draw.randbytes(6)
        first = draw.choice((0, 43, 44, 60))
        return HEAD + struct.pack(">H", IPV6) + ipv6(
            "fe80::1", "fe80::5054:ff:fe00:7", ICMP6, payload, extensions=chain, first=first
        )  # fmt: skip
    if kind == 4:
        addresses = draw.randbytes(10) + socket.inet_aton("10.91.0.1") + bytes(6) + socket.inet_aton(GUEST)
        return HEAD + struct.pack(">H", ARP) + struct.pack(">HHBBH", 1, IPV4, 6, 4, draw.choice((1, 2))) + addresses[4:]
    tags = b"".join(struct.pack(">HH", VLAN, draw.randrange(65536)) for _ in range(draw.randrange(1, 4)))
    return HEAD + tags + struct.pack(">H", IPV4) + ipv4("10.91.0.1", GUEST, UDP, ports + struct.pack(">HH", 8, 0))


def damaged(draw: random.Random) -> bytes:
    """One of those with bits turned, cut short, or gone on."""
    frame = bytearray(well_formed(draw))
    for _ in range(draw.randrange(4)):
        frame[draw.randrange(12, len(frame))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        del frame[draw.randrange(14, len(frame) + 1) :]
    if draw.random() < 0.2:
        frame += draw.randbytes(draw.randrange(1, 200))
    return bytes(frame[:1514]).ljust(14, b"\0")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("make", "count"), [(syn, FLOOD), (damaged, FUZZ)], ids=["SYN flood", "fuzzed frames"])
def test_the_pair_and_its_honest_client_live_on(
    tmp_path: Path, host: Namespace, make: type[object], count: int, mode: str
) -> None:
    seed = int(os.environ.get("PYVMM_SEED", "1"))
    draw = random.Random(seed)
    print(f"PYVMM_SEED={seed}")
    with pairs(tmp_path, ECHO) as pair, echo_client(host, 0.5) as client, wire(host) as raw:
        primary, secondary = pair.start(*MODES[mode], inside=host)
        echoed(client, b"before")
        for number in range(count):
            send(raw, make(draw))  # type: ignore[call-arg, arg-type]
            if number % BETWEEN == 0:
                echoed(client, b"in the middle of it, %d" % number, 30)
        stats = colo_stats(primary)
        assert stats["checkpoints"] >= 1 and primary.process.poll() is None and secondary.process.poll() is None
        echoed(client, b"afterwards", 30)
        kill(primary)
        wait_alone(secondary)
        echoed(client, b"from the other one", 30)
        secondary.quit()


@pytest.mark.parametrize("who", ["primary", "secondary"])
def test_more_than_the_queues_hold_while_one_of_them_hangs(tmp_path: Path, host: Namespace, who: str) -> None:
    """It stands still for half a second, which is no reason for a failover here, and frames come all the time: the tap
    of a primary that hangs is full, the queue of one that waits for its secondary's answers is.
    """
    with pairs(tmp_path, ECHO) as pair, echo_client(host, 0.5) as client, wire(host) as raw:
        words = ("--object", "colo-compare,id=c,max_queue_size=8")
        primary, secondary = pair.start("--colo-mode", "hybrid", *PATIENT, *words, inside=host)
        echoed(client, b"before")
        stopped = {"primary": primary, "secondary": secondary}[who]
        stopped.process.send_signal(signal.SIGSTOP)
        try:
            until = time.monotonic() + 0.5
            number = 0
            while time.monotonic() < until or number < 3000:
                number += 1
                datagram = struct.pack(">HHHHI", 5000, 7, 12, 0, number)
                send(raw, HEAD + struct.pack(">H", IPV4) + ipv4("10.91.0.1", GUEST, UDP, datagram))
        finally:
            stopped.process.send_signal(signal.SIGCONT)
        echoed(client, b"afterwards", 30)
        if who == "secondary":
            said = [one["what"] for one in colo_stats(primary)["differences"]]
            assert any("udp" in each and "too much waits for the secondary" in each for each in said), said
        kill(primary)
        wait_alone(secondary)
        echoed(client, b"from the other one", 30)
        secondary.quit()
