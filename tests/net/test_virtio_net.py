"""virtio-net on real KVM and real taps: guests/net-echo talks to clients in namespaces of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import HostError
from pyvmm.net.tap import OFFLOAD_CSUM, OFFLOAD_TSO4, Tap
from tests.framework.processes import PYVMM, REPOSITORY
from tests.framework.topology import Namespace, Topology, namespace, wait_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]

HOST, GUEST = "192.0.2.1", "192.0.2.2"
DEADLINE = 20.0


class Echo:
    """A running ``pyvmm run guests/net-echo``."""

    def __init__(self, space: Namespace, net: str, *options: str) -> None:
        self.space = space
        self.child = space.start(
            PYVMM, "run", "guests/net-echo", "--append", f"ip={GUEST}", "--timeout", "60", "--net", net, *options,
            cwd=REPOSITORY,
        )  # fmt: skip

    def ready(self) -> str:
        """Wait for the guest; the address it says it has."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline().decode()
        assert line.startswith(f"net-echo: {GUEST} at "), line + self.finish()[1]
        return line.split()[-1]

    def finish(self) -> tuple[int, str]:
        """Status and the rest of what it said."""
        out, err = self.child.communicate(timeout=DEADLINE)
        return self.child.returncode, (out + err).decode()


def udp(space: Namespace) -> socket.socket:
    made = space.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.settimeout(DEADLINE)
    made.connect((GUEST, 7))
    return made


def quit_guest(space: Namespace, echo: Echo) -> str:
    with udp(space) as client:
        client.send(b"quit")
        assert client.recv(100) == b"quit"
    status, said = echo.finish()
    assert status == 33, said
    return said


def checksum(data: bytes) -> int:
    """RFC 1071."""
    words = struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1])
    total: int = sum(words) + (data[-1] << 8 if len(data) & 1 else 0)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(space: Namespace, payload: bytes) -> bytes:
    """The ICMP message that answers an echo request with ``payload``."""
    with space.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as raw:
        raw.settimeout(DEADLINE)
        raw.connect((GUEST, 0))
        head = struct.pack(">BBHHH", 8, 0, 0, 0x1234, 7)
        raw.send(head[:2] + struct.pack(">H", checksum(head + payload)) + head[4:] + payload)
        return raw.recv(65536)[20:]


@pytest.mark.kvm
def test_a_guest_on_a_tap_answers_arp_ping_and_udp_with_correct_checksums(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with namespace("host") as space:
        echo = Echo(space, "tap:echo0,mac=52:54:00:00:00:07", "--report", str(report))
        wait_until(lambda: "echo0" in space.interfaces(), "the tap")
        space.set_up("echo0", f"{HOST}/24")
        assert echo.ready() == "52:54:00:00:00:07"
        sniffer = space.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)))
        with sniffer, udp(space) as client:
            sniffer.bind(("echo0", 0))
            sniffer.settimeout(DEADLINE)
            for size in (0, 1, 2, 3, 64, 1471, 1472):
                data = os.urandom(size)
                client.send(data)
                assert client.recv(2000) == data
            seen = 0
            while seen < 7:  # what the guest sent, as it was on the wire: this host's stack need not have looked
                packet, address = sniffer.recvfrom(65536)
                if address[2] == socket.PACKET_OUTGOING:
                    continue
                ip = packet[14:]
                pseudo = ip[12:20] + struct.pack(">BBH", 0, 17, len(ip) - 20)
                assert checksum(ip[:20]) == 0 and checksum(pseudo + ip[20:]) == 0
                seen += 1
        for size in (0, 1, 56, 1472):
            payload = os.urandom(size)
            answer = ping(space, payload)
            assert (answer[0], answer[8:], checksum(answer)) == (0, payload, 0)
        with udp(space) as client:
            client.send(bytes(5000))  # in fragments, which this guest does not put together
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(100)
        said = quit_guest(space, echo)
        assert "1 ARP, 4 ICMP, 8 UDP" in said
        wait_until(lambda: "echo0" not in space.interfaces(), "the tap goes with its machine")
    counters = json.loads(report.read_text())["statistics"]["devices"]["virtio-net"]
    assert counters["tx_frames"] == 13 and counters["tx_malformed"] == counters["tx_refused"] == 0


