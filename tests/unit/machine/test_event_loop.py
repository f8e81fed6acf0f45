"""The main loop: order of timers, posts from other threads, readers that vanish in the same round."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.machine.event_loop import EventLoop


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop()
    yield made
    made.close()


def test_timers_run_in_the_order_they_are_due(loop: EventLoop) -> None:
    seen: list[str] = []
    loop.call_later(0.03, loop.stop)
    loop.call_later(0.02, lambda: seen.append("b"))
    loop.call_later(0.01, lambda: seen.append("a"))
    loop.call_later(0.015, lambda: seen.append("never")).cancel()
    loop.run()
    assert seen == ["a", "b"]


def test_post_from_another_thread_wakes_a_loop_without_timers(loop: EventLoop) -> None:
    thread = threading.Thread(target=lambda: loop.post(loop.stop))
    thread.start()
    loop.run()
    thread.join(5)


def test_posts_made_while_serving_posts_wait_for_the_next_round(loop: EventLoop) -> None:
    seen: list[int] = []

    def again() -> None:
        seen.append(len(seen))
        loop.post(again)

    loop.post(again)
    for expected in (1, 2, 3):
        loop.run_once(1)
        assert len(seen) == expected


def test_a_reader_removed_by_another_in_the_same_round_is_not_called(loop: EventLoop) -> None:
    pipes = [os.pipe(), os.pipe()]
    calls: list[int] = []

    def reader(mine: int, other: int) -> None:
        calls.append(mine)
        loop.remove_reader(other)

    (a, a_in), (b, b_in) = pipes
    loop.add_reader(a, lambda: reader(a, b))
    loop.add_reader(b, lambda: reader(b, a))
    os.write(a_in, b"x")
    os.write(b_in, b"x")
    loop.run_once(1)
    assert len(calls) == 1
    for fd in (a, a_in, b, b_in):
        os.close(fd)


def test_post_after_close_is_ignored() -> None:
    made = EventLoop()
    made.close()
    made.post(lambda: pytest.fail("served after close"))
    made.close()


def test_a_signal_handler_may_post_while_its_thread_posts() -> None:
    """Python runs handlers between any two bytecodes of the main thread: also inside post(), its lock held."""
    loop = EventLoop()
    count = 0

    def handler(_number: int, _frame: object) -> None:
        nonlocal count
        count += 1
        loop.post(lambda: None)

    def send() -> None:
        while not stop.wait(0.0003):
            signal.pthread_kill(main, signal.SIGUSR1)

    main, stop = threading.get_ident(), threading.Event()
    sender = threading.Thread(target=send)
    saved = signal.signal(signal.SIGUSR1, handler)
    sender.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            loop.post(lambda: None)
            loop.run_once(0)
    finally:
        stop.set()
        sender.join(5)
        signal.signal(signal.SIGUSR1, saved)
        loop.close()
    assert count


def test_a_descriptor_may_have_a_reader_and_a_writer_that_come_and_go(loop: EventLoop) -> None:
    near, far = socket.socketpair()
    with near, far:
        calls: list[str] = []
        loop.add_reader(near.fileno(), lambda: calls.append("read"))
        loop.add_writer(near.fileno(), lambda: calls.append("write"))
        with pytest.raises(KeyError):
            loop.add_writer(near.fileno(), lambda: None)
        loop.run_once(1)
        assert calls == ["write"]
        far.send(b"x")
        loop.run_once(1)
        assert sorted(calls[1:]) == ["read", "write"]
        loop.remove_writer(near.fileno())
        loop.remove_writer(near.fileno())
        calls.clear()
        loop.run_once(1)
        assert calls == ["read"]
        loop.remove_reader(near.fileno())
        loop.run_once(0)
        assert calls == ["read"]


def test_a_writer_that_the_reader_removed_is_not_called_in_the_same_round(loop: EventLoop) -> None:
    near, far = socket.socketpair()
    with near, far:
        calls: list[str] = []
        loop.add_reader(near.fileno(), lambda: loop.remove_writer(near.fileno()))
        loop.add_writer(near.fileno(), lambda: calls.append("write"))
        far.send(b"x")
        loop.run_once(1)
        assert calls == []
