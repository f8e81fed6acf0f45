"""The stage that the other tests here play on: it is real, apart from the host, and leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.framework.topology import Topology, interfaces_here, namespace, namespaces_here, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_namespace_is_apart_from_the_host() -> None:
    before = namespaces_here()
    with namespace("apart") as space:
        assert space.interfaces() == {"lo"}
        assert space.run("cat", "/proc/self/net/dev").stdout.count(b":") == 1
        assert space.call(lambda: os.readlink("/proc/thread-self/ns/net")) != os.readlink("/proc/self/ns/net")
        assert namespaces_here() - before, "the check that nothing stays would not see it"


def test_two_namespaces_talk_over_a_cable() -> None:
    with Topology() as topology:
        one, other = topology.namespace("one"), topology.namespace("other")
        topology.veth((one, "cable", "192.0.2.1/24"), (other, "cable", "192.0.2.2/24"))
        server = one.call(lambda: socket.create_server(("192.0.2.1", 7)))
        client = other.call(lambda: socket.create_connection(("192.0.2.1", 7), 10))
        with server, client:
            client.sendall(b"hello")
            peer, address = server.accept()
            with peer:
                assert (peer.recv(5), address[0]) == (b"hello", "192.0.2.2")


def test_a_bridge_joins_its_ports() -> None:
    with Topology() as topology:
        hub, one, other = (topology.namespace(name) for name in ("hub", "one", "other"))
        topology.veth((hub, "p1", None), (one, "cable", "192.0.2.1/24"))
        topology.veth((hub, "p2", None), (other, "cable", "192.0.2.2/24"))
        topology.bridge(hub, "br", ("p1", "p2"))
        with one.call(lambda: socket.create_server(("192.0.2.1", 7))):
            other.call(lambda: socket.create_connection(("192.0.2.1", 7), 10)).close()


def test_all_is_gone_also_after_a_failure() -> None:
    before = namespaces_here(), interfaces_here()
    with pytest.raises(ZeroDivisionError), Topology() as topology:
        space = topology.namespace("failing")
        topology.bridge(space, "br", address="192.0.2.1/24")
        child = space.start("sleep", "1000")
        _ = 1 // 0
    assert child.returncode == -signal.SIGKILL
    assert (namespaces_here(), interfaces_here()) == before


KILLED = """
import time
from pyroute2 import IPRoute
from tests.framework.topology import Topology
inner = Topology().namespace("inner")
with IPRoute() as route:
    route.link("add", ifname="cable", kind="veth", peer={"ifname": "cable", "net_ns_fd": inner.fd})
print("ready", flush=True)
time.sleep(1000)
"""


def test_all_is_gone_also_when_the_test_is_killed() -> None:
    with namespace("outer") as space:
        child = space.start(sys.executable, "-c", KILLED, cwd=REPOSITORY)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert space.interfaces() == {"lo", "cable"}
        child.kill()  # nsenter became Python: it is the process that holds the inner namespace
        wait_until(lambda: space.interfaces() == {"lo"}, "the cable into the dead test's namespace is gone")


def test_an_exception_inside_comes_out() -> None:
    with namespace("raising") as space, pytest.raises(FileNotFoundError):
        space.call(lambda: os.stat("/nonexistent"))
