"""The heartbeat: it notices silence, ends and nonsense, tells once, and judges nobody after its own sleep."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.colo.heartbeat import BEAT, MAGIC, Heartbeat
from pyvmm.errors import ConfigError

INTERVAL = 0.02
LOSS = 5


class Watch:
    """Collects what a heartbeat reports."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.told = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.told.set()


Starter = Callable[[socket.socket, Watch], Heartbeat]


@pytest.fixture
def start() -> Iterator[Starter]:
    started: list[Heartbeat] = []

    def begin(sock: socket.socket, watch: Watch) -> Heartbeat:
        beat = Heartbeat(sock, 7, watch, interval=INTERVAL, loss=LOSS)
        started.append(beat)
        beat.start()
        return beat

    yield begin
    for beat in started:
        beat.stop()


def test_two_sides_hear_each_other_and_one_that_ends_is_noticed_at_once(start: Starter) -> None:
    one, two = socket.socketpair()
    a, b = Watch(), Watch()
    first, second = start(one, a), start(two, b)
    time.sleep(INTERVAL * LOSS * 3)
    assert not a.reasons and not b.reasons
    assert first.counts.heard > LOSS and second.counts.heard > LOSS
    assert first.counts.longest_silence < INTERVAL * LOSS
    began = time.monotonic()
    second.stop()
    assert a.told.wait(2.0) and time.monotonic() - began < INTERVAL * LOSS + 0.5
    assert len(a.reasons) == 1 and "closed" in a.reasons[0]
    assert not b.reasons, "who is stopped reports nothing"


def test_silence_is_noticed_in_its_time_and_told_once(start: Starter) -> None:
    mine, other = socket.socketpair()
    watch = Watch()
    began = time.monotonic()
    start(mine, watch)
    assert watch.told.wait(5.0)
    assert time.monotonic() - began >= INTERVAL * (LOSS - 1)
    time.sleep(INTERVAL * LOSS * 2)
    assert len(watch.reasons) == 1 and watch.reasons[0].startswith("nothing was heard for")
    other.close()


def test_who_does_not_read_is_no_reason(start: Starter) -> None:
    """The line is full, beats come in all the same: the other side is alive."""
    mine, other = socket.socketpair()
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    mine.setblocking(False)
    try:
        while True:
            mine.send(b"\0" * 1024)
    except BlockingIOError:
        pass
    watch = Watch()
    beat = start(mine, watch)
    for count in range(LOSS * 4):
        other.send(BEAT.pack(MAGIC, 0, 7, count))
        time.sleep(INTERVAL / 2)
    assert not watch.reasons
    assert beat.counts.not_sent > 0
    other.close()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (BEAT.pack(MAGIC, 0, 8, 0), "term 8, this one in 7"), (BEAT.pack(MAGIC, 0, 7, 1), "beat 1 came where 0"),
        (BEAT.pack(MAGIC, 0, 7, 0) * 2, "beat 0 came where 1"), (BEAT.pack(MAGIC, 1, 7, 0), "no beat"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "no beat"),
    ],
)  # fmt: skip
def test_what_is_no_beat_of_this_term_ends_it(start: Starter, sent: bytes, said: str) -> None:
    mine, other = socket.socketpair()
    watch = Watch()
    start(mine, watch)
    other.send(sent)
    assert watch.told.wait(5.0)
    assert said in watch.reasons[0]
    other.close()


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_beats_cut_anywhere_are_beats(cuts: list[int], count: int) -> None:
    mine, other = socket.socketpair()
    watch = Watch()
    beat = Heartbeat(mine, 7, watch, interval=0.001, loss=1000)
    beat.start()
    try:
        stream = b"".join(BEAT.pack(MAGIC, 0, 7, number) for number in range(count))
        for size in [*cuts, len(stream)]:
            other.send(stream[:size])
            stream = stream[size:]
        until = time.monotonic() + 5.0
        while beat.counts.heard < count and time.monotonic() < until and not watch.reasons:
            time.sleep(0.001)
        assert beat.counts.heard == count and not watch.reasons
    finally:
        beat.stop()
        other.close()


SIDE = f"""
import socket, sys, time
from pyvmm.colo.heartbeat import Heartbeat
sock = socket.socket(fileno=int(sys.argv[1]))
beat = Heartbeat(sock, 7, lambda reason: print("lost", reason, flush=True), interval={INTERVAL}, loss={LOSS})
beat.start()
print("beating", flush=True)
sys.stdin.read()
print("heard", beat.counts.heard, flush=True)
beat.stop()
"""


def test_a_stopped_process_is_found_silent_and_itself_judges_nobody(start: Starter) -> None:
    mine, other = socket.socketpair()
    watch = Watch()
    process = subprocess.Popen(
        [sys.executable, "-c", SIDE, str(other.fileno())], pass_fds=[other.fileno()], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    other.close()
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "beating\n"
        beat = start(mine, watch)
        time.sleep(INTERVAL * LOSS * 2)
        assert not watch.reasons
        os.kill(process.pid, signal.SIGSTOP)
        assert watch.told.wait(5.0) and "nothing was heard" in watch.reasons[0]
        sent = beat.counts.sent
        # This side has stopped beating, too; so that the other has something to read, it gets what it missed.
        mine.setblocking(True)
        mine.sendall(b"".join(BEAT.pack(MAGIC, 0, 7, sent + number) for number in range(3)))
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(INTERVAL * 2)
        assert process.poll() is None
        output, _ = process.communicate(timeout=10.0)
        assert "lost" not in output, output
        assert int(output.split()[1]) == sent + 3
    finally:
        process.kill()
        process.wait(10)


def test_limits() -> None:
    for interval, loss in ((0.0, 4), (61.0, 4), (0.05, 1), (0.05, 1001)):
        mine, other = socket.socketpair()
        with mine, other, pytest.raises(ConfigError, match="heartbeat"):
            Heartbeat(mine, 1, Watch(), interval=interval, loss=loss)


def test_a_beat_is_24_bytes() -> None:
    assert BEAT.size == 24 and struct.calcsize(">IIQQ") == 24