@pytest.mark.kvm
def test_a_guest_behind_a_bridge_serves_a_client_in_its_own_namespace() -> None:
    with Topology() as topology:
        host, client = topology.namespace("host"), topology.namespace("client")
        topology.veth((host, "port", None), (client, "eth0", f"{HOST}/24"))

        def persistent() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as route:
                route.link("add", ifname="echo0", kind="tuntap", mode="tap")

        host.call(persistent)
        topology.bridge(host, "br", ("port", "echo0"))
        echo = Echo(host, "tap:echo0")
        echo.ready()
        with udp(client) as peer:
            for number in range(500):
                data = number.to_bytes(4, "big") * 50
                peer.send(data)
                assert peer.recv(2000) == data
        quit_guest(client, echo)
        assert "echo0" in host.interfaces(), "a persistent tap is not this machine's to remove"


@pytest.mark.kvm
def test_a_tap_that_is_deleted_is_a_link_that_is_down(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with namespace("host") as space:
        echo = Echo(space, "tap:echo0", "--timeout", "4", "--report", str(report))
        wait_until(lambda: "echo0" in space.interfaces(), "the tap")
        space.set_up("echo0", f"{HOST}/24")
        echo.ready()

        def delete() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as route:
                route.link("del", index=route.link_lookup(ifname="echo0")[0])

        space.call(delete)
        status, said = echo.finish()
        assert status == 124, said  # it ran on until its time was up
        assert said.count("echo0: File descriptor in bad state: the guest's network link is down") == 1, said


@pytest.mark.kvm
def test_a_guest_over_a_unix_socket_without_any_privilege(tmp_path: Path) -> None:
    """The peer speaks u32 lengths and frames, as passt does."""
    path = tmp_path / "peer"
    with namespace("host") as space, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(DEADLINE)
        echo = Echo(space, f"stream:unix:{path},mac=52:54:00:00:00:07")
        peer, _ = server.accept()
        with peer:
            peer.settimeout(DEADLINE)
            echo.ready()
            guest, mine = bytes.fromhex("525400000007"), bytes.fromhex("020000000001")
            addresses = bytes(map(int, HOST.split("."))), bytes(map(int, GUEST.split(".")))
            request = struct.pack(">HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, mine, addresses[0], bytes(6), addresses[1])
            send(peer, b"\xff" * 6 + mine + b"\x08\x06" + request)
            answer = receive(peer)
            assert answer[:12] == mine + guest and answer[14:42] == struct.pack(
                ">HHBBH6s4s6s4s", 1, 0x800, 6, 4, 2, guest, addresses[1], mine, addresses[0]
            )
            for number in range(300):
                send(peer, datagram(mine, guest, *addresses, number.to_bytes(4, "big") * 25))
                assert receive(peer)[42:] == number.to_bytes(4, "big") * 25
            send(peer, datagram(mine, guest, *addresses, b"quit"))
            assert receive(peer)[42:] == b"quit"
        status, said = echo.finish()
        assert status == 33, said


@pytest.mark.kvm
def test_a_peer_that_speaks_another_language_costs_the_link_only(tmp_path: Path) -> None:
    path = tmp_path / "peer"
    with namespace("host") as space, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(DEADLINE)
        echo = Echo(space, f"stream:unix:{path}", "--timeout", "3")
        peer, _ = server.accept()
        with peer:
            echo.ready()
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            status, said = echo.finish()
        assert (status, said.count("sent a length that no frame has")) == (124, 1), said


def datagram(source: bytes, target: bytes, source_ip: bytes, target_ip: bytes, data: bytes) -> bytes:
    """A UDP datagram to port 7, without a UDP checksum (RFC 768 allows that)."""
    body = struct.pack(">HHHH", 4000, 7, 8 + len(data), 0) + data
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0, source_ip, target_ip)
    head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
    return target + source + b"\x08\x00" + head + body


def send(peer: socket.socket, frame: bytes) -> None:
    peer.sendall(struct.pack(">I", len(frame)) + frame)


def receive(peer: socket.socket) -> bytes:
    size = struct.unpack(">I", peer.recv(4, socket.MSG_WAITALL))[0]
    return peer.recv(size, socket.MSG_WAITALL)


# -- taps themselves ----------------------------------------------------------------------------


@contextlib.contextmanager
def tap_in(space: Namespace, name: str, **options: Any) -> Iterator[Tap]:
    with space.call(lambda: Tap(name, **options)) as tap:
        yield tap


def test_a_tap_comes_and_goes_with_its_descriptor() -> None:
    with namespace("taps") as space:
        with tap_in(space, "t0", mtu=1400) as tap:
            assert "t0" in space.interfaces()
            assert (tap.mtu, tap.persistent, tap.up, len(tap.mac)) == (1400, False, False, 6)
            space.call(tap.bring_up)
            assert tap.up
        assert space.interfaces() == {"lo"}


def test_a_busy_tap_says_who_has_it() -> None:
    with namespace("taps") as space, tap_in(space, "t0"), pytest.raises(HostError) as refused:
        space.call(lambda: Tap("t0"))
    assert f"tap t0: busy: process {os.getpid()} (" in str(refused.value)


def test_an_interface_that_is_no_tap() -> None:
    with namespace("taps") as space, pytest.raises(HostError, match="is no tap"):
        space.call(lambda: Tap("lo"))


def test_not_permitted() -> None:
    program = "from pyvmm.net.tap import Tap, HostError\ntry: Tap('t0')\nexcept HostError as e: print(e)"
    with namespace("taps") as space:
        done = space.run("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-all", sys.executable, "-c", program)
        said = done.stdout.decode()
        assert said.startswith("tap t0: not permitted: it needs CAP_NET_ADMIN, or a tap made for this user"), done
        assert "ip tuntap add dev t0 mode tap user" in said


def test_a_deleted_tap_is_noticed() -> None:
    with namespace("taps") as space, tap_in(space, "t0") as tap:
        space.set_up("t0")

        def delete() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as route:
                route.link("del", index=route.link_lookup(ifname="t0")[0])

        space.call(delete)
        assert select.select([tap], [], [], 1)[0]
        with pytest.raises(OSError, match="bad state"):
            os.read(tap.fd, 2000)
        for ask in (lambda: tap.mtu, lambda: tap.set_offload(0)):
            with pytest.raises(HostError, match="tap t0: cannot"):
                ask()


def test_the_host_completes_what_the_tap_does_not_cope_with() -> None:
    """With TUN_F_CSUM a datagram comes with its checksum still to be made, and its header says so."""
    for offloads in (0, OFFLOAD_CSUM | OFFLOAD_TSO4):
        with namespace("taps") as space, tap_in(space, "t0") as tap:
            tap.set_offload(offloads)
            space.set_up("t0", f"{HOST}/24")
            flags = {frame[0] for frame in udp_frames(space, tap)}
            assert flags == ({1} if offloads else {0})


def udp_frames(space: Namespace, tap: Tap) -> list[bytes]:
    """Headers and datagrams that the host sends to a neighbour that is known."""

    def neighbour() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            index = route.link_lookup(ifname=tap.name)[0]
            route.neigh("add", dst=GUEST, lladdr="52:54:00:00:00:07", ifindex=index, state=128)

    space.call(neighbour)
    with udp(space) as client:
        for _ in range(3):
            client.send(b"hello")
    found: list[bytes] = []
    deadline = time.monotonic() + DEADLINE
    while len(found) < 3 and time.monotonic() < deadline:
        select.select([tap], [], [], 1)
        with contextlib.suppress(BlockingIOError):
            frame = os.read(tap.fd, 70000)
            if frame[24:26] == b"\x08\x00":
                found.append(frame)
    return found
