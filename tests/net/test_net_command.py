"""``pyvmm net`` in namespaces of the test's own: what it makes, that doing it again is harmless, what it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.framework.net_commands import LeaseHolder, net, net_refused, networks, networks_by_command
from tests.framework.processes import PYVMM
from tests.framework.topology import Namespace, Topology, namespace, wait_until


@pytest.fixture
def host() -> Iterator[Namespace]:
    with namespace("host") as space:
        yield space


def change(space: Namespace, *arguments: Any, **options: Any) -> None:
    """``IPRoute().link(...)`` inside; a device is named by ``ifname`` even where pyroute2 wants an index."""

    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            if arguments[0] in ("set", "del"):
                options["index"] = route.link_lookup(ifname=options.pop("ifname"))[0]
            if "master" in options:
                options["master"] = route.link_lookup(ifname=options["master"])[0]
            route.link(*arguments, **options)

    space.call(inside)


def test_up_list_down(host: Namespace) -> None:
    assert net(host, "list") == "no networks; pyvmm net up NAME makes one\n"
    assert net(host, "up", "demo") == "network demo is up: 10.91.0.0/24 on pvm-demo, host 10.91.0.1\n"
    assert networks_by_command(host) == networks(host) == {
        "demo": {
            "name": "demo", "bridge": "pvm-demo", "state": "up", "cidr": "10.91.0.0/24", "host": "10.91.0.1",
            "nat": False, "uplink": None, "vms": [], "other_ports": [],
        }
    }  # fmt: skip
    table = net(host, "list")
    assert "demo" in table
    assert "10.91.0.1" in table
    assert host.interfaces() == {"lo", "pvm-demo"}
    assert net(host, "down", "demo") == "network demo is down\n"
    assert host.interfaces() == {"lo"}


def test_doing_it_again_is_harmless(host: Namespace) -> None:
    net(host, "up", "demo", "--cidr", "10.5.0.0/16")
    index = host.run("cat", "/proc/net/dev").stdout  # the device is not made anew
    for again in (("up", "demo"), ("up", "demo", "--cidr", "10.5.0.0/16"), ("up", "demo", "--no-nat")):
        assert net(host, *again).startswith("network demo was up: 10.5.0.0/16")
    assert host.run("cat", "/proc/net/dev").stdout.count(b"pvm-demo") == index.count(b"pvm-demo") == 1
    net(host, "down", "demo")
    assert net(host, "down", "demo") == "network demo was not up\n"


def test_two_at_once_make_one_network(host: Namespace) -> None:
    children = [host.start(PYVMM, "net", "up", "demo") for _ in range(3)]
    answers = sorted(child.communicate(timeout=60)[0].decode().split(":")[0] for child in children)
    assert answers == ["network demo is up", "network demo was up", "network demo was up"]
    assert host.interfaces() == {"lo", "pvm-demo"}


def test_another_plan_is_refused(host: Namespace) -> None:
    net(host, "up", "demo")
    assert "is up with 10.91.0.0/24, not 10.5.0.0/16; pyvmm net down demo" in net_refused(
        host, "up", "demo", "--cidr", "10.5.0.0/16"
    )
    assert "is up without NAT" in net_refused(host, "up", "demo", "--nat")


def test_addresses_that_the_host_routes_are_not_taken(host: Namespace) -> None:
    net(host, "up", "a")
    assert "10.91.1.0/24" in net(host, "up", "b"), "the next that is free"
    for cidr in ("10.91.0.0/24", "10.91.0.128/25", "10.0.0.0/8"):
        assert "this host already routes 10.91." in net_refused(host, "up", "c", "--cidr", cidr)
    assert host.interfaces() == {"lo", "pvm-a", "pvm-b"}


def test_a_default_route_in_two_halves_is_no_network(host: Namespace) -> None:
    """As VPNs write it; or no network could be made beside one."""

    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            for half in ("0.0.0.0/1", "128.0.0.0/1"):
                route.route("add", dst=half, oif=1)
            route.route("add", dst="10.91.0.0/16", type="blackhole")

    host.call(inside)
    assert "no /24 of 10.91.0.0/16 is free" in net_refused(host, "up", "demo")
    assert "already routes 10.91.0.0/16" in net_refused(host, "up", "demo", "--cidr", "10.91.7.0/24")
    assert "is up: 10.92.0.0/24" in net(host, "up", "demo", "--cidr", "10.92.0.0/24")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "x" * 12), "1 to 11 letters"),
        (("up", "a b"), "1 to 11 letters"),
        (("down", "../x"), "1 to 11 letters"),
        (("up", "demo", "--cidr", "10.0.0.0/33"), "/8 to /30"),
        (("up", "demo", "--cidr", "nonsense"), "write an IPv4 network"),
        (("up", "demo", "--nat"), "no default route"),
    ],
)
def test_nonsense_is_refused_and_leaves_nothing(host: Namespace, arguments: tuple[str, ...], says: str) -> None:
    assert says in net_refused(host, *arguments)
    assert host.interfaces() == {"lo"}


def test_without_rights_it_says_so(host: Namespace) -> None:
    dropped = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
    done = host.run(*dropped, PYVMM, "net", "up", "demo")
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)
    assert b"CAP_NET_ADMIN; run as root" in done.stderr
    assert host.run(*dropped, PYVMM, "net", "list").returncode == 0, "looking needs no rights"


def test_somebody_elses_bridge_is_left_alone(host: Namespace) -> None:
    change(host, "add", ifname="pvm-demo", kind="bridge")
    host.set_up("pvm-demo", "192.0.2.1/24")
    assert "did not make" in net_refused(host, "up", "demo")
    assert "did not make" in net_refused(host, "down", "demo")
    assert networks(host) == {}
    assert host.interfaces() == {"lo", "pvm-demo"}


def test_what_a_dead_pyvmm_left_half_made_is_completed(host: Namespace) -> None:
    change(host, "add", ifname="pvm-demo", kind="bridge")  # no alias, no address: killed right after making it
    assert "is up: 10.91.0.0/24" in net(host, "up", "demo")
    change(host, "set", ifname="pvm-demo", state="down")
    assert networks(host)["demo"]["state"] == "down"
    net(host, "up", "demo")
    assert networks(host)["demo"]["state"] == "up"


def test_a_half_made_bridge_can_be_taken_down(host: Namespace) -> None:
    change(host, "add", ifname="pvm-demo", kind="bridge")
    assert net(host, "down", "demo") == "network demo is down\n"
    assert host.interfaces() == {"lo"}


def test_a_network_in_use_stays_unless_forced(host: Namespace) -> None:
    net(host, "up", "demo")
    with Topology() as topology:
        other = topology.namespace("other")
        topology.veth((host, "cable", None), (other, "cable", None))
        change(host, "set", ifname="cable", master="pvm-demo")
        holder = LeaseHolder(host, "demo", "web")
        assert holder.answer()[:2] == ["vm-web", "10.91.0.2"]
        assert networks(host)["demo"]["other_ports"] == ["cable"]
        refusal = net_refused(host, "down", "demo")
        assert "in use by web (vm-web), cable" in refusal
        assert "--force" in refusal
        assert net(host, "down", "demo", "--force") == "network demo is down\n"
        assert host.interfaces() == {"lo", "cable", "vm-web"}, "the VM runs on"
        left = networks(host)["demo"]
        assert (left["state"], left["vms"][0]["state"]) == ("gone", "off the bridge")
        holder.kill()
    wait_until(lambda: networks(host) == {}, "the last VM has gone")


def test_a_bridge_that_was_removed_under_a_vm_comes_back(host: Namespace) -> None:
    net(host, "up", "demo", "--cidr", "10.7.0.0/16")
    holder = LeaseHolder(host, "demo", "web")
    tap, address, mac = holder.answer()
    change(host, "del", ifname="pvm-demo")
    assert networks(host)["demo"]["state"] == "gone"
    assert "running VMs of demo have other addresses: web (10.7.0.2)" in net_refused(
        host, "up", "demo", "--cidr", "10.8.0.0/16"
    )
    net(host, "up", "demo", "--cidr", "10.7.0.0/16")
    vms = networks(host)["demo"]["vms"]
    assert vms == [{"vm": "web", "tap": tap, "address": address, "mac": mac, "state": "connected"}]
    change(host, "del", ifname="pvm-demo")
    assert "10.7.0.0/24" in net(host, "up", "demo"), "without --cidr: a network that its VMs fit into"
    holder.kill()


def test_the_host_takes_no_routes_from_guests(host: Namespace) -> None:
    if not os.path.exists("/proc/sys/net/ipv6"):
        pytest.skip("this kernel has no IPv6")
    host.call(lambda: _write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "0"))
    host.call(lambda: _write("/proc/sys/net/ipv4/conf/default/forwarding", "1"))
    net(host, "up", "demo")
    assert host.call(lambda: _read("/proc/sys/net/ipv6/conf/pvm-demo/disable_ipv6")) == "1"
    assert host.call(lambda: _read("/proc/sys/net/ipv4/conf/pvm-demo/forwarding")) == "0", "no NAT, no way out"


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
