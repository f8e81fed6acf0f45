"""One side's end of the replication connection: its bounds, its deadlines, and how another thread ends its waits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyvmm.colo.messages import ID, SIZE, Conversation, Message
from pyvmm.errors import ChannelError
from pyvmm.migration.tls import make_credentials, secure_client, secure_server

TIMEOUT = 10.0
LONG = 64 << 20
"""More bytes than any socket's buffers hold."""

Ends = tuple[Conversation, Conversation]


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_credentials(folder, ["localhost"])
    return folder


@pytest.fixture(params=["plain", "tls"])
def ends(request: pytest.FixtureRequest, credentials: Path) -> Iterator[Ends]:
    """(primary, secondary), the secondary ready."""
    one, two = socket.socketpair()
    if request.param == "tls":
        with ThreadPoolExecutor() as pool:
            server = pool.submit(secure_server, two, str(credentials))
            one = secure_client(one, str(credentials), "localhost")
            two = server.result(TIMEOUT)
    primary, secondary = Conversation(one, "primary", TIMEOUT), Conversation(two, "secondary", TIMEOUT)
    secondary.send(Message.CHECKPOINT_READY)
    primary.expect(Message.CHECKPOINT_READY)
    yield primary, secondary
    primary.close()
    secondary.close()


def soon(call: Callable[[], None]) -> threading.Thread:
    """Call it while this thread waits."""
    thread = threading.Thread(target=lambda: (time.sleep(0.1), call()))
    thread.start()
    return thread


def up_to_state(primary: Conversation, secondary: Conversation) -> None:
    """The primary's state is due."""
    primary.send(Message.CHECKPOINT_REQUEST)
    secondary.expect(Message.CHECKPOINT_REQUEST)
    secondary.send(Message.CHECKPOINT_REPLY)
    primary.expect(Message.CHECKPOINT_REPLY)


def test_payloads_cross_whole(ends: Ends) -> None:
    primary, secondary = ends
    up_to_state(primary, secondary)
    pieces = [bytes([number]) * 100_000 for number in range(50)]
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(primary.send_with, Message.VMSTATE_SEND, pieces, 5_000_000)
        got = secondary.expect_with(Message.VMSTATE_SEND, memoryview(bytearray(6_000_000)))
        sent.result(TIMEOUT)
    assert got == b"".join(pieces)
    assert primary.bytes_sent == secondary.bytes_received == 2 * ID.size + SIZE.size + 5_000_000


def test_a_payload_that_is_too_large_is_not_taken(ends: Ends) -> None:
    primary, secondary = ends
    up_to_state(primary, secondary)
    primary.send_with(Message.VMSTATE_SEND, [b"x" * 11], 11)
    with pytest.raises(ChannelError, match="vmstate-send with 11 bytes; 10 is the most"):
        secondary.expect_with(Message.VMSTATE_SEND, memoryview(bytearray(10)))


@pytest.mark.parametrize("side", ["reader", "writer"])
def test_each_wait_has_a_deadline(ends: Ends, side: str) -> None:
    primary, secondary = ends
    up_to_state(primary, secondary)
    primary.timeout = secondary.timeout = 0.1
    began = time.monotonic()
    if side == "reader":
        with pytest.raises(ChannelError, match=r"the primary sent nothing for 0\.1 s"):
            secondary.expect_with(Message.VMSTATE_SEND, memoryview(bytearray(10)))
    else:
        with pytest.raises(ChannelError, match=r"the secondary took nothing for 0\.1 s"):
            primary.send_with(Message.VMSTATE_SEND, [bytes(LONG)], LONG)
    assert 0.1 <= time.monotonic() - began < TIMEOUT / 2


def test_who_falls_silent_waits_no_more_and_the_other_side_notices_nothing(ends: Ends) -> None:
    primary, secondary = ends
    primary.send(Message.CHECKPOINT_REQUEST)
    ending = soon(primary.fall_silent)
    with pytest.raises(ChannelError, match="this side has nothing more to say"):
        primary.expect(Message.CHECKPOINT_REPLY)
    ending.join()
    secondary.expect(Message.CHECKPOINT_REQUEST)
    secondary.send(Message.CHECKPOINT_REPLY)  # as if there were somebody
    secondary.timeout = 0.1
    with pytest.raises(ChannelError, match="sent nothing"):
        secondary.expect(Message.VMSTATE_SEND)


def test_who_falls_silent_in_the_midst_of_a_payload_sends_no_more_of_it(ends: Ends) -> None:
    primary, secondary = ends
    up_to_state(primary, secondary)
    ending = soon(primary.fall_silent)
    with pytest.raises(ChannelError, match="this side has nothing more to say"):
        primary.send_with(Message.VMSTATE_SEND, [bytes(LONG)], LONG)
    ending.join()
    secondary.timeout = 0.2
    with pytest.raises(ChannelError, match="sent nothing"):
        secondary.expect_with(Message.VMSTATE_SEND, memoryview(bytearray(LONG)))


@pytest.mark.parametrize("who", ["here", "there"])
def test_abort_ends_the_waits_of_both(ends: Ends, who: str) -> None:
    primary, secondary = ends
    primary.send(Message.CHECKPOINT_REQUEST)
    ending = soon((primary if who == "here" else secondary).abort)
    began = time.monotonic()
    with pytest.raises(ChannelError, match=r"the secondary closed the connection|broke"):
        primary.expect(Message.CHECKPOINT_REPLY)
    assert time.monotonic() - began < TIMEOUT / 2
    ending.join()


def test_ending_what_is_closed_is_harmless(ends: Ends) -> None:
    for conversation in ends:
        conversation.close()
        conversation.fall_silent()
        conversation.abort()
        conversation.close()
