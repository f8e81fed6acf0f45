"""Leases: two at once, crashes, MAC addresses, and taps that were left over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.errors import ConfigError
from pyvmm.net.leases import join
from tests.framework.net_commands import LeaseHolder, net, net_refused, networks
from tests.framework.topology import Namespace, namespace, wait_until


@pytest.fixture
def host() -> Iterator[Namespace]:
    with namespace("host") as space:
        net(space, "up", "demo")
        yield space


def taken(space: Namespace) -> dict[str, str]:
    """VM -> address, as the kernel has it."""
    return {vm["vm"]: vm["address"] for vm in networks(space)["demo"]["vms"]}


def test_many_that_start_at_once_get_addresses_of_their_own(host: Namespace) -> None:
    holders = [LeaseHolder(host, "demo", "web") for _ in range(6)]
    answers = [holder.answer() for holder in holders]
    for kind, column in (("taps", 0), ("addresses", 1), ("MAC addresses", 2)):
        assert len({answer[column] for answer in answers}) == 6, (kind, answers)
    assert {answer[1] for answer in answers} == {f"10.91.0.{number}" for number in range(2, 8)}
    assert {answer[0] for answer in answers} == {"vm-web", *(f"vm-web-{number}" for number in range(2, 7))}


def test_a_killed_vm_gives_its_lease_back(host: Namespace) -> None:
    first, second = LeaseHolder(host, "demo", "a"), LeaseHolder(host, "demo", "b")
    answer = first.answer()
    assert second.answer()[1] != answer[1]
    first.kill()
    wait_until(lambda: "vm-a" not in host.interfaces(), "the dead VM's tap is gone")
    again = LeaseHolder(host, "demo", "a")
    assert again.answer() == answer, "the same VM: the same tap, address and MAC address"


def test_a_lease_ends_with_its_owner(host: Namespace) -> None:
    def inside() -> None:
        with join("demo", "short") as lease:
            assert taken(host) == {"short": str(lease.address)}
        lease.close()  # harmless twice

    host.call(inside)
    assert taken(host) == {}
    assert host.interfaces() == {"lo", "pvm-demo"}


def test_a_full_network_says_who_has_it(host: Namespace) -> None:
    net(host, "up", "tiny", "--cidr", "10.9.0.0/30")
    holder = LeaseHolder(host, "tiny", "only")
    assert holder.answer()[1] == "10.9.0.2"
    refusal = " ".join(LeaseHolder(host, "tiny", "late").answer())
    assert "10.9.0.0/30 has no address left (only)" in refusal
    assert "vm-late" not in host.interfaces()


def test_an_unknown_network_is_refused_with_those_there_are(host: Namespace) -> None:
    refusal = " ".join(LeaseHolder(host, "dmeo", "x").answer())
    assert "--net dmeo: no such network (there is demo); pyvmm net up dmeo makes it" in refusal


def test_a_mac_address_is_nobody_elses_on_the_bridge(host: Namespace) -> None:
    first = LeaseHolder(host, "demo", "first", "02:00:00:00:00:AA")
    assert first.answer()[2] == "02:00:00:00:00:aa"
    refusal = " ".join(LeaseHolder(host, "demo", "second", "02:00:00:00:00:aa").answer())
    assert "VM first (vm-first) has it" in refusal
    bridge = host.call(lambda: _mac("pvm-demo"))
    assert "the host (pvm-demo) has it" in " ".join(LeaseHolder(host, "demo", "second", bridge).answer())
    tap = host.call(lambda: _mac("vm-first"))
    assert "port vm-first has it" in " ".join(LeaseHolder(host, "demo", "second", tap).answer())


def _mac(device: str) -> str:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        return str(route.get_links(ifname=device)[0].get_attr("IFLA_ADDRESS"))


def leave_over(space: Namespace) -> str:
    """A tap that was made persistent while it was a VM's, and whose VM is dead; its name."""

    def inside() -> str:
        import fcntl

        with join("demo", "dead") as lease:
            fcntl.ioctl(lease.tap.fd, 0x400454CB, 1)  # TUNSETPERSIST, <linux/if_tun.h>
            return lease.tap.name

    return space.call(inside)


def test_a_tap_left_over_is_shown_and_taken_away_by_the_next_up(host: Namespace) -> None:
    name = leave_over(host)
    assert name in host.interfaces()
    assert networks(host)["demo"]["vms"][0]["state"] == "left over"
    net(host, "up", "demo")
    assert networks(host)["demo"]["vms"] == []
    assert host.interfaces() == {"lo", "pvm-demo"}


def test_a_tap_left_over_is_taken_away_by_the_next_vm_and_by_down(host: Namespace) -> None:
    leave_over(host)
    holder = LeaseHolder(host, "demo", "live")
    assert holder.answer()[:2] == ["vm-live", "10.91.0.2"]
    assert list(taken(host)) == ["live"]
    holder.kill()
    wait_until(lambda: taken(host) == {}, "the killed VM's lease has gone")
    leave_over(host)
    net(host, "down", "demo")
    assert host.interfaces() == {"lo"}


def test_a_persistent_tap_in_use_is_nobodys_to_take(host: Namespace) -> None:
    leave_over(host)

    def inside() -> None:
        from pyvmm.net.tap import Tap

        with Tap("vm-dead"):
            net(host, "up", "demo")
            assert taken(host) == {"dead": "10.91.0.2"}
            assert "in use by dead" in net_refused(host, "down", "demo")

    host.call(inside)


def test_a_refused_lease_leaves_nothing(host: Namespace) -> None:
    def inside() -> None:
        with pytest.raises(ConfigError):
            join("demo", "x", mac=_mac("pvm-demo"))
        with pytest.raises(ConfigError):
            join("other", "x")

    host.call(inside)
    assert host.interfaces() == {"lo", "pvm-demo"}
