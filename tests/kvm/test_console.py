"""The interactive console on a real terminal (a pseudo-terminal pyvmm is the session leader of)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.processes import PYVMM, REPOSITORY
from tests.framework.real_mode import ECHO_UNTIL_Q, SPIN, TRIPLE_FAULT, image, text

CTRL_A, CTRL_C, CTRL_D, CTRL_Z = b"\x01", b"\x03", b"\x04", b"\x1a"


class Terminal:
    """``pyvmm run GUEST`` on a terminal of its own."""

    def __init__(self, guest: str, *options: str) -> None:
        self.master, self.slave = os.openpty()
        self.settings = termios.tcgetattr(self.slave)
        self.screen = b""

        def lead() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [str(PYVMM), "run", guest, *options], stdin=self.slave, stdout=self.slave, stderr=self.slave,
            cwd=REPOSITORY, preexec_fn=lead,  # noqa: PLW1509 (no thread runs in the tests here)
        )  # fmt: skip

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, text: bytes, seconds: float = 15) -> None:
        """Wait until ``text`` is on the screen."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come, but {self.screen!r}"
            self.screen += os.read(self.master, 4096)

    def wait(self) -> int:
        """Its exit status; what it still had to say is on the screen."""
        status = self.process.wait(15)
        while select.select([self.master], [], [], 0)[0]:
            self.screen += os.read(self.master, 4096)
        return status

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.settings

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """An echo guest that has come up."""
    made = Terminal(image(tmp_path, text(b"ready\n") + ECHO_UNTIL_Q))
    made.expect(b"ready\r\n")  # raw input, but lines still end as a terminal wants them
    yield made
    made.close()


def test_typed_characters_come_back_once(terminal: Terminal) -> None:
    assert terminal.is_raw()
    terminal.type(b"hello")
    terminal.expect(b"hello")
    time.sleep(0.1)
    terminal.type(b"q")
    assert terminal.wait() == 0
    assert terminal.screen == b"ready\r\nhelloq"


def test_control_characters_are_the_guests(terminal: Terminal) -> None:
    for key in (CTRL_C, CTRL_D, CTRL_Z, b"\x1c", b"\x13"):
        terminal.type(key)
        terminal.expect(key)
    assert terminal.process.poll() is None


def test_pasted_text_arrives_whole(terminal: Terminal) -> None:
    pasted = b"".join(b"line %d of what was pasted\r" % n for n in range(120)).replace(b"q", b"Q")
    terminal.type(pasted)
    terminal.expect(pasted)


def test_ctrl_a_x_quits(terminal: Terminal) -> None:
    terminal.type(CTRL_A + b"x")
    assert terminal.wait() == 0
    assert terminal.is_restored()


def test_ctrl_a_in_pieces_and_twice(terminal: Terminal) -> None:
    terminal.type(CTRL_A + CTRL_A)
    terminal.expect(b"\x01")
    terminal.type(CTRL_A + b"h")
    terminal.expect(b"Ctrl-A x quits")
    terminal.type(CTRL_A)
    time.sleep(0.2)
    terminal.type(b"x")
    assert terminal.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(terminal: Terminal, number: signal.Signals) -> None:
    assert not terminal.is_restored()
    terminal.process.send_signal(number)
    assert terminal.wait() == 128 + number
    assert terminal.is_restored()
    assert b"pyvmm: ended by " in terminal.screen


def test_the_guests_end_leaves_the_terminal_as_it_was(terminal: Terminal) -> None:
    terminal.type(b"q")
    assert terminal.wait() == 0
    assert terminal.is_restored()


def test_a_crash_is_told_on_a_terminal_that_is_restored(tmp_path: Path) -> None:
    terminal = Terminal(image(tmp_path, TRIPLE_FAULT))
    assert terminal.wait() == 126
    assert terminal.is_restored()
    assert b"the guest crashed" in terminal.screen
    terminal.close()


def test_a_refusal_never_touches_the_terminal(tmp_path: Path) -> None:
    terminal = Terminal("/nonexistent")
    assert terminal.wait() == 125
    assert terminal.is_restored()
    terminal.close()


def test_a_terminal_that_goes_away_ends_it(terminal: Terminal) -> None:
    """The kernel sends SIGHUP; neither reading nor restoring the terminal works any more."""
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(15) == 129


def test_a_serial_line_elsewhere_leaves_the_terminal_alone(tmp_path: Path) -> None:
    terminal = Terminal(image(tmp_path, SPIN), "--serial", f"file:{tmp_path}/out", "--timeout", "1")
    time.sleep(0.6)
    assert terminal.is_restored()
    assert terminal.wait() == 124
    terminal.close()
