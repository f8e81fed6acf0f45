from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ConfigError
from pyvmm.net.plan import (
    Plan,
    bridge_name,
    check_network_name,
    first_free_plan,
    label,
    mac_of,
    tap_name,
)

PREFIXES = st.integers(8, 30)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    prefix = draw(PREFIXES)
    number = draw(st.integers(1 << 24, 0xDFFFFFFF)) & ~((1 << (32 - prefix)) - 1)
    return Plan(IPv4Network((number, prefix)))


@given(plans(), st.integers(0, 40))
def test_no_two_leases_alike_and_none_that_is_somebody_elses(plan: Plan, count: int) -> None:
    taken: list[IPv4Address] = []
    for _ in range(count):
        address = plan.lowest_free(taken)
        if address is None:
            break
        taken.append(address)
    assert len(set(taken)) == len(taken) == min(count, len(plan.guests))
    reserved = {plan.cidr.network_address, plan.cidr.broadcast_address, plan.host}
    assert all(address in plan.cidr and address not in reserved and plan.has(address) for address in taken)


@given(plans(), st.sets(st.integers(0, 60)))
def test_a_gap_is_filled_first(plan: Plan, indexes: set[int]) -> None:
    taken = [IPv4Address(plan.guests[index]) for index in indexes if index < len(plan.guests)]
    lowest = plan.lowest_free(taken)
    free = [number for number in plan.guests[:64] if IPv4Address(number) not in taken]
    assert lowest == (IPv4Address(free[0]) if free else None)


def test_the_smallest_network_is_the_host_and_one_guest() -> None:
    plan = Plan.parse("10.0.0.0/30")
    assert (str(plan.host), str(plan.lowest_free([]))) == ("10.0.0.1", "10.0.0.2")
    assert plan.lowest_free([IPv4Address("10.0.0.2")]) is None


@given(plans())
def test_what_is_written_is_read(plan: Plan) -> None:
    odd = [plan.cidr.is_loopback, plan.cidr.is_multicast, plan.cidr.is_link_local, plan.cidr.is_reserved]
    if not any(odd):
        assert Plan.parse(str(plan.cidr)) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write an IPv4 network"),
        ("10.0.0.0", "write an IPv4 network"),
        ("10.0.0.0/", "write an IPv4 network"),
        ("10.0.0.0/255.255.255.0", "write an IPv4 network"),
        ("10.0.0.0/+8", "write an IPv4 network"),
        ("10.0.0/24", "write an IPv4 network"),
        ("10.0.0.256/24", "write an IPv4 network"),
        ("fd00::/64", "write an IPv4 network"),
        ("10.0.0.0/99", "/8 to /30"),
        ("10.0.0.0/31", "/8 to /30"),
        ("0.0.0.0/0", "/8 to /30"),
        ("10.0.0.5/24", "did you mean 10.0.0.0/24"),
        ("127.1.0.0/16", "loopback"),
        ("224.0.0.0/8", "multicast"),
        ("169.254.0.0/16", "link-local"),
        ("250.0.0.0/8", "reserved"),
        ("0.0.0.0/8", "no network to be in"),
    ],
)
def test_nonsense_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        Plan.parse(text)
    assert "--cidr" in str(refusal.value)


@given(st.text(max_size=30))
def test_any_text_is_a_plan_or_a_clear_refusal(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert 8 <= plan.cidr.prefixlen <= 30


def test_the_first_network_that_nobody_routes() -> None:
    assert first_free_plan([]) == Plan.parse("10.91.0.0/24")
    assert first_free_plan([IPv4Network("10.91.0.0/23"), IPv4Network("10.91.2.7/32")]) == Plan.parse("10.91.3.0/24")
    assert first_free_plan([IPv4Network("10.0.0.0/8")]) is None


def test_linux_is_told_in_its_own_words() -> None:
    words = Plan.parse("10.91.0.0/20").kernel_parameter(IPv4Address("10.91.0.2"), "box", "eth0")
    assert words == "ip=10.91.0.2::10.91.0.1:255.255.240.0:box:eth0:off"


@pytest.mark.parametrize("name", ["a", "demo", "Net-1_b.c", "x" * 11])
def test_names_that_fit(name: str) -> None:
    assert len(bridge_name(check_network_name(name))) <= 15


@pytest.mark.parametrize("name", ["", "x" * 12, "-a", ".", "..", "a b", "a/b", "a:b", "ä", "a\n", "a%d", "a,b"])
def test_names_that_do_not(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 11 letters"):
        check_network_name(name)


@given(st.text(max_size=80), st.integers(0, 120))
def test_taps_have_names_that_interfaces_can_have_each_its_own(vm: str, others: int) -> None:
    taken: set[str] = set()
    for _ in range(min(others, 12) + 1):
        name = tap_name(vm, taken)
        assert name not in taken
        assert 4 <= len(name.encode()) <= 15
        assert name.startswith("vm-")
        assert not set(name) & set(" /:%\n")
        taken.add(name)


@given(st.text(max_size=200))
def test_labels_are_host_names(vm: str) -> None:
    text = label(vm)
    assert 1 <= len(text) <= 63
    assert text.isascii()
    assert not set(text) & set(': /\n"\\')


@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 1 << 20))
def test_mac_addresses_are_steady_local_and_nobody_elses(network: str, vm: str, number: int) -> None:
    mac = mac_of(network, vm, number)
    assert mac == mac_of(network, vm, number)
    assert mac != mac_of(network, vm, number + 1)
    first = int(mac[:2], 16)
    assert (first & 1, first & 2, len(mac)) == (0, 2, 17)
