"""What a guest's devices are attached to when it moves: the disk is handed over, the network told."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.net.announcement import self_announcement
from tests.framework.migrating import CommandError, Side
from tests.framework.processes import REPOSITORY, refused

Start = Callable[..., Side]
READER = str(REPOSITORY / "guests" / "disk-reader")
ECHO = str(REPOSITORY / "guests" / "net-echo")
GUEST, HOST = "192.0.2.2", "192.0.2.1"
GUEST_MAC, HOST_MAC = bytes.fromhex("525400000007"), bytes.fromhex("020000000001")


def disk(folder: Path, size: int = 4 << 20) -> Path:
    path = folder / "disk.img"
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def is_taken(path: Path) -> bool:
    """Whether somebody has the lock of a disk that is written."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_disk_is_handed_over_and_nobody_else_gets_it_meanwhile(start: Start, tmp_path: Path) -> None:
    """The guest writes and verifies all the time; its requests in flight are finished here, the rest done there."""
    path = disk(tmp_path)
    guest = (READER, "--disk", str(path), "--append", "write=1 verify=1 depth=4 size=4096 requests=150000")
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m")
    source = start("from", *guest)
    source.wait_for_text(b"begin writing")
    to.wait_for("inmigrate")  # with the disk open, and the source writing to it
    assert is_taken(path)
    source.migrate(f"unix:{tmp_path}/m")
    assert source.migrated()["status"] == "completed"
    to.wait_for("running")
    assert is_taken(path)
    with pytest.raises(CommandError, match=r"disk\.img"):
        source.qmp.execute("cont")  # it is the destination's
    assert source.status() == "postmigrate"
    begin = source.quit()
    status, rest, problems = to.end(60)
    assert (status, problems) == (33, "")
    _, begun, work = (begin + rest).replace(b"\r", b"").partition(b"begin writing\n")
    assert begun + work == b"begin writing\nend 150000\nbegin reading\nend 150000\ndone\n"


def test_a_machine_that_gave_its_guest_away_can_have_it_back_when_nobody_has_it(start: Start, tmp_path: Path) -> None:
    path = disk(tmp_path)
    guest = (READER, "--disk", str(path), "--append", "write=1 verify=1 requests=20000")
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m", "-S")
    source = start("from", *guest)
    source.wait_for_text(b"begin writing")
    to.wait_for("inmigrate")
    source.migrate(f"unix:{tmp_path}/m")
    assert source.migrated()["status"] == "completed"
    to.wait_for("paused")
    to.quit()
    source.qmp.execute("cont")
    status, output, problems = source.end(60)
    assert (status, problems) == (33, "")
    assert output.endswith((b"done\r\n", b"done\n"))


def test_a_disk_that_the_destination_does_not_have(tmp_path: Path) -> None:
    text = refused("run", READER, "--disk", str(tmp_path / "none.img"), "--incoming", f"unix:{tmp_path}/m")
    assert "none.img" in text and not (tmp_path / "m").exists()


def test_a_disk_that_somebody_else_has_at_the_hand_over(start: Start, tmp_path: Path) -> None:
    """The destination's name of the disk leads to another file, which is taken: nobody runs, and both say so."""
    here, there = disk(tmp_path), tmp_path / "elsewhere"
    there.mkdir()
    taken = disk(there)
    append = ("--append", "write=1 requests=30000")
    to = start("to", READER, "--disk", str(taken), "--incoming", f"unix:{tmp_path}/m", *append)
    source = start("from", READER, "--disk", str(here), *append)
    source.wait_for_text(b"begin writing")
    to.wait_for("inmigrate")
    with open(taken, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        source.migrate(f"unix:{tmp_path}/m")
        info = source.migrated()
        status, output, problems = to.end()
    assert (status, output) == (125, b"")
    assert "disk.img" in problems and problems.count("\n") == 1
    assert info["status"] == "failed" and "disk.img" in info["error-desc"]
    assert source.status() == "paused"
    source.qmp.execute("cont")  # its owner has looked: nobody runs it
    assert source.end(60)[0] == 33


class Switch:
    """The far end of a guest's card: frames over a unix socket, each behind its length."""

    def __init__(self, path: Path) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()
        self.server.settimeout(20)

    def accept(self) -> socket.socket:
        peer, _ = self.server.accept()
        peer.settimeout(20)
        return peer


def receive(peer: socket.socket) -> bytes:
    size = struct.unpack(">I", peer.recv(4, socket.MSG_WAITALL))[0]
    return peer.recv(size, socket.MSG_WAITALL)


def send(peer: socket.socket, data: bytes) -> None:
    """A UDP datagram to the guest's echo port."""
    addresses = socket.inet_aton(HOST) + socket.inet_aton(GUEST)
    body = struct.pack(">HHHH", 4000, 7, 8 + len(data), 0) + data
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack(">H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + head[12:]
    frame = GUEST_MAC + HOST_MAC + b"\x08\x00" + head + body
    peer.sendall(struct.pack(">I", len(frame)) + frame)


def echoed(peer: socket.socket, data: bytes) -> int:
    """``data`` comes back; how often the host announced its guest before that."""
    send(peer, data)
    announced = 0
    while (frame := receive(peer)) == self_announcement(GUEST_MAC):
        announced += 1
    assert frame[42 : 42 + len(data)] == data
    return announced


def test_a_guest_answers_on_the_card_that_it_has_now(start: Start, tmp_path: Path) -> None:
    switch = Switch(tmp_path / "net")
    guest = (ECHO, "--append", f"ip={GUEST}", "--net", f"stream:unix:{tmp_path}/net,mac=52:54:00:00:00:07")
    with switch.server:
        source = start("from", *guest)
        before = switch.accept()
        to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m")
        after = switch.accept()
        with before, after:
            source.wait_for_text(f"net-echo: {GUEST} at ".encode())
            to.wait_for("inmigrate")
            assert sum(echoed(before, b"before %d" % number) for number in range(50)) == 0
            source.migrate(f"unix:{tmp_path}/m")
            assert source.migrated()["status"] == "completed"
            announced = sum(echoed(after, b"after %d" % number) for number in range(50))
            while announced < 5:  # announce-rounds
                assert receive(after) == self_announcement(GUEST_MAC)
                announced += 1
            send(after, b"quit")
            assert to.end()[0] == 33
            source.quit()


def test_the_network_is_told_by_hand(start: Start, tmp_path: Path) -> None:
    """announce-self: as often as it says, by the cards it names, and only for a guest that is here."""
    switch = Switch(tmp_path / "net")
    guest = (ECHO, "--append", f"ip={GUEST}", "--net", f"stream:unix:{tmp_path}/net,mac=52:54:00:00:00:07")
    times = {"initial": 10, "max": 20, "step": 5, "rounds": 3}
    with switch.server:
        one = start("one", *guest)
        with switch.accept() as peer:
            one.wait_for_text(f"net-echo: {GUEST} at ".encode())
            with pytest.raises(CommandError, match="no network card 'eth0'; there are: virtio-net"):
                one.qmp.execute("announce-self", {**times, "interfaces": ["eth0"]})
            one.qmp.execute("announce-self", {**times, "interfaces": []})
            assert echoed(peer, b"nobody was named") == 0
            for _ in range(2):
                one.qmp.execute("announce-self", times)
                assert [receive(peer) for _ in range(3)] == [self_announcement(GUEST_MAC)] * 3
            assert echoed(peer, b"no more than that") == 0
            one.qmp.execute("stop")
            with pytest.raises(CommandError, match="does not run here"):
                one.qmp.execute("announce-self", times)
            one.quit()
