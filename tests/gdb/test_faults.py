"""Clients that gdb is not: broken, greedy, twice, gone in the middle. The guest goes on, untouched."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.gdb.packets import PACKET_MAX
from pyvmm.gdb.session import READ_MAX
from pyvmm.qmp.client import open_client
from tests.framework.debugging import Client, Debugged, debugged
from tests.framework.real_mode import image

COUNTER = 0x7C80
# 7c00: inc word [0x7c80]; out 0x99, al; jmp 7c00
COUNT = bytes.fromhex("ff06807c e699 ebf8")
LOOP, OUT = 0x7C00, 0x7C04


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Debugged]:
    """A guest that counts; with a QMP socket beside the debugger's."""
    guest = image(tmp_path, COUNT, "count.bin")
    with debugged(tmp_path, "run", guest, "--qmp", f"unix:{tmp_path}/qmp", "--timeout", "100") as machine:
        yield machine


def count_of(client: Client) -> int:
    return int.from_bytes(bytes.fromhex(client.ask(b"m%x,2" % COUNTER).decode()), "little")


def goes_on(machine: Debugged) -> bool:
    """Whether the guest runs, by itself, and memory is as it was loaded."""
    with open_client(f"unix:{machine.path.parent}/qmp", 20) as qmp:
        assert qmp.execute("query-status")["running"]
        look = {"command-line": f"xp/{len(COUNT)}xb {LOOP:#x}"}
        code = qmp.execute("human-monitor-command", look).split()
        assert bytes(int(word, 16) for word in code if len(word) == 4) == COUNT, "a breakpoint was left behind"
        look = {"command-line": f"xp/1xh {COUNTER:#x}"}
        before, deadline = qmp.execute("human-monitor-command", look), time.monotonic() + 20
        while qmp.execute("human-monitor-command", look) == before:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def test_breakpoint_ctrl_c_and_detach(counting: Debugged) -> None:
    with counting.client() as client:
        assert client.ask(b"?").startswith(b"T05thread:1")
        assert client.ask(b"Z0,%x,1" % OUT) == b"OK"
        seen = []
        for _ in range(3):
            assert client.ask(b"vCont;c") == b"T05thread:1;swbreak:;"
            seen.append(count_of(client))
            assert client.ask(b"m%x,8" % LOOP) == COUNT.hex().encode(), "memory is shown without its INT3s"
            assert client.ask(b"z0,%x,1" % OUT) == b"OK"
            assert client.ask(b"vCont;s:1") == b"T05thread:1;", "OUT, whose access KVM has user space complete"
            assert bytes.fromhex(client.ask(b"p8").decode())[:2] == (OUT + 2).to_bytes(2, "little")
            assert client.ask(b"Z0,%x,1" % OUT) == b"OK"
        assert [seen[0] + 1 & 0xFFFF, seen[0] + 2 & 0xFFFF] == seen[1:], "each round stopped once"
        assert client.ask(b"z0,%x,1" % OUT) == b"OK"
        client.send(b"vCont;c")
        time.sleep(0.1)
        client.socket.sendall(b"\x03")
        assert client.receive() == b"T02thread:1;"
        now = count_of(client)
        assert now == count_of(client) != seen[-1]
        assert client.ask(b"D") == b"OK"
    assert goes_on(counting)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_debugger_that_vanishes_leaves_nothing_behind(counting: Debugged, kind: int) -> None:
    for last in (b"vCont;c", b"vCont;s:1", b"g", b"m0,10"):
        with counting.client() as client:
            assert client.ask(b"Z%d,%x,1" % (kind, OUT)) == b"OK"
            assert client.ask(b"Z2,%x,2" % COUNTER) == b"OK"
            client.send(last)
    time.sleep(0.1)
    assert goes_on(counting)
    with counting.client() as client:
        assert client.ask(b"?").startswith(b"T05"), "the next one is welcome"


def test_a_watchpoint_stops_behind_the_write(counting: Debugged) -> None:
    with counting.client() as client:
        assert client.ask(b"Z2,%x,2" % COUNTER) == b"OK"
        for _ in range(3):
            before = count_of(client)
            assert client.ask(b"vCont;c") == b"T05thread:1;watch:%x;" % COUNTER
            assert count_of(client) == (before + 1) & 0xFFFF
            assert int.from_bytes(bytes.fromhex(client.ask(b"p8").decode()), "little") == OUT


def test_the_second_debugger_is_refused_and_disturbs_nobody(counting: Debugged) -> None:
    with counting.client() as first:
        count = count_of(first)
        for _ in range(8):
            with counting.client() as second:
                assert second.ask(b"qSupported:swbreak+") == b"E.another debugger is connected"
                with pytest.raises(ConnectionError):
                    second.receive()
        assert count_of(first) == count
    assert goes_on(counting)


