"""Translation between a guest's side and the outside: who gets through, as whom, and what is left afterwards."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pyvmm.net import nat
from pyvmm.net.links import set_option
from tests.framework.net_commands import net, net_refused, networks
from tests.framework.topology import Namespace, Topology

ANSWER = 5.0


@dataclass
class Stage:
    """guest -- (pvm-demo) host (up0) -- outside. The guest is a namespace on a veth where a VM has its tap."""

    topology: Topology
    guest: Namespace
    host: Namespace
    outside: Namespace


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Topology() as topology:
        guest, host, outside = (topology.namespace(name) for name in ("guest", "host", "outside"))
        missing = host.call(nat.missing)
        if missing is not None:
            pytest.skip(missing)
        topology.veth((host, "up0", "192.0.2.1/24"), (outside, "up0", "192.0.2.2/24"))
        host.default_route("192.0.2.2")
        outside.default_route("192.0.2.1")  # so that only the host decides what gets to the guest
        yield Stage(topology, guest, host, outside)


def plug_in(stage: Stage, network: str = "demo", address: str = "10.91.0.2/24", gateway: str = "10.91.0.1") -> None:
    port = f"port-{network}"
    stage.topology.veth((stage.host, port, None), (stage.guest, port, address))

    def inside() -> None:
        from pyvmm.net.bridge import attach

        attach(port, f"pvm-{network}")

    stage.host.call(inside)
    if network == "demo":
        stage.guest.default_route(gateway)


def forwarding(space: Namespace) -> dict[str, str]:
    def inside() -> dict[str, str]:
        found = {}
        for device in space.interfaces():
            with open(f"/proc/sys/net/ipv4/conf/{device}/forwarding", encoding="ascii") as file:
                found[device] = file.read().strip()
        return found

    return space.call(inside)


def tables(space: Namespace) -> dict[str, int]:
    """nftables' tables -> number of rules."""

    def inside() -> dict[str, int]:
        from pyroute2.nftables.main import NFTables

        with NFTables(nfgen_family=2) as nft:
            names = [message.get_attr("NFTA_TABLE_NAME") for message in nft.get_tables()]
            rules = [message.get_attr("NFTA_RULE_TABLE") for message in nft.get_rules()]
        return {name: rules.count(name) for name in names}

    return space.call(inside)


def asks(client: Namespace, server: Namespace, address: str, seconds: float = ANSWER) -> str:
    """Send a datagram from ``client`` to ``address`` in ``server``, which answers; whom the server saw."""
    listener = server.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    caller = client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with listener, caller:
        listener.bind((address, 0))
        listener.settimeout(seconds)
        caller.settimeout(seconds)
        caller.sendto(b"who am I", (address, listener.getsockname()[1]))
        question, (seen, port) = listener.recvfrom(64)
        listener.sendto(question, (seen, port))
        assert caller.recv(64) == b"who am I"
        return str(seen)


def test_a_guest_reaches_the_outside_in_the_hosts_name(stage: Stage) -> None:
    assert "translated to up0" in net(stage.host, "up", "demo", "--nat")
    plug_in(stage)
    assert asks(stage.guest, stage.outside, "192.0.2.2") == "192.0.2.1"
    assert asks(stage.guest, stage.host, "10.91.0.1") == "10.91.0.2", "to the host itself in its own name"
    assert asks(stage.host, stage.guest, "10.91.0.2") == "10.91.0.1"
    assert networks(stage.host)["demo"]["uplink"] == "up0"


@pytest.mark.parametrize("router", [False, True])
def test_nobody_outside_reaches_a_guest(stage: Stage, router: bool) -> None:
    set_forwarding(stage.host, "up0", router)
    net(stage.host, "up", "demo", "--nat")
    plug_in(stage)
    with pytest.raises(TimeoutError):
        asks(stage.outside, stage.guest, "10.91.0.2", 0.5)
    assert asks(stage.guest, stage.outside, "192.0.2.2") == "192.0.2.1", "the way is there, in one direction"


