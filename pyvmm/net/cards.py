"""What a guest takes along of its network cards when it moves."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Annotated

import msgspec
from msgspec import Meta


class MovingCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes with a card to the host that its guest moves to; ``id`` and ``address`` are empty without a lease."""

    mac: Annotated[str, Meta(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")]
    id: Annotated[str, Meta(pattern=r"^([0-9a-f]{16})?\Z")] = ""
    address: Annotated[str, Meta(max_length=15)] = ""

    def __post_init__(self) -> None:
        if self.address:
            IPv4Address(self.address)  # ValueError
