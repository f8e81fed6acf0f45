from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.arch.x86.linux_quirks import split_removals
from pyvmm.cli.device_options import KERNEL_ADDRESS, add_device_options, devices_of, parse_net, settle_address
from pyvmm.errors import ConfigError
from pyvmm.machine.device_config import NetConfig, RngConfig


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("demo", NetConfig(backend="network", target="demo")),
        ("demo,mtu=9000", NetConfig(backend="network", target="demo", mtu=9000)),
        ("tap:tap0", NetConfig(backend="tap", target="tap0")),
        (
            "tap:tap0,mac=52:54:00:12:34:56,mtu=1400",
            NetConfig(backend="tap", target="tap0", mac="52:54:00:12:34:56", mtu=1400),
        ),
        ("tap:tap0,bridge=br0", NetConfig(backend="tap", target="tap0", bridge="br0")),
        ("stream:unix:/run/a,,b", NetConfig(backend="stream", target="unix:/run/a,b")),
        ("stream:tcp:localhost:5555", NetConfig(backend="stream", target="tcp:localhost:5555")),
        ("stream:tcp:::1:5555", NetConfig(backend="stream", target="tcp:::1:5555")),
    ],
)
def test_each_way_to_say_it(text: str, config: NetConfig) -> None:
    assert parse_net(text) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "network ''"),
        ("toolonganame", "1 to 11"),
        ("tap:", "write a network's NAME"),
        ("stream:", "write a network's NAME"),
        ("stream:unix:", "write a network's NAME"),
        ("stream:udp:h:1", "write a network's NAME"),
        ("stream:tcp:h", "write a network's NAME"),
        ("stream:tcp:h:0", "write a network's NAME"),
        ("stream:tcp:h:65536", "write a network's NAME"),
        ("stream:tcp::80", "write a network's NAME"),
        ("veth:x", "write a network's NAME"),
        ("demo,mac=1", "six bytes"),
        ("demo,mac=01:00:00:00:00:00", "group"),
        ("demo,mtu=67", "68 to 65535"),
        ("demo,mtu=70000", "--net mtu"),
        ("demo,mtu=-1", "--net mtu"),
        ("demo,mtu", "--net mtu"),
        ("demo,bridge=br0", "has its own"),
        ("stream:tcp:h:1,bridge=br0", "for tap"),
        ("tap:tap0,bridge=a/b", "1 to 15"),
        ("demo,speed=1", "unknown 'speed'"),
        ("demo,mtu=1500,mtu=1500", "twice"),
    ],
)
def test_bad_ones_are_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_net(text)


@given(st.text(max_size=40))
def test_any_text_is_a_card_or_one_clear_line(text: str) -> None:
    try:
        assert parse_net(text).target
    except ConfigError as error:
        assert str(error)


def test_cards_come_in_the_order_they_were_asked_for() -> None:
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    devices = devices_of(parser.parse_args(["--net", "b", "--rng", "--net", "tap:a"]))
    assert [d.target for d in devices if isinstance(d, NetConfig)] == ["b", "a"]


@pytest.mark.parametrize(
    ("words", "announced"),
    [
        ([], True),
        (["root=/dev/vda", "shipping=1"], True),
        (["-ip"], False),
        (["-ip="], False),
        (["ip=dhcp"], False),
        (["-panic"], True),
    ],
)
def test_the_address_is_announced_unless_the_user_says_otherwise(words: list[str], announced: bool) -> None:
    kept, removed = split_removals(words, (KERNEL_ADDRESS,))
    card, rng = settle_address((NetConfig(backend="network", target="demo"), RngConfig()), kept, removed)
    assert isinstance(card, NetConfig)
    assert card.announce is announced
    assert rng == RngConfig()
