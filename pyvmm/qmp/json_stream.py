"""JSON objects out of a byte stream: any whitespace or none between them, bounded in size and depth.

What is wrong is an error, and the stream goes on behind it: behind the value that cannot be parsed, or behind the
word that is none. Only a value longer than the bound leaves no place to go on from.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from pyvmm.qmp.errors import QmpError

VALUE_MAX = 1 << 20
DEPTH_MAX = 100
WORD_MAX = 100

_STRUCTURE = re.compile(rb'["\[\]{}]')
_STRING_MARK = re.compile(rb'["\\]')
_SPACE = re.compile(rb"[ \t\r\n]*")
_WORD = re.compile(rb"[^ \t\r\n\[\]{}\"]+")


class StreamTooLong(QmpError):
    """A value is longer than ``VALUE_MAX``: the stream cannot be followed any more."""


class JsonStream:
    """Feed bytes, take values. Scanning goes on where it stopped, so a value that trickles in costs no more."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._depth = 0
        self._in_string = False

    @property
    def pending(self) -> int:
        """Bytes that wait."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        self._buffer += data

    def take(self) -> Any:
        """The next value, or raises: EOFError if there is none yet, QmpError for one that is wrong, StreamTooLong."""
        end = self._find_end()
        if end is None:
            if len(self._buffer) > VALUE_MAX:
                raise StreamTooLong("JSON message size limit exceeded")
            raise EOFError
        text = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._at = self._depth = 0
        return _parse(text)

    def _find_end(self) -> int | None:
        """One past the first value in the buffer, ``None`` while it is not complete."""
        buffer = self._buffer
        if self._depth == 0 and not self._in_string:
            space = _SPACE.match(buffer)
            if space is not None and space.end():
                del buffer[: space.end()]
                self._at = 0
            word = _WORD.match(buffer)
            if word is not None:  # a number, a literal, garbage; none of them is a message
                return word.end() if word.end() < len(buffer) or word.end() >= WORD_MAX else None
        while True:
            found = (_STRING_MARK if self._in_string else _STRUCTURE).search(buffer, self._at)
            if found is None:
                self._at = len(buffer)
                return None
            mark, self._at = found[0], found.end()
            if mark == b"\\":
                if self._at == len(buffer):
                    self._at -= 1  # what it escapes is still to come
                    return None
                self._at += 1
            elif mark == b'"':
                self._in_string = not self._in_string
            elif mark in b"[{":
                self._depth += 1
                if self._depth > DEPTH_MAX:
                    raise StreamTooLong("JSON nesting depth limit exceeded")
            else:
                self._depth -= 1
            if self._depth <= 0 and not self._in_string:
                return self._at


def _parse(text: bytes) -> Any:
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError:
        raise QmpError("JSON parse error, invalid UTF-8 sequence in string") from None
    except ValueError as error:  # JSONDecodeError; a number of more digits than Python reads
        word = text.strip()[:40].decode("ascii", "replace")
        if word.isalpha():
            raise QmpError(f"JSON parse error, invalid keyword '{word}'") from None
        raise QmpError(f"JSON parse error, {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate key")
    return value


def _finite(digits: str) -> float:
    """What comes back in an ``id`` must be JSON, which knows no infinity."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"number out of range '{digits[:20]}'")
    return value


def _no_constant(word: str) -> Any:
    raise ValueError(f"invalid keyword '{word}'")
