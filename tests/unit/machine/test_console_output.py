"""Output order, back-pressure, readers that go away or never read."""

from __future__ import annotations

import os
import threading
import time

from pyvmm.machine.console_output import ConsoleOutput


def test_everything_comes_out_in_order() -> None:
    out, into = os.pipe()
    output = ConsoleOutput(into, own_fd=True)
    for i in range(1000):
        output(b"%d\n" % i)
    assert output.flush()
    output.close()
    with open(out, "rb") as reader:
        assert reader.read() == b"".join(b"%d\n" % i for i in range(1000))


def test_a_reader_that_is_gone_does_not_stop_the_guest() -> None:
    out, into = os.pipe()
    os.close(out)
    output = ConsoleOutput(into, own_fd=True)
    for _ in range(100):
        output(b"x" * 65536)
    assert output.flush()
    output.close()


def test_a_full_buffer_blocks_the_writer_until_it_is_read_or_told_to_be_lenient() -> None:
    out, into = os.pipe()
    output = ConsoleOutput(into)
    done = threading.Event()

    def write() -> None:
        for _ in range(100):  # 6.4 MB, far beyond the buffer and the pipe
            output(b"x" * 65536)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert not done.wait(0.2)
    output.lenient(True)
    assert done.wait(5)
    writer.join(5)
    drainer = threading.Thread(target=lambda: _drain(out))
    drainer.start()
    output.close()
    os.close(into)
    drainer.join(5)


def test_closing_with_a_reader_that_never_reads_takes_a_bounded_time() -> None:
    out, into = os.pipe()
    output = ConsoleOutput(into)
    output(b"x" * 500_000)
    began = time.monotonic()
    output.close()
    assert time.monotonic() - began < 5
    os.close(out)  # the stuck write ends with EPIPE and so does the thread
    output._thread.join(5)
    os.close(into)


def _drain(fd: int) -> None:
    while os.read(fd, 65536):
        pass
    os.close(fd)
