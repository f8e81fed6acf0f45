"""A guest that moves within a named network: its address, its MAC address, and where the bridge looks for it.

guests/net-echo negotiates no GUEST_ANNOUNCE: what the bridge learns it learns from the host.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.framework.echo_client import GUEST, MAC, echo_client, echoed
from tests.framework.migrating import Side
from tests.framework.net_commands import LeaseHolder, demo_host, standing
from tests.framework.processes import REPOSITORY
from tests.framework.topology import Namespace, wait_until
from tests.net.test_moving_leases import port_of

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]
Start = Callable[..., Side]
ECHO = str(REPOSITORY / "guests" / "net-echo")


@pytest.fixture
def host() -> Iterator[Namespace]:
    with demo_host() as space:
        yield space


@pytest.fixture
def client(host: Namespace) -> Iterator[socket.socket]:
    with echo_client(host, 0.5) as made:
        yield made


def start_echo(start: Start, host: Namespace, name: str, *options: str, where: str = "demo") -> Side:
    return start(name, ECHO, "--append", f"ip={GUEST}", "--net", where, *options, inside=host)


def lost_carriers(host: Namespace) -> int:
    """How often the bridge had no port that was up. The host forgets its neighbours then, and waits a second."""

    def inside() -> int:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            return int(route.get_links(ifname="pvm-demo")[0].get_attr("IFLA_CARRIER_DOWN_COUNT"))

    return host.call(inside)


def arrive(start: Start, host: Namespace, source: Side, name: str, uri: str) -> Side:
    to = start_echo(start, host, name, "--incoming", uri)
    to.wait_for("inmigrate")
    source.migrate(uri)
    assert source.migrated()["status"] == "completed"
    return to


def test_a_guest_keeps_its_place_and_the_bridge_finds_it(
    host: Namespace, start: Start, client: socket.socket, tmp_path: Path
) -> None:
    first = start_echo(start, host, "first", where=f"demo,mac={MAC}")
    echoed(client, b"at first")
    assert port_of(host, MAC) == "vm-first"
    before = lost_carriers(host)
    second = arrive(start, host, first, "second", f"unix:{tmp_path}/a")
    wait_until(lambda: port_of(host, MAC) == "vm-second", "the bridge has been told", 2)
    assert standing(host) == {"second": ("connected", GUEST, MAC)}
    echoed(client, b"at second")
    assert "VM second (vm-second) has it" in " ".join(LeaseHolder(host, "demo", "thief", MAC).answer())
    first.process.kill()  # long after it has given all up
    third = arrive(start, host, second, "third", f"unix:{tmp_path}/b")
    assert lost_carriers(host) == before
    echoed(client, b"at third")
    second.quit()
    echoed(client, b"still at third")
    client.send(b"quit")
    assert third.end()[0] == 33
    wait_until(lambda: standing(host) == {}, "the place is free")


def test_a_killed_destination_leaves_everything_as_it_was(
    host: Namespace, start: Start, client: socket.socket, tmp_path: Path
) -> None:
    source = start_echo(start, host, "source", where=f"demo,mac={MAC}")
    echoed(client, b"before")
    to = start_echo(start, host, "to", "--incoming", f"unix:{tmp_path}/m")
    to.wait_for("inmigrate")
    assert standing(host)["to"] == ("waiting", "", "")
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=1 << 16)
    wait_until(lambda: standing(host)["to"] == ("moving", GUEST, MAC), "the lease is on its way")
    assert standing(host)["source"] == ("connected", GUEST, MAC)
    to.process.kill()
    assert source.migrated()["status"] == "failed"
    echoed(client, b"after")
    wait_until(lambda: standing(host) == {"source": ("connected", GUEST, MAC)}, "the lease is the source's alone")


def test_a_killed_source_frees_the_place(
    host: Namespace, start: Start, client: socket.socket, tmp_path: Path
) -> None:
    source = start_echo(start, host, "source", where=f"demo,mac={MAC}")
    echoed(client, b"before")
    to = start_echo(start, host, "to", "--incoming", f"unix:{tmp_path}/m")
    to.wait_for("inmigrate")
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=1 << 16)
    wait_until(lambda: standing(host)["to"][0] == "moving", "the lease is on its way")
    source.process.kill()
    assert to.end()[0] == 125
    wait_until(lambda: standing(host) == {}, "the place is free")
    assert LeaseHolder(host, "demo", "next", MAC).answer()[1:] == [GUEST, MAC]


def test_another_address_than_the_guests_is_refused(
    host: Namespace, start: Start, client: socket.socket, tmp_path: Path
) -> None:
    source = start_echo(start, host, "source", where=f"demo,mac={MAC}")
    echoed(client, b"before")
    uri = f"unix:{tmp_path}/m"
    to = start_echo(start, host, "to", "--incoming", uri, where="demo,mac=52:54:00:00:00:08")
    to.wait_for("inmigrate")
    source.migrate(uri)
    info = source.migrated()
    assert info["status"] == "failed" and f"the guest that comes has {MAC}" in info["error-desc"], info
    assert to.end()[0] == 125
    echoed(client, b"after")
