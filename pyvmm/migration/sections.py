"""The wire form of saved state: one way for a snapshot's file and for a stream between processes.

::

    stream     +----------+---------+-----------+-----+-----------+-----+
               | PYVMSTAT | format  | section 1 | ... | section n | end |
               | 8 bytes  | u32     |           |     |           |     |
               +----------+---------+-----------+-----+-----------+-----+

    section    +--------+---------+---------+--------+---------+-------+
               | length | version | length  | name   | payload | CRC32 |   CRC32: of all of the section before it
               | name   |         | payload | ASCII  | msgpack |       |
               | u16    | u32     | u32     |        | map     | u32   |
               +--------+---------+---------+--------+---------+-------+

    end        +--------+---------+---------+-------+
               |   0    | count   |    0    | CRC32 |                     count: sections before it
               | u16    | u32     | u32     | u32   |                     CRC32: of everything before it
               +--------+---------+---------+-------+

All integers are little-endian. A payload maps field names to values of msgpack's plain types. A section's version says
what its fields mean; the format, how sections are laid out. Nothing is decoded that its CRC does not fit, and the end's
CRC notices sections that are exchanged, doubled or gone. A CRC finds accidents; somebody's intent it does not, so
whoever uses the fields checks them (:func:`pyvmm.devices.state.decode_fields`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pyvmm.errors import SectionError

MAGIC = b"PYVMSTAT"
FORMAT = 1
NAME_MAX = 64
PAYLOAD_MAX = 16 << 20
"""Bytes of one section's fields; decoding them takes some ten times as much."""
SECTIONS_MAX = 1024

_START = struct.Struct("<8sI")
_HEAD = struct.Struct("<HII")
_CRC = struct.Struct("<I")


class Section(msgspec.Struct, frozen=True):
    """Saved state of one part of a machine."""

    name: str
    version: int
    data: dict[str, Any]


def encode_sections(sections: Iterable[Section]) -> bytes:
    """The stream that holds ``sections``, in this order. ValueError: one that could not be decoded again."""
    encoder = msgspec.msgpack.Encoder()
    out = bytearray(_START.pack(MAGIC, FORMAT))
    names = set()
    for section in sections:
        name = section.name.encode("ascii")
        payload = encoder.encode(section.data)
        if not 1 <= len(name) <= NAME_MAX or len(payload) > PAYLOAD_MAX or section.name in names:
            raise ValueError(f"section {section.name!r}: a bad name, one used before, or {len(payload)} bytes")
        names.add(section.name)
        start = len(out)
        out += _HEAD.pack(len(name), section.version, len(payload)) + name + payload
        out += _CRC.pack(zlib.crc32(memoryview(out)[start:]))
    if len(names) > SECTIONS_MAX:
        raise ValueError(f"{len(names)} sections")
    out += _HEAD.pack(0, len(names), 0)
    out += _CRC.pack(zlib.crc32(out))
    return bytes(out)


KnownSections = dict[str, tuple[bytes, Section]]
"""Sections of an earlier stream by name, as they stood there and as they were decoded."""


def decode_sections(stream: bytes | bytearray | memoryview, known: KnownSections | None = None) -> dict[str, Section]:
    """All sections of ``stream`` (hostile) by name, in their order.

    What stands in ``known`` byte for byte is taken from there, and ``known`` is what this stream holds afterwards: most
    of a machine is the same at one checkpoint and the next.

    Raises SectionError, which names the section (``(stream)`` if it is none's) and what is wrong: not such a stream, a
    newer format, truncated, a wrong CRC, a name that comes twice, fields that are none, something behind the end.
    """
    view = memoryview(stream)
    if len(view) < _START.size or view[: len(MAGIC)] != MAGIC:
        raise SectionError("(stream)", "magic", "this is no saved state of pyvmm")
    form = _START.unpack_from(view)[1]
    if form != FORMAT:
        problem = f"{form} is newer than this pyvmm's {FORMAT}" if form > FORMAT else f"{form} never was"
        raise SectionError("(stream)", "format", problem)
    found: dict[str, Section] = {}
    at = _START.size
    while True:
        name_size, version, size = _HEAD.unpack_from(_piece(view, at, _HEAD.size, "(stream)", "section"))
        if name_size == 0:
            _check_end(view, at, version, size, len(found))
            for gone in (known or {}).keys() - found.keys():
                del (known or {})[gone]
            return found
        if name_size > NAME_MAX or size > PAYLOAD_MAX or len(found) == SECTIONS_MAX:
            problem = f"a name of {name_size} bytes, fields of {size}, or too many sections"
            raise SectionError("(stream)", "length", problem)
        raw = bytes(_piece(view, at + _HEAD.size, name_size, "(stream)", "name"))
        name = raw.decode("ascii", "replace")
        body_size = _HEAD.size + name_size + size
        body = _piece(view, at, body_size, name, "(payload)")
        _check_crc(view, at + body_size, body, name)
        if not (name.isascii() and name.isprintable()):
            raise SectionError(ascii(name), "name", "is not printable ASCII")
        if name in found:
            raise SectionError(name, "name", "there are two sections of this name")
        found[name] = _section(name, version, body, size, known)
        at += body_size + _CRC.size


def _section(name: str, version: int, body: memoryview, size: int, known: KnownSections | None) -> Section:
    if known is None:
        return Section(name, version, _fields(name, body[len(body) - size :]))
    raw = bytes(body)
    before = known.get(name)
    if before is None or before[0] != raw:
        before = known[name] = raw, Section(name, version, _fields(name, body[len(body) - size :]))
    return before[1]


def match_sections(found: Mapping[str, Section], expected: Mapping[str, int]) -> None:
    """Check that ``found`` are exactly the sections ``expected`` (name to version); else SectionError names one."""
    for section in found.values():
        if section.name not in expected:
            raise SectionError(section.name, "name", "unknown section: this machine has no such part")
        newest = expected[section.name]
        if section.version != newest:
            relation = "newer" if section.version > newest else "older"
            raise SectionError(section.name, "version", f"{section.version} is {relation} than this pyvmm's {newest}")
    for name in expected:
        if name not in found:
            raise SectionError(name, "name", "the section is missing")


def _piece(view: memoryview, at: int, size: int, section: str, field: str) -> memoryview:
    if size > len(view) - at:
        raise SectionError(section, field, "truncated")
    return view[at : at + size]


def _check_crc(view: memoryview, at: int, covered: memoryview, section: str) -> None:
    if _CRC.unpack_from(_piece(view, at, _CRC.size, section, "CRC"))[0] != zlib.crc32(covered):
        raise SectionError(section, "CRC", "does not fit: the data is damaged")


def _check_end(view: memoryview, at: int, count: int, zero: int, sections: int) -> None:
    _check_crc(view, at + _HEAD.size, view[: at + _HEAD.size], "(end)")
    if count != sections or zero:
        raise SectionError("(end)", "count", f"says {count}, there are {sections}")
    if at + _HEAD.size + _CRC.size != len(view):
        raise SectionError("(end)", "length", "trailing data behind the end")


def _fields(name: str, payload: memoryview) -> dict[str, Any]:
    try:
        data = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, RecursionError, TypeError, ValueError) as error:
        raise SectionError(name, "(payload)", f"is no msgpack: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise SectionError(name, "(payload)", "is no map of field names")
    return data
