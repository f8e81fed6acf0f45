"""Framing of GDB's remote serial protocol: packets, checksums, escapes, run lengths, acknowledgements.

Source: GDB's manual, appendix E.1 "Overview" and E.10 "Notifications" (gdb 13). ``$data#cs``: two hexadecimal digits
of the sum of the bytes between ``$`` and ``#`` modulo 256. ``}`` escapes the byte behind it (exclusive or 0x20). In
replies ``c*n`` stands for further ``n - 29`` times ``c``. A byte 0x03 outside a packet is Ctrl-C.
"""

from __future__ import annotations

import enum
import re

PACKET_MAX = 0x4000
"""Bytes of payload that a client may send in one packet, as ``qSupported`` tells it (escapes counted)."""
_ESCAPED = frozenset(b"#$}*")
_HEX = frozenset(b"0123456789abcdefABCDEF")
_ESCAPE = re.compile(rb"}(.)", re.DOTALL)
_RUN = re.compile(rb"(.)\1{3,97}", re.DOTALL)
"""A byte and as many more of it as are worth a count, and as one count can tell."""


class Mark(enum.Enum):
    """What arrives besides packets."""

    ACK = "+"
    NACK = "-"
    INTERRUPT = "interrupt"
    BAD = "bad"
    """A packet with a wrong checksum or escape, or one that is longer than PACKET_MAX."""


Event = bytes | Mark


def encode(payload: bytes) -> bytes:
    """A reply's frame, with run lengths."""
    raw = _with_runs(escape(payload))
    return b"$%s#%02x" % (raw, sum(raw) & 0xFF)


def escape(payload: bytes) -> bytes:
    """``payload`` with what may not stand in a packet escaped."""
    if not _ESCAPED.intersection(payload):
        return payload
    return b"".join(b"}%c" % (byte ^ 0x20) if byte in _ESCAPED else b"%c" % byte for byte in payload)


def unescape(raw: bytes) -> bytes | None:
    """The opposite; ``None``: an escape is the last byte."""
    if b"}" not in raw:
        return raw
    whole = _ESCAPE.sub(lambda found: bytes([found[1][0] ^ 0x20]), raw)
    return None if _ESCAPE.sub(b"", raw).endswith(b"}") else whole


def _with_runs(raw: bytes) -> bytes:
    """Runs of a byte shortened; a count's byte is printable and neither ``#`` nor ``$``."""
    return _RUN.sub(_shortened, raw)


def _shortened(run: re.Match[bytes]) -> bytes:
    byte, more = run[1], len(run[0]) - 1
    counted = 5 if more in (6, 7) else more  # their bytes would be # and $
    return b"%s*%c%s" % (byte, counted + 29, byte * (more - counted))


def expand_runs(raw: bytes) -> bytes | None:
    """The opposite, as a client does it; ``None`` for what cannot be: no byte to repeat, no or a wrong count."""
    out = bytearray()
    at = 0
    while at < len(raw):
        if raw[at] == 0x2A:
            if not out or at + 1 == len(raw) or not 32 <= raw[at + 1] <= 126:
                return None
            out += bytes([out[-1]]) * (raw[at + 1] - 29)
            at += 2
        else:
            out.append(raw[at])
            at += 1
    return bytes(out)


class Decoder:
    """Takes a stream of bytes apart; keeps at most one packet of PACKET_MAX bytes, whatever arrives."""

    def __init__(self) -> None:
        self._packet: bytearray | None = None
        self._too_long = False
        self._checksum: bytearray | None = None

    def feed(self, data: bytes) -> list[Event]:
        """What ``data`` completes, in its order."""
        events: list[Event] = []
        for byte in data:
            if self._checksum is not None:
                self._checksum.append(byte)
                if len(self._checksum) == 2:
                    events.append(self._finish())
            elif byte == 0x24:  # $, also in a packet whose end was lost
                self._packet, self._too_long = bytearray(), False
            elif self._packet is None:
                if byte == 0x03:
                    events.append(Mark.INTERRUPT)
                elif byte == 0x2B:
                    events.append(Mark.ACK)
                elif byte == 0x2D:
                    events.append(Mark.NACK)
            elif byte == 0x23:  # #
                self._checksum = bytearray()
            elif len(self._packet) < PACKET_MAX:
                self._packet.append(byte)
            else:
                self._too_long = True
        return events

    def _finish(self) -> Event:
        packet, checksum = self._packet, self._checksum
        assert packet is not None and checksum is not None
        self._packet = self._checksum = None
        if self._too_long or not _HEX.issuperset(checksum) or int(checksum, 16) != sum(packet) & 0xFF:
            return Mark.BAD
        payload = unescape(bytes(packet))
        return Mark.BAD if payload is None else payload
