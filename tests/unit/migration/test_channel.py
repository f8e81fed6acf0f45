"""Frames over a real socket, and everything that can go wrong with them."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ChannelError, ConfigError
from pyvmm.migration.channel import FRAME_MAX, HEAD, Channel, Listener, connect, parse_uri


def pair(stall: float = 2.0) -> tuple[Channel, socket.socket]:
    one, other = socket.socketpair()
    return Channel(one, stall=stall), other


def sent_by(frames: list[tuple[int, bytes]]) -> bytes:
    channel, other = pair()
    with other:
        for kind, payload in frames:
            channel.send(kind, payload)
        channel.close()
        data = b""
        while piece := other.recv(65536):
            data += piece
        return data


def received(data: bytes) -> list[tuple[int, bytes]]:
    """Frames of ``data`` until the error that ends them."""
    channel, other = pair()
    frames = []
    with other:
        other.sendall(data)
        other.shutdown(socket.SHUT_WR)
        try:
            while True:
                kind, payload = channel.receive()
                frames.append((kind, bytes(payload)))
        except ChannelError:
            return frames
        finally:
            channel.close()


FRAMES = st.lists(st.tuples(st.integers(0, 0xFFFFFFFF), st.binary(max_size=300)), min_size=1, max_size=5)


@given(FRAMES)
@settings(deadline=None, max_examples=50)
def test_what_is_sent_is_received(frames: list[tuple[int, bytes]]) -> None:
    assert received(sent_by(frames)) == frames


@given(FRAMES, st.data())
@settings(deadline=None, max_examples=100)
def test_a_flipped_bit_is_noticed_wherever_it_is(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    stream = bytearray(sent_by(frames))
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    stream[bit // 8] ^= 1 << bit % 8
    got = received(bytes(stream))
    assert len(got) < len(frames) and got == frames[: len(got)]


@given(FRAMES, st.data())
@settings(deadline=None, max_examples=50)
def test_a_lost_or_doubled_frame_is_noticed(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    chosen = data.draw(st.integers(0, len(frames) - 1))
    ends = [0]
    for _, payload in frames:
        ends.append(ends[-1] + HEAD.size + len(payload))
    stream = sent_by(frames)
    lost = stream[: ends[chosen]] + stream[ends[chosen + 1] :]
    assert received(lost) == frames[:chosen]
    doubled = stream[: ends[chosen + 1]] + stream[ends[chosen] : ends[chosen + 1]] + stream[ends[chosen + 1] :]
    assert received(doubled) == frames[: chosen + 1]


def test_a_giant_length_is_refused_before_anything_is_allocated() -> None:
    channel, other = pair()
    with other:
        other.sendall(struct.pack("<IIII", 1, 0, FRAME_MAX + 1, 0))
        with pytest.raises(ChannelError, match=f"{FRAME_MAX} is the most"):
            channel.receive()
    channel.close()


def test_a_peer_that_does_nothing_is_given_up() -> None:
    channel, other = pair(stall=0.1)
    with other:
        with pytest.raises(ChannelError, match=r"sent nothing for 0\.1 s"):
            channel.receive()
        with pytest.raises(ChannelError, match=r"took nothing for 0\.1 s"):
            for _ in range(100):
                channel.send(1, bytes(1 << 20))
    channel.close()


def test_abort_ends_whoever_waits() -> None:
    import threading

    channel, other = pair(stall=30.0)
    with other:
        timer = threading.Timer(0.05, channel.abort)
        timer.start()
        with pytest.raises(ChannelError, match="closed"):
            channel.receive()
        timer.join(5)
    channel.close()


@pytest.mark.parametrize("uri", ["", "tcp", "tcp:", "tcp:1", "tcp::1", "tcp:host:", "tcp:h:65536", "tcp:h:٣", "unix:",
                                 "unix:" + "x" * 108, "fd:", "fd:-1", "fd:x", "http://x", "exec:rm"])  # fmt: skip
def test_no_uri(uri: str) -> None:
    with pytest.raises(ConfigError):
        parse_uri(uri)


def test_tcp_and_its_one_connection() -> None:
    listener = Listener("tcp:127.0.0.1:0")
    uri = f"tcp:127.0.0.1:{listener.port}"
    first = connect(uri, timeout=2.0, stall=2.0)
    other = listener.accept(timeout=2.0, stall=2.0)
    with pytest.raises(ChannelError, match="cannot connect"):
        connect(uri, timeout=2.0, stall=2.0)
    other.send(7, b"seven")
    assert first.receive() == (7, b"seven")
    first.close()
    other.close()


def test_a_unix_socket_that_a_killed_process_left_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'socket'}"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "socket"))
    dead.close()
    listener = Listener(uri)
    with pytest.raises(ConfigError, match="somebody is listening"):
        Listener(uri)
    listener.close()
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        Listener(f"unix:{tmp_path / 'file'}")


def test_nobody_comes_or_is_there(tmp_path: Path) -> None:
    listener = Listener(f"unix:{tmp_path / 's'}")
    with pytest.raises(ChannelError, match=r"nobody connected to unix:.* for 0\.1 s"):
        listener.accept(timeout=0.1, stall=1.0)
    listener.close()
    with pytest.raises(ChannelError, match=r"cannot connect to unix:.*No such file"):
        connect(f"unix:{tmp_path / 's'}", timeout=1.0, stall=1.0)


def test_a_descriptor_handed_over() -> None:
    one, other = socket.socketpair()
    channel = connect(f"fd:{one.detach()}", timeout=1.0, stall=1.0)
    with other:
        channel.send(1, b"x")
        assert len(other.recv(100)) == HEAD.size + 1
    channel.close()
    with pytest.raises(ConfigError, match="hand it over open"):
        connect("fd:999999", timeout=1.0, stall=1.0)
    with open(os.devnull) as file, pytest.raises(ConfigError, match="is not a socket"):
        connect(f"fd:{file.fileno()}", timeout=1.0, stall=1.0)
