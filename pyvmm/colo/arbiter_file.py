"""The arbiter as a file on storage that both processes see: compare-and-swap under a lock.

For two processes of one host. A process that is stopped (SIGSTOP) while it holds the lock blocks the other, which then
holds its output: nothing is lost, but nothing goes on either. The lock of one that dies is free at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pyvmm.colo.arbiter import REGISTER_MAX, ArbiterAway, Register, decode_register
from pyvmm.errors import ConfigError

POLL = 0.002
"""Seconds between two tries for the lock."""


class FileArbiter:
    """``PATH.PAIR`` holds a register as JSON, ``PATH.PAIR.lock`` is what is locked (and never replaced)."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        if not self._path.parent.is_dir():
            raise ConfigError(f"--arbiter file:{path}: there is no folder {self._path.parent}; make it")

    def read(self, pair: str, seconds: float) -> Register | None:
        """The register; replaced as a whole, so no lock is needed to read it."""
        path = self._file(pair)
        try:
            with path.open("rb") as stored:
                return decode_register(stored.read(REGISTER_MAX + 1), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArbiterAway(f"{path}: {error.strerror}; is the storage mounted?") from None

    def compare_and_swap(self, pair: str, old: Register | None, new: Register, seconds: float) -> bool:
        """See Arbiter. Durable when it returns."""
        path = self._file(pair)
        try:
            with self._locked(path, time.monotonic() + seconds):
                if self.read(pair, seconds) != old:
                    return False
                self._replace(path, msgspec.json.encode(new))
                return True
        except OSError as error:
            raise ArbiterAway(f"{path}: {error.strerror}; is the storage mounted and not full?") from None

    def _file(self, pair: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{pair}")

    @contextlib.contextmanager
    def _locked(self, path: Path, until: float) -> Iterator[None]:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno != errno.EWOULDBLOCK:
                        raise
                if time.monotonic() >= until:
                    raise ArbiterAway(f"{path}.lock is held by another process that does not let go: is it stopped?")
                time.sleep(POLL)
            yield
        finally:
            os.close(fd)

    def _replace(self, path: Path, content: bytes) -> None:
        new = Path(f"{path}.new")  # only the holder of the lock writes it
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
