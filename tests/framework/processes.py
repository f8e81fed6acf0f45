"""Running ``pyvmm`` as a user does: a process, its streams, its exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
