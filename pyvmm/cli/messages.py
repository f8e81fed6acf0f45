"""pyvmm's own lines on standard error."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def complain(text: str) -> None:
    """Print ``text`` on standard error. If that is gone (a terminal that hung up, a closed pipe) nobody minds."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Let ``stream`` lead nowhere: what is still buffered must not fail again when the interpreter exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