def test_without_nat_a_guest_reaches_the_host_only(stage: Stage) -> None:
    set_forwarding(stage.host, "up0", True)  # so that the answer's way is there
    net(stage.host, "up", "demo")
    plug_in(stage)
    assert asks(stage.guest, stage.host, "10.91.0.1") == "10.91.0.2"
    with pytest.raises(TimeoutError):
        asks(stage.guest, stage.outside, "192.0.2.2", 0.5)


def test_the_host_becomes_no_router_for_others(stage: Stage) -> None:
    """up0 did not forward before, so nothing new that comes in by it is passed on, to no network."""
    other = stage.topology.namespace("other")
    stage.topology.veth((stage.host, "side", "198.51.100.1/24"), (other, "side", "198.51.100.2/24"))
    other.default_route("198.51.100.1")
    set_forwarding(stage.host, "side", True)
    net(stage.host, "up", "demo", "--nat")
    with pytest.raises(TimeoutError):
        asks(stage.outside, other, "198.51.100.2", 0.5)


def test_down_gives_everything_back_and_touches_nothing_else(stage: Stage) -> None:
    make_table(stage.host, "somebody")
    before = forwarding(stage.host), tables(stage.host)
    net(stage.host, "up", "demo", "--nat")
    assert tables(stage.host) == {"somebody": 0, "pyvmm-demo": 3}
    assert forwarding(stage.host) == {"lo": "0", "up0": "1", "pvm-demo": "1"}
    net(stage.host, "up", "demo")
    assert tables(stage.host) == {"somebody": 0, "pyvmm-demo": 3}, "again is the same"
    net(stage.host, "down", "demo")
    assert (forwarding(stage.host), tables(stage.host)) == before


def test_forwarding_that_was_on_stays_on(stage: Stage) -> None:
    set_forwarding(stage.host, "up0", True)
    net(stage.host, "up", "demo", "--nat")
    assert tables(stage.host) == {"pyvmm-demo": 2}, "a router stays one: no rule about others' packets"
    net(stage.host, "down", "demo")
    assert forwarding(stage.host)["up0"] == "1"


def test_the_last_of_two_networks_gives_forwarding_back(stage: Stage) -> None:
    net(stage.host, "up", "demo", "--nat")
    net(stage.host, "up", "second", "--nat")
    plug_in(stage)
    plug_in(stage, "second", "10.91.1.2/24")
    net(stage.host, "down", "second", "--force")
    assert asks(stage.guest, stage.outside, "192.0.2.2") == "192.0.2.1", "the first goes on"
    net(stage.host, "down", "demo", "--force")
    assert forwarding(stage.host)["up0"] == "0"


def test_a_bridge_removed_by_hand_leaves_nothing_that_down_does_not_find(stage: Stage) -> None:
    net(stage.host, "up", "demo", "--nat")

    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("del", index=route.link_lookup(ifname="pvm-demo")[0])

    stage.host.call(inside)
    assert net(stage.host, "down", "demo") == "network demo is down\n"
    assert (tables(stage.host), forwarding(stage.host)) == ({}, {"lo": "0", "up0": "0"})


def test_a_refused_nat_leaves_no_network(stage: Stage) -> None:
    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.route("del", dst="default", gateway="192.0.2.2")

    stage.host.call(inside)
    assert "no default route" in net_refused(stage.host, "up", "demo", "--nat")
    assert (tables(stage.host), stage.host.interfaces()) == ({}, {"lo", "up0"})


def make_table(space: Namespace, name: str) -> None:
    def inside() -> None:
        from pyroute2.nftables.main import NFTables

        with NFTables(nfgen_family=2) as nft:
            nft.table("add", name=name)

    space.call(inside)


def set_forwarding(space: Namespace, device: str, on: bool) -> None:
    space.call(lambda: set_option("ipv4", device, "forwarding", on))
