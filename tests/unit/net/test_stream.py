"""The rootless backend's address and connection."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError, HostError
from pyvmm.net.stream import Stream, parse_target


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("unix:/run/passt.socket", "/run/passt.socket"), ("unix:a:b", "a:b"),
        ("tcp:localhost:1234", ("localhost", 1234)), ("tcp:[::1]:80", ("::1", 80)),
    ],
)  # fmt: skip
def test_targets(target: str, address: object) -> None:
    assert parse_target(target) == address


@pytest.mark.parametrize(
    "target",
    ["", "unix:", "tcp:", "tcp:localhost", "tcp:localhost:", "tcp:h:0", "tcp:h:65536", "tcp:::1:80", "udp:h:1"],
)
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(ConfigError, match="write unix:PATH or tcp:HOST:PORT"):
        parse_target(target)


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"No such file.*start the other side"):
        Stream(f"unix:{tmp_path}/none")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(HostError, match="refused"):
            Stream(f"tcp:127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(HostError, match="too long"):
        Stream("unix:/" + "x" * 200)


def test_a_connection_does_not_block(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        stream = Stream(f"unix:{path}")
        assert not stream.carries_header and stream.mtu is None
        with socket.socket(fileno=socket.dup(stream.fd)) as end, pytest.raises(BlockingIOError):
            end.recv(1)
        stream.close()
        stream.close()
        assert stream.fd == -1
