"""A block device of the host's: a file behind a loop device, for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[str]:
    """The device's path; skips where there is no loop device to be had. ``options`` are losetup's."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("a loop device needs root and losetup")
    made = subprocess.run(
        ["losetup", "--find", "--show", *options, str(file)], capture_output=True, text=True, timeout=30, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    path = made.stdout.strip()
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], timeout=30, check=True)
