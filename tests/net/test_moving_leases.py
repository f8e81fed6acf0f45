"""A lease that goes with its guest from one tap to another."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from pyvmm.errors import ConfigError, HostError
from pyvmm.net.announcement import self_announcement
from pyvmm.net.cards import MovingCard
from pyvmm.net.leases import Lease, await_guest, join
from pyvmm.net.links import find_link, learned_addresses, open_route
from pyvmm.net.mac import parse_mac
from pyvmm.net.tap import HEADER_SIZE, Tap
from tests.framework.net_commands import demo_host, net, net_refused, standing
from tests.framework.topology import Namespace, namespace, wait_until

MAC = "52:00:00:00:00:09"


@pytest.fixture
def host() -> Iterator[Namespace]:
    with demo_host() as space:
        yield space


@pytest.fixture
def source(host: Namespace) -> Iterator[Lease]:
    with host.call(lambda: join("demo", "box")) as lease:
        yield lease


@pytest.fixture
def target(host: Namespace, source: Lease) -> Iterator[Lease]:
    with host.call(lambda: await_guest("demo", "next")) as lease:
        yield lease


def card_of(lease: Lease) -> MovingCard:
    assert lease.record is not None
    return MovingCard(lease.record.mac, lease.record.id, lease.record.address)


def send(lease: Lease, frame: bytes) -> None:
    """As the guest does."""
    os.write(lease.tap.fd, bytes(HEADER_SIZE) + frame)


def frames_of(lease: Lease) -> list[bytes]:
    """What waits for the guest."""
    found = []
    try:
        while True:
            found.append(os.read(lease.tap.fd, 4096)[HEADER_SIZE:])
    except BlockingIOError:
        return found


def port_of(space: Namespace, mac: str) -> str | None:
    """Where the bridge looks for ``mac``."""

    def inside() -> str | None:
        with open_route() as route:
            bridge = find_link(route, "pvm-demo")
            assert bridge is not None
            return learned_addresses(route, bridge).get(mac)

    return space.call(inside)


def broadcast(space: Namespace, word: bytes) -> None:
    """To everybody on the network, from the host."""

    def inside() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sender.bind(("10.91.0.1", 0))
            sender.sendto(word, ("10.91.0.255", 9))

    space.call(inside)


def send_from_host(space: Namespace, frame: bytes) -> None:
    """Out of the bridge's own interface."""

    def inside() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind(("pvm-demo", 0))
            sender.send(frame)

    space.call(inside)


def test_a_lease_goes_from_tap_to_tap_and_is_never_free(host: Namespace, source: Lease, target: Lease) -> None:
    address, mac = str(source.address), source.mac
    assert standing(host) == {"box": ("connected", address, mac), "next": ("waiting", "", "")}
    host.call(lambda: target.succeed(card_of(source)))
    assert standing(host) == {"box": ("connected", address, mac), "next": ("moving", address, mac)}
    with pytest.raises(ConfigError, match="has it"):
        host.call(lambda: join("demo", "third", mac=mac))
    source.tap.release()
    assert standing(host)["box"][0] == "moving"
    target.tap.claim()
    assert standing(host) == {"box": ("moving", address, mac), "next": ("connected", address, mac)}
    host.call(source.leave)
    assert standing(host) == {"next": ("connected", address, mac)}
    assert (str(target.address), target.mac) == (address, mac)
    with host.call(lambda: join("demo", "third")) as third:
        assert third.address != target.address


def test_a_waiting_tap_is_silent(host: Namespace, source: Lease, target: Lease) -> None:
    host.call(lambda: target.succeed(card_of(source)))
    wait_until(lambda: (broadcast(host, b"before"), bool(frames_of(source)))[1], "the source's port forwards")
    assert frames_of(target) == []
    with pytest.raises(OSError, match="Input/output error"):
        send(target, self_announcement(parse_mac(source.mac)))
    assert port_of(host, source.mac) is None, "learnt from a tap that is down"


def test_the_bridge_looks_for_the_guest_where_it_is_now(host: Namespace, source: Lease, target: Lease) -> None:
    announcement = self_announcement(parse_mac(source.mac))
    wait_until(lambda: (send(source, announcement), port_of(host, source.mac))[1] == "vm-box", "learnt at the source")
    host.call(lambda: target.succeed(card_of(source)))
    source.tap.release()
    assert port_of(host, source.mac) is None, "forgotten with the port's link"
    target.tap.claim()
    send(target, announcement)
    assert port_of(host, source.mac) == "vm-next", "the first frame after the tap is up is heard"
    broadcast(host, b"after")
    assert any(b"after" in frame for frame in frames_of(target))
    assert not any(b"after" in frame for frame in frames_of(source))


def test_what_comes_while_the_guest_stands_still_waits_for_it(host: Namespace, source: Lease, target: Lease) -> None:
    announcement = self_announcement(parse_mac(source.mac))
    wait_until(lambda: (send(source, announcement), port_of(host, source.mac))[1] == "vm-box", "learnt at the source")
    host.call(lambda: target.succeed(card_of(source)))
    target.tap.claim()
    target.tap.announce(announcement)  # the source's is up: the bridge always has a port
    assert port_of(host, source.mac) == "vm-next"
    frames_of(source)
    frame = parse_mac(source.mac) + bytes.fromhex("020000000001 88b5") + b"for the guest".ljust(50)
    wait_until(lambda: (send_from_host(host, frame), frame in frames_of(target))[1], "it waits at the target")
    assert frame not in frames_of(source)


