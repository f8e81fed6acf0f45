from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.net.links import ALIAS_MAX, Link
from pyvmm.net.plan import label
from pyvmm.net.records import LeaseRecord, NetworkRecord, is_stale, leases_in, read_record, write_record


def link(index: int = 1, alias: str = "", kind: str = "tun", persistent: bool = False, carrier: bool = True) -> Link:
    return Link(index, f"vm-{index}", kind, alias, "", True, 0, persistent, carrier)


def lease(vm: str = "linux", network: str = "demo", address: str = "10.91.0.2") -> LeaseRecord:
    return LeaseRecord(1, network, vm, address, "02:00:00:00:00:01")


@given(st.text(max_size=200))
def test_a_lease_fits_into_an_alias_whatever_the_vm_is_called(vm: str) -> None:
    record = LeaseRecord(1, "x" * 11, label(vm), "255.255.255.255", "02:00:00:00:00:01")
    alias = write_record(record)
    assert len(alias.encode()) <= ALIAS_MAX
    assert read_record(alias) == record


def test_a_network_fits_and_comes_back() -> None:
    record = NetworkRecord(1, "10.91.0.0/24", True)
    assert read_record(write_record(record)) == record
    assert str(record.plan.host) == "10.91.0.1"


@given(st.text(max_size=60))
def test_any_other_alias_is_not_pyvmms(alias: str) -> None:
    assert read_record(alias) is None


@pytest.mark.parametrize(
    "alias",
    [
        '{"pyvmm":"network","version":2,"cidr":"10.91.0.0/24","nat":false}',
        '{"pyvmm":"network","version":1,"cidr":"10.91.0.7/24","nat":false}',
        '{"pyvmm":"network","version":1,"cidr":"10.91.0.0/24","nat":false,"more":1}',
        '{"pyvmm":"lease","version":1,"network":"demo","vm":"x","address":"10.91.0","mac":""}',
        '{"pyvmm":"other","version":1}',
        "[" * 255,
    ],
)
def test_what_another_version_or_another_hand_wrote_is_left_alone(alias: str) -> None:
    assert read_record(alias) is None


def test_leases_are_those_of_taps_in_the_order_of_addresses() -> None:
    links = [
        link(1, write_record(lease("b", address="10.91.0.10"))),
        link(2, write_record(lease("a", address="10.91.0.9"))),
        link(3, write_record(lease("else", network="other"))),
        link(4, write_record(lease("fake", address="10.91.0.8")), kind="veth"),
        link(5, "somebody's"),
    ]
    assert [record.vm for _, record in leases_in(links, "demo")] == ["a", "b"]
    assert [record.vm for _, record in leases_in(links)] == ["a", "b", "else"]


def test_only_a_persistent_tap_that_nobody_has_open_is_left_over() -> None:
    assert is_stale(link(persistent=True, carrier=False))
    assert not is_stale(link(persistent=True, carrier=True))
    assert not is_stale(link(persistent=False, carrier=False))  # its VM has set the link down
