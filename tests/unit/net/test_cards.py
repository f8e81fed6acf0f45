"""What a source says of its guest's cards; it may be anybody."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.net.cards import MovingCard


@given(
    st.binary(min_size=6, max_size=6).map(lambda mac: mac.hex(":")),
    st.one_of(st.just(""), st.binary(min_size=8, max_size=8).map(bytes.hex)),
    st.one_of(st.just(""), st.ip_addresses(v=4).map(str)),
)
def test_cards_come_as_they_were_sent(mac: str, identity: str, address: str) -> None:
    card = MovingCard(mac, identity, address)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(card), type=MovingCard) == card


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mac": "52:00:00:00:00"},
        {"mac": "52:00:00:00:00:01\n"},
        {"mac": "52:00:00:00:00:0G"},
        {"mac": "52:00:00:00:00:01", "id": "0" * 17},
        {"mac": "52:00:00:00:00:01", "id": "'; drop"},
        {"mac": "52:00:00:00:00:01", "address": "10.91.0.256"},
        {"mac": "52:00:00:00:00:01", "address": "10.91.0.2/24"},
        {"mac": "52:00:00:00:00:01", "address": "::1"},
        {"mac": "52:00:00:00:00:01", "more": 1},
    ],
)
def test_what_is_no_card_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=MovingCard)
