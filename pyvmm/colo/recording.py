"""A conversation kept in a file, a line of JSON for each message; printed and judged again by ``pyvmm colo replay``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from pyvmm.colo.messages import Message, Side, Turns
from pyvmm.errors import ChannelError, ConfigError

S = TypeVar("S", bound=msgspec.Struct)
FORMAT = 1
LINE_MAX = 4096
RECORDING_MAX = 64 << 20
"""Bytes of a file; then the conversation goes on unrecorded."""


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First line."""

    pyvmm_colo: int
    at: float
    """Seconds of the epoch."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message; ``t`` seconds after the start, ``size`` bytes of payload."""

    t: Annotated[float, Meta(ge=0)]
    side: Literal["primary", "secondary"]
    message: str
    size: Annotated[int, Meta(ge=0)] = 0


class FileRecorder:
    """Writes as it goes: a process that is killed leaves what was said. An error of the disk ends it quietly."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._began = time.monotonic()
        self._room = RECORDING_MAX
        self._write(Start(FORMAT, round(time.time(), 6)))

    @classmethod
    def open(cls, path: str | None) -> FileRecorder | None:
        """At ``path``, which is replaced; ``None``: no recording. ConfigError."""
        if path is None:
            return None
        try:
            return cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ConfigError(f"--colo-record {path}: {error.strerror}") from None

    def note(self, side: Side, message: Message, size: int) -> None:
        """See messages.Recorder."""
        self._write(Line(round(time.monotonic() - self._began, 6), side, message.label, size))

    def close(self) -> None:
        """Give the file back; harmless twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, line: msgspec.Struct) -> None:
        text = msgspec.json.encode(line) + b"\n"
        if self._fd < 0 or len(text) > self._room:
            return
        try:
            self._room -= os.write(self._fd, text)
        except OSError:
            self.close()


class Replayed(msgspec.Struct, frozen=True):
    """One message of a recording, and what is wrong with it."""

    line: Line
    checkpoint: int
    problem: str | None


def replay(path: str) -> Iterator[Replayed]:
    """Every message of the recording at ``path``, judged by the protocol's order. ConfigError if it is no recording."""
    labels = {message.label: message for message in Message}
    turns = Turns()
    try:
        with open(path, "rb") as file:
            _decode(path, 1, file.readline(LINE_MAX), Start)
            for number, text in enumerate(iter(lambda: file.readline(LINE_MAX), b""), 2):
                line = _decode(path, number, text, Line)
                if line.message not in labels:
                    raise ConfigError(f"{path}, line {number}: {line.message!r} is no message")
                problem = None
                try:
                    turns.take(line.side, labels[line.message])
                except ChannelError as error:
                    problem = str(error)
                yield Replayed(line, turns.checkpoints, problem)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _decode(path: str, number: int, text: bytes, kind: type[S]) -> S:
    try:
        found = msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}, line {number}: no recording of COLO ({error})") from None
    if isinstance(found, Start) and found.pyvmm_colo != FORMAT:
        raise ConfigError(f"{path}: a recording of format {found.pyvmm_colo}; this pyvmm reads {FORMAT}")
    return found
