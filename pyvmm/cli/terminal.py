"""The interactive console: raw mode with a way out, and a terminal that is always put back."""

from __future__ import annotations

import atexit
import contextlib
import os
import termios
import tty
from collections.abc import Callable, Iterator

from pyvmm.cli.messages import complain

ESCAPE = 0x01  # Ctrl-A, as in QEMU and screen
HELP = "Ctrl-A x quits pyvmm, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h shows this"


class EscapeKeys:
    """Takes Ctrl-A sequences out of input. A sequence may be split over reads."""

    def __init__(self, quit_: Callable[[], None], say: Callable[[str], None]) -> None:
        self._quit = quit_
        self._say = say
        self._escaped = False

    def __call__(self, data: bytes) -> bytes:
        """``data`` without escape sequences; their actions are carried out."""
        out = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    out.append(byte)
                continue
            self._escaped = False
            if byte in b"xX":
                self._quit()
            elif byte == ESCAPE:
                out.append(byte)
            elif byte in b"h?":
                self._say(HELP)
            else:
                out += bytes((ESCAPE, byte))
        return bytes(out)


@contextlib.contextmanager
def raw_terminal(fd: int = 0) -> Iterator[bool]:
    """Put the terminal on ``fd`` into raw mode for the block; ``False`` (and nothing done) if it is none.

    Restored at the end of the block and, for ways out that skip it, at interpreter exit.
    """
    if not os.isatty(fd):
        yield False
        return
    saved = termios.tcgetattr(fd)

    def restore() -> None:
        with contextlib.suppress(termios.error, ValueError):
            termios.tcsetattr(fd, termios.TCSADRAIN, saved)

    atexit.register(restore)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        # Raw output would leave pyvmm's own lines without carriage returns.
        raw = termios.tcgetattr(fd)
        raw[1] |= termios.OPOST
        termios.tcsetattr(fd, termios.TCSADRAIN, raw)
        yield True
    finally:
        restore()
        atexit.unregister(restore)


def say(text: str) -> None:
    """A line of pyvmm's own between the guest's output."""
    complain(f"\n[pyvmm: {text}]")
