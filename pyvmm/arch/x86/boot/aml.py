"""ACPI Machine Language: just the terms that pyvmm's DSDT is made of, as functions that return bytes.

Source: ACPI 6.5, chapter 20 "ACPI Machine Language (AML) Specification" (20.2.2 name objects, 20.2.4
package length, 20.2.5 terms), 6.4 "Resource Data Types for ACPI", 19.3.4 for EISA IDs.
"""

from __future__ import annotations

import re

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")


def name_path(path: str) -> bytes:
    """A name such as ``\\_SB``, ``_S5`` or ``_SB.COM1`` (20.2.2)."""
    root, rest = (b"\\", path[1:]) if path.startswith("\\") else (b"", path)
    segments = rest.split(".") if rest else []
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(f"{path!r} is not an ACPI name")
    encoded = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    if len(segments) == 0:
        return root + b"\0"
    if len(segments) == 1:
        return root + encoded
    prefix = b"\x2e" if len(segments) == 2 else bytes((0x2F, len(segments)))
    return root + prefix + encoded


def with_length(body: bytes) -> bytes:
    """``body`` behind its PkgLength, which counts its own bytes (20.2.4)."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,)) + body
    for extra in (1, 2, 3):
        length = len(body) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            return bytes((extra << 6 | length & 0xF,)) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"a package of {len(body)} bytes is too long for AML")


def integer(value: int) -> bytes:
    """The shortest constant for an unsigned 64-bit ``value``."""
    if value in (0, 1):
        return bytes((value,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << (8 * size):
            return bytes((prefix,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is not an unsigned 64-bit integer")


def string(text: str) -> bytes:
    """An ASCII string."""
    data = text.encode("ascii")
    if b"\0" in data:
        raise ValueError("an AML string cannot hold NUL")
    return b"\x0d" + data + b"\0"


def buffer(data: bytes) -> bytes:
    """A buffer holding ``data``."""
    return b"\x11" + with_length(integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """A package of terms."""
    if len(elements) > 255:
        raise ValueError(f"a package of {len(elements)} elements")
    return b"\x12" + with_length(bytes((len(elements),)) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """``Name (path, value)``."""
    return b"\x08" + name_path(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) { terms }``."""
    return b"\x10" + with_length(name_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) { terms }``."""
    return b"\x5b\x82" + with_length(name_path(path) + b"".join(terms))


def notify_method(path: str, target: str, value: int) -> bytes:
    """``Method (path) { Notify (target, value) }``, without arguments."""
    return b"\x14" + with_length(name_path(path) + b"\0" + b"\x86" + name_path(target) + integer(value))


def generation_id(gpa: int) -> bytes:
    """The VM generation counter whose GUID is at ``gpa`` (see devices/vmgenid.py)."""
    return device(
        "VGEN",
        name("_HID", string("PVMM0001")),
        # The specification's, and the one that fits into eight characters, which Linux looks for.
        name("_CID", package(string("VM_Gen_Counter"), string("VMGENCTR"))),
        name("_DDN", string("VM_Gen_Counter")),
        name("ADDR", package(integer(gpa & 0xFFFFFFFF), integer(gpa >> 32))),
    )


def eisa_id(text: str) -> bytes:
    """``EisaId ("PNP0501")``: three letters in 5 bits each, four hex digits, as a constant."""
    if not re.fullmatch(r"[A-Z]{3}[0-9A-F]{4}", text):
        raise ValueError(f"{text!r} is not an EISA ID")
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + (letters << 16 | int(text[3:], 16)).to_bytes(4, "big")


def resources(*items: bytes) -> bytes:
    """A resource template: the items' descriptors and the end tag (checksum 0: not computed), as a buffer."""
    return buffer(b"".join(items) + b"\x79\0")


def memory32_fixed(base: int, size: int) -> bytes:
    """``Memory32Fixed (ReadWrite, base, size)`` (6.4.3.4)."""
    return b"\x86\x09\0\x01" + base.to_bytes(4, "little") + size.to_bytes(4, "little")


def interrupt(gsi: int, *, level: bool) -> bytes:
    """``Interrupt (ResourceConsumer, Level or Edge, ActiveHigh, Exclusive) { gsi }`` (6.4.3.6)."""
    flags = 0x01 | (0x00 if level else 0x02)
    return bytes((0x89, 0x06, 0x00, flags, 0x01)) + gsi.to_bytes(4, "little")


def virtio_mmio_device(index: int, base: int, size: int, gsi: int, *, level: bool = False) -> bytes:
    """The ``LNRO0005`` device by which Linux's virtio_mmio driver finds a transport at ``base``."""
    return device(
        f"VR{index:02X}",
        name("_HID", string("LNRO0005")),
        name("_UID", integer(index)),
        name("_CCA", integer(1)),
        name("_CRS", resources(memory32_fixed(base, size), interrupt(gsi, level=level))),
    )