def test_malformed_packets_are_answered_and_done_with(counting: Debugged) -> None:
    with counting.client() as client:
        client.socket.sendall(b"$g#00")
        assert client.socket.recv(1) == b"-"
        for packet in (b"m", b"m,", b"m1", b"mzz,1", b"m0,1,2", b"p", b"pffff", b"m-1,4",
                       b"m" + b"f" * 17 + b",1",
                       b"M0,4:00", b"Mffffffffffffffff,1:00", b"X7c00,2:a", b"P0", b"P0=1", b"G00", b"Z", b"Z0,0",
                       b"Z0,x,1", b"Hgff", b"Hx", b"T9", b"T", b"vCont;x", b"vCont;s:9",
                       b"qXfer:features:read:target.xml:",
                       b"qRcmd,1", b"qThreadExtraInfo,", b"Z2,0,ffffffff", b"Z2,0,ffffffffffffffff"):  # fmt: skip
            assert client.ask(packet)[:1] == b"E", packet
        for packet in (b"", b"vMustReplyEmpty", b"\xff\xfe", b"!", b"R00", b"Z9,0,1", b"Z3,7c80,1", b"qUnknown", b"bc"):
            assert client.ask(packet)[:1] in (b"", b"E"), packet
        assert client.ask(b"?").startswith(b"T05")


def test_huge_requests_are_answered_in_part_or_not_at_all(counting: Debugged) -> None:
    with counting.client() as client:
        assert len(client.ask(b"m0,ffffffffffffffff")) == 2 * READ_MAX
        assert len(client.ask(b"x0,ffffffff")) == READ_MAX + 1
        client.socket.sendall(b"$M0," + b"0" * (4 * PACKET_MAX) + b"#00")
        assert client.ask(b"?").startswith(b"T05"), "behind a packet that is too long"
        for at in range(1200):
            answer = client.ask(b"Z0,%x,1" % (0x8000 + at))
            assert answer == b"OK" or (at >= 1000 and answer.startswith(b"E.at most 1000")), (at, answer)
        assert answer.startswith(b"E.")
    assert goes_on(counting)


def test_who_asks_and_does_not_read_is_let_go(counting: Debugged) -> None:
    request = b"qXfer:features:read:target.xml:0,2000"
    with counting.client() as client, pytest.raises(ConnectionError):
        for _ in range(1000):
            client.socket.sendall(b"$%s#%02x" % (request, sum(request) & 0xFF) * 100)
    assert goes_on(counting)


def test_noise(counting: Debugged) -> None:
    choice = random.Random(7)
    letters = b"$#}*+-\x03mMgGpPZzqQvHTcs0123456789abcdef,:;="
    for _ in range(30):
        with counting.client() as client:
            client.socket.sendall(bytes(choice.choices(letters, k=2000)))
            for _ in range(20):
                client.send(bytes(choice.choices(letters, k=choice.randrange(1, 12))))
    assert goes_on(counting)


def test_kill_ends_the_machine(counting: Debugged) -> None:
    with counting.client() as client:
        client.send(b"k")
        status, _, err = counting.running.finish()
        assert (status, err) == (0, b"")


def test_qmp_opens_and_closes_the_server_and_its_stop_is_told(counting: Debugged, tmp_path: Path) -> None:
    other = tmp_path / "other.sock"
    with open_client(f"unix:{tmp_path}/qmp", 20) as qmp:
        assert qmp.execute("gdbserver", {"address": f"unix:{other}"}) == {"address": f"unix:{other}"}
        assert not counting.path.exists(), "one place at a time"
        with Client(other) as client:
            assert qmp.execute("query-status")["status"] == "paused"
            assert client.ask(b"Z0,7c10,1") == b"OK"  # behind the loop: never met
            client.send(b"vCont;c")
            while not qmp.execute("query-status")["running"]:
                time.sleep(0.01)
            qmp.execute("stop")
            assert client.receive() == b"T02thread:1;"
            look = {"command-line": "xp/2xb 0x7c10"}
            assert qmp.execute("human-monitor-command", look).endswith("0x00 0x00\r\n"), "who stops it sees no INT3"
            assert qmp.execute("human-monitor-command", {"command-line": "gdbserver none"}) == "Disabled gdbserver\r\n"
            with pytest.raises(ConnectionError):
                client.receive()
        assert not other.exists()
        address = qmp.execute("gdbserver", {"address": "tcp:127.0.0.1:0"})["address"]
        assert address.startswith("tcp:127.0.0.1:") and not address.endswith(":0")
    assert goes_on(counting)
