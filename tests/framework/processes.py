"""Running ``pyvmm`` as a user does: a process, its streams, its exit status."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from tests.framework.topology import Namespace

PYVMM = Path(sys.executable).with_name("pyvmm")
REPOSITORY = Path(__file__).resolve().parents[2]


def pyvmm(*arguments: str, timeout: float = 60, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run ``pyvmm`` to its end; standard input is a pipe that holds ``stdin`` and then ends."""
    return subprocess.run(
        [str(PYVMM), *arguments], input=stdin, capture_output=True, timeout=timeout, check=False, cwd=REPOSITORY
    )


def refused(*arguments: str, timeout: float = 30) -> str:
    """Run ``pyvmm``, which must refuse: status 125 and exactly one line on stderr, which is returned."""
    done = pyvmm(*arguments, timeout=timeout)
    text = done.stderr.decode()
    assert done.returncode == 125, (done.returncode, text)
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


GONE = 10.0
"""Seconds: a traced program that is killed has a VM to take down first."""


class Wrapper(Protocol):
    """What a program can be started under."""

    def command(self, *words: str) -> list[str]:
        """What to start instead of ``words``."""


class Running:
    """A ``pyvmm`` that runs on: read from it, signal it, wait for its end. A context manager that leaves nothing."""

    def __init__(self, *arguments: str, inside: Namespace | Wrapper | None = None, **options: Any) -> None:
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [str(PYVMM), *arguments]
        if inside is not None:
            command = inside.command(*command)
        self.process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, **(streams | options))

    def read_until(self, end: bytes, seconds: float = 20) -> bytes:
        """Standard output up to and with ``end``."""
        assert self.process.stdout is not None
        got = b""
        deadline = time.monotonic() + seconds
        while not got.endswith(end):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 1) if ready else b""
            assert piece, f"{end!r} did not come, but {got!r}"
            got += piece
        return got

    def finish(self, seconds: float = 15) -> tuple[int, bytes, bytes]:
        """Status, rest of standard output, standard error, once it has ended."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out or b"", err or b""

    def kill(self) -> None:
        """SIGKILL, also to what it was started under."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        deadline = time.monotonic() + GONE
        with pytest.raises(ProcessLookupError):  # it left no child in its session
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                time.sleep(0.01)  # one that was killed with it may still be on its way
