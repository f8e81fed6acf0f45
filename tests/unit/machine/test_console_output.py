"""Output order, back-pressure, readers that go away or never read."""

from __future__ import annotations

import os
import threading
import time

from pyvmm.machine.console_output import ConsoleOutput, OutputGate


def test_everything_comes_out_in_order() -> None:
    out, into = os.pipe()
    output = ConsoleOutput(into, OutputGate(), own_fd=True)
    for i in range(1000):
        output(b"%d\n" % i)
    assert output.flush()
    output.close()
    with open(out, "rb") as reader:
        assert reader.read() == b"".join(b"%d\n" % i for i in range(1000))


def test_a_reader_that_is_gone_does_not_stop_the_guest() -> None:
    out, into = os.pipe()
    os.close(out)
    output = ConsoleOutput(into, OutputGate(), own_fd=True)
    for _ in range(100):
        output(b"x" * 65536)
    assert output.flush()
    output.close()


def test_the_gate_closes_while_nobody_reads_and_opens_when_somebody_does() -> None:
    out, into = os.pipe()
    gate = OutputGate()
    output = ConsoleOutput(into, gate)
    for _ in range(20):  # 1.25 MB: more than the buffer and the pipe
        output(b"x" * 65536)
    assert gate.full
    through = threading.Event()

    def wait() -> None:
        gate.wait()
        through.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not through.wait(0.2)
    drainer = threading.Thread(target=lambda: _drain(out))
    drainer.start()
    assert through.wait(5)
    assert not gate.full
    waiter.join(5)
    output.close()
    os.close(into)
    drainer.join(5)


def test_a_gate_held_open_lets_everybody_through() -> None:
    gate = OutputGate()
    gate.set_full(gate, True)
    gate.hold_open(True)
    gate.wait()


def test_closing_with_a_reader_that_never_reads_takes_a_bounded_time() -> None:
    out, into = os.pipe()
    output = ConsoleOutput(into, OutputGate())
    output(b"x" * 500_000)
    began = time.monotonic()
    output.close()
    assert time.monotonic() - began < 5
    os.close(out)  # the stuck write ends with EPIPE and so does the thread
    output._thread.join(5)
    os.close(into)


def test_flushing_waits_for_a_slow_reader_as_long_as_it_reads() -> None:
    out, into = os.pipe()
    output = ConsoleOutput(into, OutputGate(), own_fd=True)
    sent = bytes(range(256)) * 800
    output(sent)
    got = bytearray()

    def read() -> None:
        while piece := os.read(out, 16384):
            got.extend(piece)
            time.sleep(0.06)  # 13 reads: well beyond the 0.3 s of the flush, each well within

    reader = threading.Thread(target=read)
    reader.start()
    assert output.flush(0.3)
    output.close()
    reader.join(10)
    os.close(out)
    assert bytes(got) == sent
    assert output.problem is None


def test_a_reader_that_never_reads_is_told_of() -> None:
    out, into = os.pipe()
    output = ConsoleOutput(into, OutputGate())
    output(b"x" * 100_000)
    assert not output.flush(0.1)
    assert output.problem == "its reader does not read"
    os.close(out)
    output.close()
    os.close(into)


def _drain(fd: int) -> None:
    while os.read(fd, 65536):
        pass
    os.close(fd)


def test_one_output_with_room_does_not_open_the_gate_that_another_shut() -> None:
    gate = OutputGate()
    one, two = object(), object()
    gate.set_full(one, True)
    gate.set_full(two, True)
    gate.set_full(two, False)
    assert gate.full
    gate.set_full(one, False)
    assert not gate.full
