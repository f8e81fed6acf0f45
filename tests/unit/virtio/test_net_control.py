"""virtio-net besides its frames: features, configuration space, commands, saved state."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import SectionError
from pyvmm.virtio import mmio
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio import net_features as features
from pyvmm.virtio.mmio_registers import ACKNOWLEDGE, DRIVER, FEATURES_OK
from tests.unit.virtio.net_card import ANY, CONTROLLED, EVERYTHING, MAC, card, frame, until


@pytest.mark.parametrize(
    ("wanted", "accepted"),
    [
        (features.F_GUEST_TSO4, False), (features.F_GUEST_TSO4 | features.F_GUEST_CSUM, True),
        (features.F_GUEST_TSO6, False), (features.F_HOST_TSO4, False), (features.F_HOST_TSO6 | features.F_CSUM, True),
        (features.F_CTRL_RX, False), (features.F_CTRL_RX | features.F_CTRL_VQ, True),
        (features.F_GUEST_ANNOUNCE, False), (features.F_CTRL_MAC_ADDR, False), (features.F_CTRL_GUEST_OFFLOADS, False),
        (1 << 22, False),
    ],
)  # fmt: skip
def test_features_that_need_each_other(wanted: int, accepted: bool) -> None:
    with card(packets=True) as c:
        c.put(registers.STATUS, ACKNOWLEDGE)
        c.put(registers.STATUS, ACKNOWLEDGE | DRIVER)
        c.put(registers.DRIVER_FEATURES, wanted)
        c.put(registers.DRIVER_FEATURES_SEL, 1)
        c.put(registers.DRIVER_FEATURES, 1)
        c.put(registers.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert bool(c.get(registers.STATUS) & FEATURES_OK) == accepted


def test_a_stream_offers_no_offloads() -> None:
    with card() as c:
        assert not c.device.features & (features.OFFLOADS | features.F_MTU)
    with card(packets=True) as c:
        assert c.device.features & features.OFFLOADS == features.OFFLOADS


def test_the_backend_hears_what_the_driver_copes_with() -> None:
    with card(packets=True) as c:
        c.bring_up(EVERYTHING)
        c.bring_up(ANY | features.F_GUEST_CSUM)
        c.bring_up(ANY)
        assert c.backend.offloads == [7, 1, 0]


def test_configuration_space() -> None:
    with card() as c:
        assert c.device.configuration() == MAC + struct.pack("<HHH", 1, 1, 0)
        c.put(registers.CONFIG, 0)  # 5.1.4.2: the driver must not, and it has no effect
        assert c.device.configuration()[:6] == MAC


# -- commands -----------------------------------------------------------------------------------


def test_commands() -> None:
    with card(packets=True) as c:
        c.bring_up(c.device.features | ANY)
        assert c.command(0, 0, b"\x01") == 0  # promiscuous
        assert c.command(0, 1, b"\x00") == 0  # all multicast
        assert c.command(0, 2, b"\x00") == 1
        assert c.command(0, 0, b"") == 1
        table = struct.pack("<I6s", 1, MAC) + struct.pack("<I", 0)
        assert c.command(1, 0, table) == 0
        assert c.command(1, 0, table + b"x") == 1
        assert c.command(1, 0, struct.pack("<I", 0xFFFFFFFF)) == 1
        assert c.command(1, 1, b"\x02\x00\x00\x00\x00\x07") == 0
        assert c.device.configuration()[:6] == b"\x02\x00\x00\x00\x00\x07"
        assert c.command(1, 1, b"\x03\x00\x00\x00\x00\x07") == 1
        assert c.command(5, 0, features.F_GUEST_CSUM.to_bytes(8, "little")) == 0
        assert c.backend.offloads[-1] == 1
        assert c.command(5, 0, (1 << 10).to_bytes(8, "little")) == 1
        assert c.command(9, 9, b"") == 1


def test_commands_of_features_that_were_not_negotiated() -> None:
    with card(packets=True) as c:
        c.bring_up(CONTROLLED)
        for kind, number, data in ((0, 0, b"\1"), (1, 0, bytes(8)), (1, 1, bytes(6)), (3, 0, b""), (5, 0, bytes(8))):
            assert c.command(kind, number, data) == 1


def test_announcing() -> None:
    with card() as c:
        assert not c.device.announce()
        c.bring_up(CONTROLLED | features.F_GUEST_ANNOUNCE)
        c.signal.pulses()
        assert c.device.announce()
        assert c.signal.pulses() == 1 and c.device.configuration()[6] == 3
        assert c.command(3, 0, b"") == 0
        assert c.device.configuration()[6] == 1


@given(st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_command_is_too_strange(command: bytes) -> None:
    with card(packets=True) as c:
        c.bring_up(c.device.features | ANY)
        kind, number = (command + b"\0\0")[:2]
        assert c.command(kind, number, command[2:] or b"\0") in (0, 1)
        assert not c.needs_reset


# -- saved state --------------------------------------------------------------------------------


def test_a_driver_goes_on_after_its_state_moved() -> None:
    with card(packets=True) as one, card(packets=True) as other:
        one.bring_up(EVERYTHING | features.F_CTRL_MAC_ADDR | features.F_CTRL_RX)
        one.post(4)
        assert one.command(1, 1, b"\x02\x00\x00\x00\x00\x07") == 0
        assert one.command(5, 0, features.F_GUEST_CSUM.to_bytes(8, "little")) == 0
        one.transport.pause()
        other.backend.send(frame(9))  # for the driver that is about to come: not stale
        other.memory.memory.write(0, one.memory.memory.read(0, one.memory.memory.size))
        other.transport.load(one.transport.save())
        other.transport.kick()
        assert other.device.configuration()[:6] == b"\x02\x00\x00\x00\x00\x07"
        assert other.backend.offloads == [1]
        other.queues, other.posted = one.queues, one.posted
        for driver in other.queues:
            driver.memory = other.memory.memory
        got = other.received()
        assert got is not None and got[1] == frame(9)
        assert other.transport.save()["device"] == one.transport.save()["device"]


def test_a_link_that_differs_where_the_state_arrives_is_told() -> None:
    with card() as one, card() as other:
        one.bring_up()
        one.transport.pause()
        other.device.set_link(False)
        other.memory.memory.write(0, one.memory.memory.read(0, one.memory.memory.size))
        other.transport.load(one.transport.save())
        other.transport.kick()
        until(lambda: other.device.configuration()[6] == 0, "the link's state")
        assert other.get(registers.INTERRUPT_STATUS) & mmio.CONFIGURATION_CHANGE


@pytest.mark.parametrize(
    ("field", "value"), [("mac", b"12345"), ("link_up", 1), ("guest_offloads", 1 << 40), ("guest_offloads", -1)]
)
def test_states_that_none_has(field: str, value: object) -> None:
    with card() as c:
        state = c.transport.save()
        state["device"] = {**state["device"], field: value}
        with pytest.raises(SectionError, match=field):
            c.transport.load(state)
