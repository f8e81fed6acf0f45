"""A Linux that works (memory, a disk, a TCP connection) while it goes from process to process, and notices nothing."""

from __future__ import annotations

import os
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from pyvmm.net.bridge import attach
from tests.framework.guest_programs import initramfs_with
from tests.framework.migrating import START_DEADLINE, Side, sides
from tests.framework.net_commands import net, networks
from tests.framework.tcp_records import RECORD, EchoClient
from tests.framework.topology import Namespace, Topology
from tests.lab.selection import long_form
from tests.linux.conftest import BOOT_DEADLINE

MOVES = (10 if os.environ.get("PYVMM_IN_LAB") == "1" else 50) if long_form() else 5
LOAD = Path(__file__).with_name("migration_load.c")
MEMORY_MIB = 16
DISK = 2 << 20
BLOCK = 16384
GUEST, PORT = "10.91.0.2", 7
CLIENT = "10.91.0.200/24"
LIFE = BOOT_DEADLINE + 60 * MOVES + 60
"""Seconds for the whole: a move takes 3 on one emulated host, 40 on the other."""
pytestmark = [pytest.mark.linux, pytest.mark.net, pytest.mark.timeout(LIFE + 60)]

REPORT = re.compile(
    rb"load: (\d+) up (\d+\.\d+) memory (\d+)/(\d+) disk (\d+)/(\d+)/(\d+) slowest (\d+) echo (\d+)/(\d+)"
    rb" clock (\d+) slowest (\d+)\r?\n"
)
HEAD = struct.Struct("<QQQ")
MAGIC = 0x766D6D6C6F616421


@pytest.fixture
def topology() -> Iterator[Topology]:
    with Topology() as made:
        yield made


def connect(client: Namespace) -> socket.socket:
    """To the echo, which listens."""
    made = client.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.settimeout(30)
    made.connect((GUEST, PORT))
    return made


def digest_of(image: bytes) -> str:
    """What migration_load.c says of its disk; every block that was written must be whole."""
    digest = 0xCBF29CE484222325
    for place in range(len(image) // BLOCK):
        block = image[place * BLOCK : (place + 1) * BLOCK]
        magic, number, at = HEAD.unpack_from(block)
        crc = int.from_bytes(block[-4:], "little")
        if number:
            assert (magic, at, crc) == (MAGIC, place, zlib.crc32(block[:-4])), f"block {place} is torn"
        else:
            assert block == bytes(BLOCK), f"block {place} was never written"
        for word in (number, crc if number else 0):
            digest = ((digest ^ word) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{digest:016x}"


@dataclass
class Move:
    """One of them, in milliseconds: what query-migrate says, and for how long the client heard nothing meanwhile."""

    downtime: int
    total: int
    silence: float


def move_on(side: Side, to: Side, uri: str, client: EchoClient) -> Move:
    """Let the guest go from ``side`` to ``to``, which waits, and until it has done some work there."""
    to.wait_for("inmigrate", START_DEADLINE)
    began = time.monotonic()
    side.migrate(uri)
    info = side.migrated(120)
    ended = time.monotonic()
    assert info["status"] == "completed", info
    side.quit()
    to.wait_for_text(b" slowest ", 120)
    assert client.result.problem is None
    silence = client.result.longest_between(began, ended + 1.0) * 1000
    print(f"downtime {info['downtime']} ms, total {info['total-time']} ms, silence {silence:.0f} ms", flush=True)
    return Move(info["downtime"], info["total-time"], silence)


def check_reports(output: bytes, echoed: int) -> None:
    """None is lost or came twice, clocks went on, work was done, and the kernel has no complaint."""
    assert b"WRONG" not in output and b"load: all is well" in output, output[-3000:]
    reports = [tuple(map(float, report)) for report in REPORT.findall(output)]
    assert [report[0] for report in reports] == list(range(1, len(reports) + 1))
    up = [report[1] for report in reports]
    assert up == sorted(up)
    last = reports[-1]
    assert last[2] > 0 and last[4] > 0 and last[8] == echoed, last
    for complaint in (b"BUG", b"WARNING", b"rcu:", b"clocksource:", b"soft lockup", b"Oops", b"Call Trace", b"I/O err"):
        assert complaint not in output, output[-3000:]


def test_nothing_is_lost_over_many_moves(topology: Topology, tmp_path: Path) -> None:
    host, far = topology.namespace("host"), topology.namespace("client")
    net(host, "up", "demo")
    topology.veth((host, "port0", None), (far, "eth0", CLIENT))
    host.call(lambda: attach("port0", "pvm-demo"))
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(DISK))
    shape = ("--net", "demo", "--disk", str(image), "--initrd", str(initramfs_with(tmp_path, LOAD)))
    moves: list[Move] = []
    began = time.monotonic()
    with sides(tmp_path) as make:

        def start(number: int, *words: str) -> Side:
            return make(f"vm{number}", *shape, *words, command="linux", inside=host, timeout=LIFE)

        lives = [start(0, "--exec", f"/migration_load {MEMORY_MIB} /dev/vda {PORT}")]
        lives[0].wait_for_text(b"load: listening\n", BOOT_DEADLINE)
        client = EchoClient(connect(far))
        try:
            for number in range(1, MOVES + 1):
                uri = f"unix:{tmp_path}/m{number}"
                lives.append(start(number, "--incoming", uri))
                moves.append(move_on(lives[-2], lives[-1], uri, client))
            (vm,) = networks(host)["demo"]["vms"]
            assert (vm["vm"], vm["address"], vm["state"]) == (f"vm{MOVES}", GUEST, "connected")
            result = client.finish()
            status, _, problems = lives[-1].end(180)
        finally:
            client.close()
    output = b"".join(side.output for side in lives)
    print(
        f"{MOVES} moves, {time.monotonic() - began:.0f} s with the boot; medians: downtime"
        f" {median(move.downtime for move in moves)} ms, total {median(move.total for move in moves)} ms;"
        f" {result.records} records came back, {result.resent} segments were sent again; the longest silence"
        f" {result.longest * 1000:.0f} ms, near a move {max(move.silence for move in moves):.0f} ms\n"
        + output.decode(errors="replace")[-400:]
    )
    assert result.problem is None
    check_reports(output, result.records * RECORD)
    (digest,) = re.findall(rb"load: disk digest ([0-9a-f]{16}) after", output)
    assert digest_of(image.read_bytes()) == digest.decode()
    assert status == 1, (status, problems)  # debug-exit 0
    assert networks(host)["demo"]["vms"] == []
