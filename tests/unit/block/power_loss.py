"""Files whose process dies at a chosen call, or whose host loses power there: what was not synced is there in part."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

SECTOR = 512
COUNTED = ("pwrite", "write", "ftruncate", "fdatasync", "fsync", "rename", "unlink")


class Died(BaseException):
    """Here the process ends."""


class FaultyOs:
    """Stands in for ``os`` in the modules under test. ``calls_left``: how many more go through; ``None``: all."""

    def __init__(self) -> None:
        self.calls_left: int | None = None
        self.calls = 0
        self.fails: OSError | None = None
        """What every further write raises."""
        self.fds: dict[int, tuple[str, bytes]] = {}
        """By inode: a file that was written, and what of it is durable."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def call(*arguments: Any) -> Any:
            self._count()
            if name in ("pwrite", "write", "ftruncate"):
                if self.fails is not None:
                    raise self.fails
                self._remember(arguments[0])
            if name == "pwrite" and self.calls_left == 0:  # torn
                half = memoryview(arguments[1])[: len(arguments[1]) // 2]
                os.pwrite(arguments[0], half, arguments[2])
                raise Died
            result = real(*arguments)
            if name in ("fdatasync", "fsync"):
                self._synced(arguments[0])
            return result

        return call

    def _count(self) -> None:
        self.calls += 1
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Died

    def _remember(self, fd: int) -> None:
        path, inode = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_ino
        if path.endswith(("img", "-log0", "-log1")) and inode not in self.fds:
            with open(path, "rb") as file:
                self.fds[inode] = (path, file.read())

    def _synced(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        if inode in self.fds:
            path = self.fds[inode][0]
            with open(path, "rb") as file:
                self.fds[inode] = (path, file.read())

    def lose_power(self, chance: random.Random) -> None:
        """Of what was not synced some sectors are there and some are not, and a file may have its old size."""
        for path, durable in self.fds.values():
            with open(path, "rb") as file:
                now = file.read()
            size = len(chance.choice((durable, now)))
            longest = max(len(durable), len(now))
            versions = [each.ljust(longest, b"\0") for each in (durable, now)]
            mixed = bytearray()
            for at in range(0, size, SECTOR):
                mixed += chance.choice(versions)[at : at + SECTOR]
            with open(path, "r+b") as file:
                stamp = os.fstat(file.fileno()).st_mtime_ns
                file.truncate(0)
                file.write(mixed[:size])
            os.utime(path, ns=(stamp, stamp))
        self.fds.clear()


@contextmanager
def faulty(*modules: ModuleType) -> Iterator[FaultyOs]:
    """``modules`` use it meanwhile."""
    stand_in = FaultyOs()
    patches = [mock.patch.object(module, "os", stand_in) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield stand_in
    finally:
        for patch in patches:
            patch.stop()
