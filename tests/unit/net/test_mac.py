"""Addresses made from names."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.net.mac import default_mac, format_mac, parse_mac


@given(st.text(), st.integers(0, 7))
def test_a_default_address_is_a_locally_administered_station(machine: str, index: int) -> None:
    mac = default_mac(machine, index)
    assert len(mac) == 6 and mac[0] & 3 == 2
    assert mac == default_mac(machine, index)
    assert mac not in (default_mac(machine, index + 1), default_mac(machine + "x", index))


@given(st.binary(min_size=6, max_size=6))
def test_addresses_are_written_and_read(mac: bytes) -> None:
    assert parse_mac(format_mac(mac)) == mac
