"""The frame that tells switches where a guest is."""

from __future__ import annotations

from pyvmm.net.announcement import self_announcement


def test_it_is_a_rarp_request_from_the_card_to_everybody() -> None:
    mac = bytes.fromhex("520102030405")
    expected = (
        "ffffffffffff 520102030405 8035"  # Ethernet
        "0001 0800 06 04 0003"  # RFC 903: Ethernet, IPv4, lengths, request reverse
        "520102030405 00000000 520102030405 00000000"
    )
    assert self_announcement(mac) == bytes.fromhex(expected).ljust(60, b"\0")
