"""What the builder makes of ``--net NAME`` before it builds: taps, addresses, Linux's ``ip=``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import NetConfig, RngConfig
from pyvmm.machine.network_leases import take_leases
from tests.framework.net_commands import net, networks
from tests.framework.processes import PYVMM
from tests.framework.topology import Namespace, namespace


@pytest.fixture
def host() -> Iterator[Namespace]:
    with namespace("host") as space:
        net(space, "up", "demo")
        net(space, "up", "back", "--cidr", "10.3.0.0/16")
        yield space


def taken(*devices: NetConfig | RngConfig, name: str = "box") -> tuple[MachineConfig, list[str]]:
    """(the configuration, the taps open), with everything given back."""
    with contextlib.ExitStack() as stack:
        config = MachineConfig(image="x", name=name, devices=devices, linux_additions="quiet")
        config, leases = take_leases(config, stack)
        assert all(name == lease.tap.name and lease.tap.fd >= 0 for name, lease in leases.items())
        return config, list(leases)


def card(target: str, **options: object) -> NetConfig:
    return NetConfig(backend="network", target=target, **options)  # type: ignore[arg-type]


def test_a_network_becomes_a_tap_with_an_address(host: Namespace) -> None:
    config, taps = host.call(lambda: taken(RngConfig(), card("demo", mtu=1400)))
    rng, net_ = config.devices
    assert rng == RngConfig()
    assert isinstance(net_, NetConfig)
    assert (net_.backend, net_.target, net_.bridge, net_.mtu) == ("tap", "vm-box", "pvm-demo", 1400)
    assert net_.mac is not None
    assert taps == ["vm-box"]
    assert config.linux_additions == "quiet ip=10.91.0.2::10.91.0.1:255.255.255.0:box:eth0:off"
    assert host.interfaces() == {"lo", "pvm-demo", "pvm-back"}, "given back"


def test_only_the_first_network_has_an_address_on_the_command_line(host: Namespace) -> None:
    other = NetConfig(backend="tap", target="tap9")
    config, taps = host.call(lambda: taken(other, card("back"), card("demo")))
    assert config.linux_additions == "quiet ip=10.3.0.2::10.3.0.1:255.255.0.0:box:eth1:off"
    assert taps == ["vm-box", "vm-box-2"]
    assert config.devices[0] == other, "a tap of the user's own is opened later"
    macs = {device.mac for device in config.devices if isinstance(device, NetConfig)}
    assert len(macs) == 3


def test_an_address_that_the_user_removed_is_leased_but_not_said(host: Namespace) -> None:
    config, _ = host.call(lambda: taken(card("demo", announce=False)))
    assert config.linux_additions == "quiet"


def test_a_later_refusal_gives_the_earlier_lease_back(host: Namespace) -> None:
    with pytest.raises(ConfigError, match="--net nowhere: no such network"):
        host.call(lambda: taken(card("demo"), card("nowhere")))
    assert networks(host)["demo"]["vms"] == []


def test_a_command_is_refused_in_one_line(host: Namespace) -> None:
    done = host.run(PYVMM, "linux", "--net", "nowhere", "--exec", "true")
    assert done.returncode == 125
    assert done.stderr == (
        b"pyvmm: --net nowhere: no such network (there is back, demo); pyvmm net up nowhere makes it\n"
    )
