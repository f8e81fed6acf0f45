"""The kernel command line: its bytes, its limit, its place."""

from __future__ import annotations

import os

from pyvmm.arch.x86 import layout
from pyvmm.errors import ConfigError
from pyvmm.memory.guest_memory import GuestMemory

LINUX_DEFAULT_LIMIT = 2047
"""Longest command line of an x86 Linux that does not say (COMMAND_LINE_SIZE is 2048 with the NUL)."""


def encode_command_line(text: str, limit: int) -> bytes:
    """``text`` as the bytes the user typed, NUL-terminated; ConfigError if longer than ``limit`` bytes.

    The kernel takes bytes, so text that is not ASCII passes as UTF-8 (what the shell gave, undone exactly
    by ``os.fsencode``); the limit counts bytes. Linux would cut a longer line off silently.
    """
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ConfigError(f"--append: character {error.start + 1} has no UTF-8 form") from None
    if b"\0" in data:
        raise ConfigError(f"--append: byte {data.index(0) + 1} is NUL, which would end the command line there")
    limit = min(limit, layout.COMMAND_LINE_MAX - 1)
    if len(data) > limit:
        raise ConfigError(f"--append: the command line has {len(data)} bytes, this image takes at most {limit}")
    return data + b"\0"


def write_command_line(memory: GuestMemory, text: str, limit: int) -> int:
    """Put the command line into guest memory; returns its guest-physical address."""
    memory.write(layout.COMMAND_LINE, encode_command_line(text, limit))
    return layout.COMMAND_LINE
