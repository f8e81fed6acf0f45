"""Names and sockets of running machines, without any machine."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.qmp.control import claim_name, connect, open_folder, running_names
from pyvmm.qmp.endpoints import Endpoint, open_endpoint


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_a_claimed_name_is_found_and_given_back(runtime: Path) -> None:
    assert running_names() == []
    name, endpoint = claim_name("one", exact=True)
    assert name == "one" and running_names() == ["one"]
    assert os.stat(runtime / "pyvmm").st_mode & 0o777 == 0o700
    connect("one", 5.0).close()
    endpoint.close()
    assert running_names() == [] and os.listdir(runtime / "pyvmm") == [".lock"]


def test_second_ones_get_a_suffix_unless_the_name_was_chosen() -> None:
    claimed = [claim_name("guest.bin", exact=False) for _ in range(3)]
    assert [name for name, _ in claimed] == ["guest.bin", "guest.bin-2", "guest.bin-3"]
    with pytest.raises(ConfigError, match="a machine of that name is running"):
        claim_name("guest.bin-2", exact=True)
    claimed[1][1].close()
    name, endpoint = claim_name("guest.bin", exact=False)
    assert name == "guest.bin-2"
    for one in (claimed[0][1], claimed[2][1], endpoint):
        one.close()


def test_what_a_dead_machine_left_is_removed(runtime: Path) -> None:
    """A process that was killed leaves the file; nobody listens there."""
    name, endpoint = claim_name("dead", exact=True)
    endpoint.socket.close()
    path = runtime / "pyvmm" / "dead.sock"
    assert path.exists()
    assert running_names() == [] and not path.exists()
    name, second = claim_name("dead", exact=True)
    assert name == "dead"
    second.socket.close()
    name, third = claim_name("dead", exact=True)  # claiming alone clears it, too
    assert name == "dead"
    third.close()
    for left in (endpoint, second):
        left.close()


def test_names_no_socket_can_have(runtime: Path) -> None:
    for name in ("a/b", "", ".hidden", "-x", "x" * 65, "a\0b", "ä"):
        with pytest.raises(ConfigError, match="1 to 64 letters"):
            claim_name(name, exact=True)
        if name != "ä":
            with pytest.raises(ConfigError, match="no running machine is called"):
                connect(name, 1.0)
    for wild, tame in [("../../etc", "_.._etc"), ("ä b", "_b"), ("", "machine"), ("x" * 300, "x" * 56)]:
        name, endpoint = claim_name(wild, exact=False)
        assert name.endswith(tame) and (runtime / "pyvmm" / f"{name}.sock").exists()
        endpoint.close()


def test_a_path_longer_than_a_socket_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    name, endpoint = claim_name("far", exact=True)
    assert running_names() == [name]
    connect(name, 5.0).close()
    endpoint.close()


def test_many_at_once_get_different_names() -> None:
    got: list[tuple[str, Endpoint]] = []

    def claim() -> None:
        got.append(claim_name("twin", exact=False))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {name for name, _ in got} == {"twin", *(f"twin-{number}" for number in range(2, 9))}
    for _, endpoint in got:
        endpoint.close()


def test_a_folder_that_others_may_enter_is_refused(runtime: Path) -> None:
    (runtime / "pyvmm").mkdir(mode=0o700)
    (runtime / "pyvmm").chmod(0o755)
    with pytest.raises(HostError, match="closed to others"):
        claim_name("one", exact=True)


def test_a_link_in_the_folders_place_is_refused(runtime: Path) -> None:
    (runtime / "elsewhere").mkdir(mode=0o700)
    (runtime / "pyvmm").symlink_to(runtime / "elsewhere")
    with pytest.raises(HostError, match="must be a folder of yours"):
        open_folder(make=True)


def test_somebody_elses_runtime_folder_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``su``: the variable is still the other user's."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/self/no-such")
    folder = open_folder(make=True)
    path = os.readlink(f"/proc/self/fd/{folder}")
    os.close(folder)
    assert path == f"/tmp/pyvmm-{os.geteuid()}"
    if not os.listdir(path):
        os.rmdir(path)


def test_the_error_for_an_unknown_machine_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no running machine is called 'x'; none is running"):
        connect("x", 1.0)
    _, endpoint = claim_name("b", exact=True)
    _, other = claim_name("a", exact=True)
    with pytest.raises(ConfigError, match="there is a, b"):
        connect("x", 1.0)
    endpoint.close()
    other.close()


@pytest.mark.parametrize(
    "option",
    ["", "unix", "unix:", "tcp:", "tcp:1234", "tcp::1234", "tcp:localhost:", "tcp:localhost:x", "tcp:localhost:65536",
     "tcp:localhost:²", "udp:localhost:1", "unix:/tmp/x,server=off", "unix:/no/such/folder/x", "tcp:no.such.invalid:1",
     "unix:" + "x" * 200, "tcp:" + "x" * 300 + ":1"],
)  # fmt: skip
def test_endpoints_that_cannot_be_are_one_line(option: str) -> None:
    with pytest.raises(PyvmmError) as caught:
        open_endpoint(option)
    assert str(caught.value).startswith(f"--qmp {option}: ") and "\n" not in str(caught.value)


def test_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "q"
    endpoint = open_endpoint(f"unix:{path},server=on,wait=off")
    with pytest.raises(ConfigError, match="in use"):
        open_endpoint(f"unix:{path}")
    endpoint.socket.close()
    again = open_endpoint(f"unix:{path}")  # stale: nobody listens
    again.close()
    endpoint.close()
    assert not path.exists()
    for host in ("127.0.0.1", "localhost"):
        endpoint = open_endpoint(f"tcp:{host}:0")
        port = endpoint.socket.getsockname()[1]
        socket.create_connection((host, port), 5).close()
        with pytest.raises(ConfigError, match="in use"):
            open_endpoint(f"tcp:{host}:{port}")
        endpoint.close()
