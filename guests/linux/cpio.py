"""Writes cpio archives in the "newc" format, which Linux unpacks into its root file system.

Format: Linux's Documentation/driver-api/early-userspace/buffer-format.rst and cpio(5). Each member is a header of
6 + 13 * 8 hexadecimal characters, the NUL-terminated name, and the content, name and content each padded to
4 bytes; the member TRAILER!!! ends the archive. The same members always give the same bytes: inode numbers count
up, all times are zero, everything belongs to root. Device nodes need no privilege, since nothing is made on disk.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

TRAILER = "TRAILER!!!"
_NAME_MAX = 4096


class CpioError(ValueError):
    """A member that the format, or the kernel's unpacker, cannot take."""


@dataclass(frozen=True)
class Member:
    """One file: ``name`` relative to the root, ``mode`` with its type bits (``stat.S_IFREG | 0o755``)."""

    name: str
    mode: int
    content: bytes = b""
    """A regular file's bytes, a symbolic link's target."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


def folder(name: str, permissions: int = 0o755) -> Member:
    """A folder."""
    return Member(name, stat.S_IFDIR | permissions)


def file(name: str, content: bytes, permissions: int = 0o644) -> Member:
    """A regular file."""
    return Member(name, stat.S_IFREG | permissions, content)


def symlink(name: str, target: str) -> Member:
    """A symbolic link to ``target``."""
    return Member(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Member:
    """A character device node."""
    return Member(name, stat.S_IFCHR | permissions, device=(major, minor))


def write_archive(members: list[Member]) -> bytes:
    """The archive of ``members`` in their order. CpioError: a bad name, twice the same, or no folder for it yet."""
    folders = {""}
    names: set[str] = set()
    parts = []
    for inode, member in enumerate(members, start=1):
        _check(member, names, folders)
        names.add(member.name)
        if stat.S_ISDIR(member.mode):
            folders.add(member.name)
        parts.append(_member(member, inode))
    parts.append(_member(Member(TRAILER, 0), 0))
    return b"".join(parts)


def _check(member: Member, names: set[str], folders: set[str]) -> None:
    name = member.name
    pieces = name.split("/")
    if not name or len(name.encode()) >= _NAME_MAX or "\0" in name or any(p in ("", ".", "..") for p in pieces):
        raise CpioError(f"cpio member {name!r}: must be a relative path without empty, . or .. parts")
    if name == TRAILER:
        raise CpioError(f"cpio member {name!r}: this name ends an archive")
    if name in names:
        raise CpioError(f"cpio member {name!r}: twice in the archive")
    # The kernel makes no folders of its own: a file that comes before its folder would silently be missing.
    if "/".join(pieces[:-1]) not in folders:
        raise CpioError(f"cpio member {name!r}: its folder does not come before it")
    if not stat.S_IFMT(member.mode):
        raise CpioError(f"cpio member {name!r}: mode {member.mode:#o} has no file type")
    if member.content and not (stat.S_ISREG(member.mode) or stat.S_ISLNK(member.mode)):
        raise CpioError(f"cpio member {name!r}: only files and symbolic links have content")
    if len(member.content) > 0xFFFFFFFF:
        raise CpioError(f"cpio member {name!r}: 4 GiB or more do not fit")


def _member(member: Member, inode: int) -> bytes:
    name = member.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(member.mode) else 1
    owner = modified = check = 0
    fields = (
        inode, member.mode, owner, owner, links, modified, len(member.content),
        0, 0, *member.device, len(name), check,
    )  # fmt: skip
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + name) + _padded(member.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