def test_a_target_that_dies_leaves_the_lease_with_the_source(host: Namespace, source: Lease, target: Lease) -> None:
    host.call(lambda: target.succeed(card_of(source)))
    source.tap.release()
    target.close()
    host.call(source.take_back)
    source.tap.claim()
    assert standing(host) == {"box": ("connected", str(source.address), source.mac)}


def test_a_source_that_dies_leaves_it_with_the_target(host: Namespace, source: Lease, target: Lease) -> None:
    host.call(lambda: target.succeed(card_of(source)))
    source.close()
    target.tap.claim()
    assert standing(host) == {"next": ("connected", str(target.address), target.mac)}


def test_the_source_takes_nothing_back_that_runs_elsewhere(host: Namespace, source: Lease, target: Lease) -> None:
    host.call(lambda: target.succeed(card_of(source)))
    source.tap.release()
    target.tap.claim()
    for _ in ("before it has left", "after"):
        with pytest.raises(HostError, match=r"VM next .* has the guest's place"):
            host.call(source.take_back)
        host.call(source.leave)
    target.close()
    host.call(source.take_back)
    source.tap.claim()
    assert standing(host) == {"box": ("connected", str(source.address), source.mac)}


def test_somebody_else_may_have_the_place_by_then(host: Namespace, source: Lease, target: Lease) -> None:
    host.call(lambda: target.succeed(card_of(source)))
    host.call(source.leave)
    target.close()
    with (
        host.call(lambda: join("demo", "third")) as third,
        pytest.raises(HostError, match=r"VM third \(vm-third\)"),
    ):
        assert third.address == source.address
        host.call(source.take_back)


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (lambda box: MovingCard(box.mac, "0" * 16, "10.91.0.77"), r"has .*, which VM box \(vm-box\) has here"),
        (lambda box: MovingCard(MAC, "0" * 16, str(box.address)), "10.91.0.2, which VM box has here"),
        (lambda box: MovingCard(MAC, "0" * 16, "10.92.0.5"), "no guest's address in 10.91.0.0/24"),
        (lambda box: MovingCard(box.mac), r"which VM box \(vm-box\) has here"),
    ],
)
def test_a_guest_from_another_host_must_fit_in(
    host: Namespace, source: Lease, target: Lease, card: object, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        host.call(lambda: target.succeed(card(source)))  # type: ignore[operator]
    assert standing(host)["next"] == ("waiting", "", "")


def test_a_guest_from_another_host_keeps_its_address(host: Namespace, target: Lease) -> None:
    host.call(lambda: target.succeed(MovingCard(MAC, "0123456789abcdef", "10.91.0.77"), mac=MAC.upper()))
    assert standing(host)["next"] == ("moving", "10.91.0.77", MAC)
    host.call(lambda: target.succeed(MovingCard(MAC)))  # one that had no lease gets an address
    assert standing(host)["next"] == ("moving", "10.91.0.3", MAC)
    with pytest.raises(ConfigError, match="mac=52:00:00:00:00:01: the guest that comes has"):
        host.call(lambda: target.succeed(MovingCard(MAC), mac="52:00:00:00:00:01"))


def test_a_network_with_a_tap_that_waits_is_in_use(host: Namespace, source: Lease, target: Lease) -> None:
    assert "in use by box (vm-box), next (vm-next)" in net_refused(host, "down", "demo")
    net(host, "down", "demo", "--force")
    net(host, "up", "demo", "--cidr", "10.91.0.0/24")
    assert standing(host)["next"] == ("waiting", "", "")
    assert not target.tap.up, "up again because its network was made again"


def test_a_tap_of_its_owners_stays_up_and_loses_what_was_meant_for_the_other_side() -> None:
    with namespace("host") as space:

        def inside() -> None:
            import fcntl

            with Tap("mine0") as tap:
                fcntl.ioctl(tap.fd, 0x400454CB, 1)  # TUNSETPERSIST, <linux/if_tun.h>
            with Tap("mine0") as tap:
                tap.bring_up()
                space.set_up("mine0", "192.0.2.1/24")
                tap.release()
                assert tap.up
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    for word in (b"stale", b"more"):
                        sender.sendto(word, ("192.0.2.2", 9))  # an ARP request comes, first of all
                tap.claim()
                with pytest.raises(BlockingIOError):
                    os.read(tap.fd, 4096)
                tap.claim()  # nothing to do
            with Tap("mine0") as tap:
                fcntl.ioctl(tap.fd, 0x400454CB, 0)

        space.call(inside)


def test_a_tap_that_is_made_for_the_guest_goes_down_and_up_with_it() -> None:
    with namespace("host") as space, space.call(lambda: Tap("mine0")) as tap:
        tap.bring_up()
        tap.release()
        assert not tap.up
        tap.claim()
        assert tap.up
