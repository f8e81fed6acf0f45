"""Commands in the tiny Linux: what is asked of its init, and what comes back over the serial console.

The script runs each command between two marker lines, so that its output can be told from the kernel's.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyvmm.errors import ConfigError

INIT_MARKER = b"pyvmm: init"
_BEGIN = b"pyvmm: command begin "
_END = b"pyvmm: command end "
_LINE_MAX = 1 << 20
STATUS_FD = 8
"""Where the script tells init its status before it ends (guests/linux/init.c)."""
COMMAND_LINE_MAX = 2048
"""COMMAND_LINE_SIZE of x86 Linux, the terminating NUL included."""


@dataclass
class CommandResult:
    """One ``--exec``: its output, its exit status (``None``: it never ended), seconds since the start."""

    command: str
    output: bytes = b""
    status: int | None = None
    began: float = 0.0
    ended: float = 0.0


def exec_script(commands: list[str]) -> str:
    """A shell script that runs ``commands`` between marker lines and ends with the last one's status.

    The last one is run by the script's own shell: a process less to make and to take down, 0.3 s where the guest's
    kernel is emulated. Its trap runs however that ends, but by ``exec`` or a signal; init has the status then.
    """
    for command in commands:
        if "\0" in command:
            raise ConfigError("--exec: the command contains a NUL byte")
    *others, last = commands
    pieces = [f"{_mark_begin(number)}(\n{other}\n)\ns=$?; {_mark_end(number)}\n" for number, other in enumerate(others)]
    # The order: what a command wrote comes before init knows, since that ends the machine.
    tell = f'echo "$s" 2>/dev/null >&{STATUS_FD} && kill -USR1 1; exit "$s"'
    trap = f"trap 's=$?; trap - EXIT; {_mark_end(len(others))}; {tell}' EXIT\n"
    return "".join([*pieces, trap, _mark_begin(len(others)), last, "\nexit\n"])


def _mark_begin(number: int) -> str:
    return f'echo "{_BEGIN.decode()}{number}"\n'


def _mark_end(number: int) -> str:
    return f'echo; echo "{_END.decode()}{number} $s"'


def exec_argument(commands: list[str]) -> str:
    """``pyvmm.exec=...`` for the kernel command line; init decodes and runs it."""
    return "pyvmm.exec=" + base64.b64encode(exec_script(commands).encode()).decode()


def check_command_line(text: str) -> str:
    """``text`` if the kernel can take it; ConfigError says how much too long it is."""
    excess = len(text.encode()) + 1 - COMMAND_LINE_MAX
    if excess > 0:
        raise ConfigError(
            f"the kernel command line is {excess} bytes too long for Linux; shorten --exec, or put the commands"
            " into a file of your own --initrd"
        )
    return text


class ExecConsole:
    """Sees everything the guest writes to its console and picks out marker lines and output."""

    def __init__(self, commands: list[str], write: Callable[[bytes], None] | None = None) -> None:
        self.results = [CommandResult(command) for command in commands]
        self.init_at: float | None = None
        self.log = bytearray()
        """The console so far (its last part), for error messages."""
        self.write: Callable[[bytes], None] = write or (lambda data: None)
        """Gets the commands' output as it comes."""
        self._started = time.monotonic()
        self._line = bytearray()
        self._current: CommandResult | None = None
        self._held = b""

    @property
    def began_all(self) -> bool:
        """Whether every command was at least started."""
        return all(result.began for result in self.results)

    def restart_clock(self) -> None:
        """Times count from now."""
        self._started = time.monotonic()

    def __call__(self, data: bytes) -> None:
        """Take console output."""
        self.log += data
        del self.log[: -64 * 1024]
        for piece in data.splitlines(keepends=True):
            self._line += piece
            if piece.endswith(b"\n") or len(self._line) > _LINE_MAX:
                line = bytes(self._line).replace(b"\r\n", b"\n")
                self._line.clear()
                self._take(line)

    def finish(self, status: int | None = None) -> None:
        """The guest has ended: what is held back of a command that never reached its end is output, too.

        ``status``: init's word for the last command, which may have ended without a marker.
        """
        self._emit(self._held + bytes(self._line).replace(b"\r\n", b"\n"))
        if self._current is not None and self._current is self.results[-1]:
            self._current.status = status
            self._current.ended = time.monotonic() - self._started
        self._held = b""
        self._line.clear()
        self._current = None

    def _take(self, line: bytes) -> None:
        now = time.monotonic() - self._started
        if line.startswith(INIT_MARKER) and self.init_at is None:
            self.init_at = now
        elif line.startswith(_BEGIN):
            number = _number(line[len(_BEGIN) :].split())
            if number is not None and number < len(self.results):
                self._current = self.results[number]
                self._current.began = now
                self._held = b""
        elif line.startswith(_END) and self._current is not None:
            self._current.status = _number(line[len(_END) :].split()[1:])
            self._current.ended = now
            # The script prints an empty line before the marker, so that it stands alone on its line.
            self._emit(self._held[:-1])
            self._held = b""
            self._current = None
        elif self._current is not None:
            self._emit(self._held)
            self._held = line

    def _emit(self, data: bytes) -> None:
        if self._current is not None and data:
            self._current.output = (self._current.output + data)[-_LINE_MAX:]
            self.write(data)


def _number(words: list[bytes]) -> int | None:
    if words and words[0].isdigit() and len(words[0]) < 6:
        return int(words[0])
    return None
